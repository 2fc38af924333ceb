"""Read a row of a chat or preference file: its messages, its rejected answer and its other keys.

In: the JSON object of a row. Out: a :class:`ChatRow`, or a ``ValueError`` with every rule that the row breaks. Known:

- OpenAI's conversations: ``{"messages": […]}``
  (https://platform.openai.com/docs/api-reference/fine-tuning/chat-input);
- OpenAI's preferences: ``{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}``
  (https://platform.openai.com/docs/api-reference/fine-tuning/preference-input), whose schema says ``…_completion``;
- TRL's preferences: ``{"prompt": […], "chosen": […], "rejected": […]}``; without a prompt, it is what the two answers
  start with in common (https://huggingface.co/docs/trl/dataset_formats#preference).

Conversations may use tools: :mod:`luthier.ingest.tool_rows` reads their ``tools``, ``tool_calls`` and results.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from luthier.ingest.json_types import json_type
from luthier.ingest.tool_rows import MESSAGE_TOOL_KEYS, TOOL_KEYS, TOOL_ROLES, read_calls, read_result, read_tools
from luthier.records.example import Message, Role, Tool

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    **TOOL_ROLES,
}
MESSAGE_KEYS = {"role", "content", "weight"}
PREFERENCES = (("preferred_output", "non_preferred_output"), ("preferred_completion", "non_preferred_completion"))

Messages = tuple[Message, ...]


class ChatRow(NamedTuple):
    """What a row holds: ``messages`` (with ``rejected``: the prompt and the preferred answer) and all other keys.

    ``tools`` are those that the assistant can call.
    """

    fields: dict[str, Any]
    messages: Messages
    rejected: Messages | None = None
    tools: tuple[Tool, ...] = ()


def is_chat_row(row: dict[str, Any]) -> bool:
    """Tell whether a row holds a conversation or a pair of answers, rather than fields for a template."""
    return "messages" in row or _is_openai_preference(row) or _is_trl_preference(row)


def read_chat_row(row: dict[str, Any]) -> ChatRow:
    """Return the conversation of a row, or its prompt and pair of answers.

    Raises:
        ValueError: naming every rule that the row breaks.
    """
    if _is_trl_preference(row):
        chat, problems = _read_trl_preference(row)
    elif _is_openai_preference(row):
        chat, problems = _read_openai_preference(row)
    else:
        messages, problems = read_messages(row.get("messages"))
        chat = ChatRow({name: value for name, value in row.items() if name != "messages"}, messages)
    tools = read_tools(chat.fields, problems)
    if problems:
        raise ValueError("; ".join(problems))
    fields = {name: value for name, value in chat.fields.items() if not (name in TOOL_KEYS and value)}
    return chat._replace(fields=fields, tools=tools)


# Preferences


def _is_openai_preference(row: dict[str, Any]) -> bool:
    names = _preference_names(row)
    return names is not None and any(isinstance(row.get(key), dict | list) for key in ("input", *names))


def _preference_names(row: dict[str, Any]) -> tuple[str, str] | None:
    """Return what a row calls the better and the worse answer."""
    return next((names for names in PREFERENCES if names[0] in row or names[1] in row), None)


def _is_trl_preference(row: dict[str, Any]) -> bool:
    return isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list)


def _read_openai_preference(row: dict[str, Any]) -> tuple[ChatRow, list[str]]:
    names = _preference_names(row) or PREFERENCES[0]
    better, worse_name = names
    others = {name: value for name, value in row.items() if name not in ("input", *names)}
    given = row.get("input")
    inside = given if isinstance(given, dict) else {}
    fields = {name: value for name, value in inside.items() if name != "messages"} | others
    prompt, problems = _read_turns(inside.get("messages"), "input.messages")
    preferred, wrong = _read_turns(row.get(better), better)
    worse, wrong_too = _read_turns(row.get(worse_name), worse_name)
    problems += wrong + wrong_too
    if not problems:
        problems = _pair_problems(prompt, preferred, worse, names)
    return ChatRow(fields, prompt + preferred, worse), problems


def _read_trl_preference(row: dict[str, Any]) -> tuple[ChatRow, list[str]]:
    has_prompt = isinstance(row.get("prompt"), list)  # a prompt as text repeats what the answers start with
    taken = ("chosen", "rejected", "prompt") if has_prompt else ("chosen", "rejected")
    fields = {name: value for name, value in row.items() if name not in taken}
    prompt, problems = _read_turns(row["prompt"], "prompt") if has_prompt else ((), [])
    chosen, wrong = _read_turns(row.get("chosen"), "chosen")
    rejected, wrong_too = _read_turns(row.get("rejected"), "rejected")
    problems += wrong + wrong_too
    if not problems and chosen != rejected:
        shared = _shared_start(chosen, rejected)
        chosen, rejected = chosen[len(shared) :], rejected[len(shared) :]
        prompt = prompt if prompt == shared else prompt + shared
    if not problems:
        problems = _pair_problems(prompt, chosen, rejected, ("chosen", "rejected"))
    return ChatRow(fields, prompt + chosen, rejected), problems


def _shared_start(left: Messages, right: Messages) -> Messages:
    length = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[:length]


def _pair_problems(prompt: Messages, preferred: Messages, worse: Messages, names: tuple[str, str]) -> list[str]:
    if preferred == worse:
        return [f"{names[0]} and {names[1]} are equal: there is nothing to prefer"]
    problems = []
    for name, answer in zip(names, (preferred, worse), strict=True):
        if len(answer) != 1:
            problems.append(f"{name} must be one message behind the prompt, and has {len(answer)}")
        elif answer[-1].role != "assistant":
            problems.append(f"the last message of {name} must be the assistant's")
        elif not answer[-1].says_something:
            problems.append(f"{name} has empty content: nothing is left to learn")
    if not prompt:
        problems.append("there is no prompt: a message that both answers follow")
    elif prompt[-1].role == "assistant":
        problems.append("the last message of the prompt must not be the assistant's")
    return problems


# Messages


def read_messages(value: Any) -> tuple[tuple[Message, ...], list[str]]:
    """Return the messages of one conversation in OpenAI's form, and every rule that it breaks.

    The last message must be the assistant's, and one of the assistant's must have a weight other than 0.
    """
    messages, problems = _read_turns(value, "messages")
    if not isinstance(value, list) or not value:
        return (), problems
    roles = [item.get("role") if isinstance(item, dict) else None for item in value]
    if "assistant" not in roles:
        problems.append("there is no assistant message to learn from")
    elif roles[-1] != "assistant":
        problems.append("the last message must be the assistant's")
    elif not problems and not any(message.role == "assistant" and message.weight for message in messages):
        problems.append("every assistant message has weight 0: nothing is left to learn")
    return messages, problems


def _read_turns(value: Any, name: str) -> tuple[Messages, list[str]]:
    if not isinstance(value, list) or not value:
        return (), [f"{name} must be an array with at least one message"]
    problems: list[str] = []
    messages: list[Message] = []
    asked: set[str] = set()
    for number, item in enumerate(value):
        message, wrong = _read_message(item, asked)
        problems += [f"{name}[{number}] {problem}" for problem in wrong]
        if message:
            messages.append(message)
    return tuple(messages), problems


def _read_message(item: Any, asked: set[str]) -> tuple[Message | None, list[str]]:
    """Return a turn; ``asked`` has the ids of the calls before it, and gets those of its own."""
    if not isinstance(item, dict):
        return None, [f"is {json_type(item)}, not an object"]
    role = item["role"] if isinstance(item.get("role"), str) else ""
    problems = [] if role in ROLES else [f"has the unknown role {item.get('role')!r}"]
    known = MESSAGE_KEYS | MESSAGE_TOOL_KEYS.get(role, set())
    unknown = [key for key, value in item.items() if key not in known and value not in (None, [], "")]
    problems += [f"has {key!r}, which is not supported here" for key in unknown]
    calls = read_calls(item, asked, problems) if role == "assistant" else ()
    result = read_result(item, asked, problems) if role in TOOL_ROLES else {}
    text = "" if calls and item.get("content") is None else _read_content(item, problems, may_be_empty=bool(calls))
    weight = item.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        problems.append(f"has the weight {weight!r}; it must be 0 or 1")
    elif weight is not None and role != "assistant":
        problems.append("has a weight; only assistant messages may")
    if problems:
        return None, problems
    weight = 1 if weight is None else weight
    return Message(role=ROLES[role], content=text, weight=weight, tool_calls=calls, **result), []


def _read_content(item: dict[str, Any], problems: list[str], *, may_be_empty: bool) -> str:
    content = item.get("content")
    if isinstance(content, list):
        content = _join_parts(content, problems)
    elif not isinstance(content, str):
        problems.append("has no content" if content is None else f"has {json_type(content)} for content")
        return ""
    if not content and item.get("role") == "assistant" and not may_be_empty and not problems:
        problems.append("has empty content: nothing is left to learn")
    return content


def _join_parts(parts: list[Any], problems: list[str]) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind == "text" and isinstance(text, str):
            texts.append(text)
        elif kind == "text" or not isinstance(kind, str):
            problems.append("has a content part that is not {'type': 'text', 'text': …}")
        else:
            problems.append(f"has a content part of type {kind!r}, which is not supported yet")
    return "".join(texts)
