"""THE renderer, first half: examples → messages; and the whole way from examples to what a model trains on.

What cannot be learned is never passed on in silence: an example whose loss mask is empty, which lacks its end of
turn, or which is longer than the context is refused, left out or (if too long) truncated, as the user chose, and
counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from luthier.errors import InputError
from luthier.records.example import Conversation, Example, Message
from luthier.records.record import Record
from luthier.records.template import Template
from luthier.templates.chat_format import ChatFormat, RenderedConversation
from luthier.templates.handlebars import HandlebarsText

Problem = Literal["empty_mask", "missing_end_of_turn", "too_long"]
PROBLEM_TEXTS: dict[str, str] = {
    "empty_mask": "no token carries loss (an empty answer, or every answer has weight 0)",
    "missing_end_of_turn": "the chat format does not end the answer with a stop token, so the model would never stop",
    "too_long": "longer than the limit",
}


class RenderPolicy(Record):
    """What happens to an example that cannot be learned as it is.

    ``refuse`` stops with an error that lists them; ``drop`` leaves them out; ``truncate`` shortens the longest
    prompt message from its end until the example fits ``max_tokens``: the chat format stays whole, and no answer is
    ever cut; ``append`` adds the end-of-turn token.
    """

    max_tokens: int = Field(gt=1)
    too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    empty_mask: Literal["refuse", "drop"] = "refuse"
    missing_end_of_turn: Literal["refuse", "drop", "append"] = "refuse"


@dataclass(frozen=True)
class TokenizedExample:
    """An example ready for training: ``tokens`` and, of equal length, ``loss_mask``."""

    example_id: str
    tokens: list[int]
    loss_mask: list[bool]
    weight: float = 1.0


@dataclass
class RenderReport:
    """What was rendered, dropped, truncated or repaired."""

    rendered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    appended: int = 0


class TemplateRenderer:
    """Turns examples into conversations with one template (None: the examples are conversations already).

    Raises:
        InputError: a text does not parse, or uses a field that is not in ``fields``.
    """

    def __init__(self, template: Template | None, fields: Sequence[str]) -> None:
        self._texts: dict[Literal["system", "user", "assistant"], HandlebarsText] = {}
        if template is None:
            return
        if template.system is not None:
            self._texts["system"] = HandlebarsText(template.system, "system template")
        self._texts["user"] = HandlebarsText(template.user, "user template")
        self._texts["assistant"] = HandlebarsText(template.assistant, "assistant template")
        for text in self._texts.values():
            text.check_fields(fields)

    @property
    def fields(self) -> frozenset[str]:
        """The fields that the template uses."""
        return frozenset().union(*(text.fields for text in self._texts.values()))

    def conversation(self, example: Example) -> Conversation:
        """Return an example as messages.

        Raises:
            InputError: the example has neither messages nor a template to make them, or a text fails on it.
        """
        if example.messages is not None:
            return Conversation(example_id=example.id, messages=example.messages)
        if not self._texts:
            raise InputError(
                f"Example {example.id} has fields but no messages, so a template is needed.",
                hint="make one with: luthier template save NAME --user '{{text}}' --assistant '{{label}}'",
            )
        messages = [Message(role=role, content=text.render(example.fields)) for role, text in self._texts.items()]
        return Conversation(example_id=example.id, messages=tuple(messages))


def tokenize(
    conversations: Iterable[Conversation], chat_format: ChatFormat, policy: RenderPolicy
) -> tuple[list[TokenizedExample], RenderReport]:
    """Return what a model trains on, and the count of what was left out or changed.

    Raises:
        InputError: examples that cannot be learned where the policy refuses them, all at once; or nothing is left.
    """
    report = RenderReport()
    kept: list[TokenizedExample] = []
    refused: list[str] = []
    for conversation in conversations:
        example, problem = _tokenize_one(conversation, chat_format, policy, report)
        if problem and getattr(policy, problem) == "refuse":
            refused.append(f"example {conversation.example_id}: {PROBLEM_TEXTS[problem]}")
        elif problem or example is None:
            report.dropped[problem or "empty_mask"] += 1
        else:
            kept.append(example)
    if refused:
        raise InputError(
            f"{len(refused)} examples cannot be learned as they are (limit {policy.max_tokens} tokens).",
            problems=refused,
            hint="mend them, or choose drop (or truncate, for too long ones) in the training options",
        )
    if not kept:
        raise InputError("No example is left to learn from.", problems=[f"{k}: {n}" for k, n in report.dropped.items()])
    report.rendered = len(kept)
    return kept, report


def _tokenize_one(
    conversation: Conversation, chat_format: ChatFormat, policy: RenderPolicy, report: RenderReport
) -> tuple[TokenizedExample | None, Problem | None]:
    if not any(turn.content.strip() for turn in conversation.messages if turn.role == "assistant" and turn.weight):
        return None, "empty_mask"
    rendered = chat_format.render(conversation.messages)
    if rendered.loss_tokens == 0:
        return None, "empty_mask"
    appended = not rendered.has_end_of_turn
    if appended and policy.missing_end_of_turn != "append":
        return None, "missing_end_of_turn"
    truncated = _learned_length(rendered) + appended > policy.max_tokens
    if truncated:
        shorter = None
        if policy.too_long == "truncate":
            shorter = _shorten(conversation.messages, chat_format, policy.max_tokens - appended)
        if shorter is None:
            return None, "too_long"
        rendered = shorter
    # What follows the last learned token teaches nothing.
    tokens = rendered.tokens[: _learned_length(rendered)]
    mask = rendered.loss_mask[: len(tokens)]
    if appended:
        tokens, mask = [*tokens, min(chat_format.stop_tokens)], [*mask, True]
    report.appended += appended
    report.truncated += truncated
    return TokenizedExample(conversation.example_id, tokens, mask), None


def _learned_length(rendered: RenderedConversation) -> int:
    return max(index for index, learned in enumerate(rendered.loss_mask) if learned) + 1


def _shorten(messages: Sequence[Message], chat_format: ChatFormat, max_tokens: int) -> RenderedConversation | None:
    """Shorten the longest prompt message from its end until all fits; None where even an empty one does not."""
    sizes = {i: len(chat_format.encode(turn.content)) for i, turn in enumerate(messages) if turn.role != "assistant"}
    if not sizes:
        return None
    longest = max(sizes, key=lambda i: sizes[i])
    content = chat_format.encode(messages[longest].content)
    while True:
        # A character of several tokens that was cut in two decodes to U+FFFD at the end.
        text = chat_format.tokenizer.decode(content, skip_special_tokens=False).rstrip("\ufffd")
        shorter = [
            *messages[:longest],
            messages[longest].model_copy(update={"content": text}),
            *messages[longest + 1 :],
        ]
        rendered = chat_format.render(shorter)
        excess = _learned_length(rendered) - max_tokens
        if excess <= 0:
            return rendered
        if not content:
            return None
        content = content[: max(0, len(content) - excess)]
