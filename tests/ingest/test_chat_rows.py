"""A row of a chat or preference file becomes messages, or says every rule that it breaks."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.ingest.chat_rows import ChatRow, is_chat_row, read_chat_row, read_messages
from luthier.records.example import Message, ToolCall

SYSTEM = {"role": "system", "content": "Be brief"}
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
WORSE = {"role": "assistant", "content": "what"}


def openai(**others: Any) -> dict[str, Any]:
    return {"input": {"messages": [USER]}, "preferred_output": [ASSISTANT], "non_preferred_output": [WORSE]} | others


def texts(chat: ChatRow) -> tuple[list[str], list[str]]:
    return [turn.content for turn in chat.messages], [turn.content for turn in chat.rejected or ()]


def test_null_keys_of_openai_exports_are_no_problem() -> None:
    messages, problems = read_messages([USER, ASSISTANT | {"refusal": None, "tool_calls": None, "weight": None}])
    assert (len(messages), problems) == (2, [])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        ("hi", "must be an array"),
        ([USER], "no assistant message"),
        ([USER, ASSISTANT, USER], "last message must be the assistant's"),
        ([USER, ASSISTANT | {"audio": {"id": "1"}}], "'audio', which is not supported here"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT],
            "'image_url', which is not",
        ),
        ([USER | {"weight": 1}, ASSISTANT], "only assistant messages may"),
        ([USER, ASSISTANT | {"weight": 2}], "must be 0 or 1"),
        ([USER, ASSISTANT | {"weight": True}], "must be 0 or 1"),
        ([USER, ASSISTANT | {"weight": [1]}], "must be 0 or 1"),
        ([USER, ASSISTANT | {"weight": 0}], "nothing is left to learn"),
        ([USER, {"role": "assistant", "content": ""}], "empty content"),
        ([USER, {"role": "assistant"}], "has no content"),
        ([{"role": "wizard", "content": "x"}, ASSISTANT], "unknown role 'wizard'"),
        ([{"role": ["user"], "content": "x"}, ASSISTANT], "unknown role"),
        (["hi", ASSISTANT], "messages[0] is a string, not an object"),
        ([{"role": "user", "content": ["x"]}, ASSISTANT], "content part that is not"),
    ],
)
def test_conversation_that_cannot_be_learned_from_says_why(messages: Any, said: str) -> None:
    assert said in "; ".join(read_messages(messages)[1])


# Preferences


def test_openai_preferences_are_a_prompt_with_two_answers_and_other_keys_are_fields() -> None:
    inside = {"messages": [SYSTEM, USER], "tools": [], "parallel_tool_calls": True}
    chat = read_chat_row(openai(input=inside, weight=2))
    assert texts(chat) == (["Be brief", "hi", "hello"], ["what"])
    assert chat.fields == {"tools": [], "parallel_tool_calls": True, "weight": 2}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WORSE]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]},
        {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]},
    ],
)
def test_trl_preferences_have_their_prompt_apart_or_in_both_answers(row: dict[str, Any]) -> None:
    assert is_chat_row(row)
    chat = read_chat_row(row | {"margin": 0.5})
    assert chat == ChatRow({"margin": 0.5}, (message(USER), message(ASSISTANT)), (message(WORSE),))


def test_what_both_answers_start_with_goes_on_from_the_prompt() -> None:
    again = {"role": "user", "content": "and then?"}
    row = {"prompt": [USER], "chosen": [ASSISTANT, again, ASSISTANT], "rejected": [ASSISTANT, again, WORSE]}
    assert texts(read_chat_row(row)) == (["hi", "hello", "and then?", "hello"], ["what"])


def test_prompt_as_text_beside_whole_conversations_is_a_field() -> None:
    row = {"prompt": "hi", "messages": [], "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}
    chat = read_chat_row(row)
    assert texts(chat) == (["hi", "hello"], ["what"])
    assert chat.fields == {"prompt": "hi", "messages": []}


@pytest.mark.parametrize(
    "row", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"text": "a"}, {"input": "a", "preferred_output": "b"}]
)
def test_plain_texts_are_fields_for_a_template(row: dict[str, Any]) -> None:
    assert not is_chat_row(row)


TURN = [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (openai(non_preferred_output=[ASSISTANT]), "preferred_output and non_preferred_output are equal"),
        (openai(preferred_output=[{"role": "assistant", "content": ""}]), "preferred_output[0] has empty content"),
        (openai(preferred_output=[{"role": "assistant", "content": " "}]), "preferred_output has empty content"),
        (openai(non_preferred_output=[USER]), "the last message of non_preferred_output must be the assistant's"),
        (openai(non_preferred_output=[ASSISTANT, USER]), "non_preferred_output must be one message behind"),
        (openai(preferred_output="yes"), "preferred_output must be an array"),
        (openai(input="hi"), "input.messages must be an array"),
        (openai(input={"messages": TURN}), "the last message of the prompt must not be the assistant's"),
        (openai(input={"messages": [USER], "tools": [{}]}), "tools[0] has the type None; only functions are known"),
        ({"preferred_output": [ASSISTANT]}, "non_preferred_output must be an array"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "chosen and rejected are equal"),
        ({"chosen": [ASSISTANT], "rejected": [WORSE]}, "there is no prompt"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, "rejected must be one message behind the prompt"),
        ({"chosen": [USER, ASSISTANT]}, "rejected must be an array"),
        ({"chosen": [USER, USER], "rejected": [USER, WORSE]}, "last message of chosen must be the assistant's"),
        ({"prompt": [], "chosen": [ASSISTANT], "rejected": [WORSE]}, "prompt must be an array"),
    ],
)
def test_pair_that_cannot_be_learned_from_says_why(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        read_chat_row(row)
    assert said in str(caught.value)


def test_all_problems_of_a_pair_are_in_one_reason() -> None:
    row = openai(preferred_output=[{"role": "wizard", "content": "x"}], input={"messages": [3], "functions": [{}]})
    with pytest.raises(ValueError, match="input") as caught:
        read_chat_row(row)
    for part in ("input.messages[0] is a number", "unknown role 'wizard'", "functions[0] has no function"):
        assert part in str(caught.value)


def message(item: dict[str, str]) -> Message:
    return Message.model_validate(item)


def test_the_names_of_openais_schema_are_known_too() -> None:
    row = openai()
    named = {name.replace("_output", "_completion"): value for name, value in row.items()}
    assert is_chat_row(named)
    assert read_chat_row(named) == read_chat_row(row)


# Tools

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_calls_their_results_and_tools_become_records() -> None:
    chat = read_chat_row(
        {"messages": [USER, ASKS, RESULT, ASSISTANT], "tools": [WEATHER], "parallel_tool_calls": False}
    )
    _, asks, result, _ = chat.messages
    assert asks == Message(
        role="assistant",
        content="",
        tool_calls=(ToolCall(id="call_1", name="weather", arguments='{"city": "Bonn"}'),),
    )
    assert result == Message(role="tool", content="rain", tool_call_id="call_1")
    assert chat.tools == (WEATHER,)
    assert chat.fields == {"parallel_tool_calls": False}


def test_a_conversation_may_end_in_a_call() -> None:
    assert read_chat_row({"messages": [USER, ASKS]}).messages[-1].says_something
    assert read_messages([USER, ASKS | {"weight": 0}])[1] == [
        "every assistant message has weight 0: nothing is left to learn"
    ]


def test_the_older_functions_become_tools() -> None:
    asks = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}
    result = {"role": "function", "name": "weather", "content": "rain"}
    chat = read_chat_row({"messages": [USER, asks, result, ASSISTANT], "functions": [WEATHER["function"]]})
    assert chat.messages[1].tool_calls == (ToolCall(id="call_0", name="weather", arguments="{}"),)
    assert chat.messages[2] == Message(role="tool", content="rain", name="weather")
    assert chat.tools == (WEATHER,)


def test_arguments_may_be_an_object_as_models_templates_have_them() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "K\u00f6ln"}}}
    (message, *_), problems = read_messages([ASKS | {"tool_calls": [call]}])
    assert (message.tool_calls[0].arguments, problems) == ('{"city": "Köln"}', [])


def test_answers_of_a_pair_may_be_calls() -> None:
    row = openai(preferred_output=[ASKS], input={"messages": [USER], "tools": [WEATHER]})
    chat = read_chat_row(row)
    assert (chat.messages[-1].tool_calls[0].name, chat.tools) == ("weather", (WEATHER,))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [USER, ASKS], "tools": "weather"}, "tools is a string, not an array"),
        ({"messages": [USER, ASKS], "tools": [3]}, "tools[0] is a number, not an object"),
        ({"messages": [USER, ASKS], "tools": [{"type": "file_search"}]}, "only functions are known"),
        ({"messages": [USER, ASKS], "tools": [{"type": "function", "function": {}}]}, "no function with a name"),
        (
            {"messages": [USER, ASKS], "functions": [{"name": "f", "parameters": 3}]},
            "functions[0] has parameters that are no JSON schema",
        ),
        ({"messages": [USER, ASKS | {"tool_calls": "x"}]}, "messages[1] has a string for tool_calls"),
        (
            {"messages": [USER, ASKS | {"tool_calls": [{"type": "code"}]}]},
            "tool_calls[0], which is no call of a function",
        ),
        (
            {"messages": [USER, ASKS | {"tool_calls": [{"function": {"name": ""}}]}]},
            "which has no function with a name",
        ),
        (
            {"messages": [USER, ASKS | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "which has arguments that are no JSON",
        ),
        (
            {"messages": [USER, ASKS | {"tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
            "which has an array for arguments, not an object",
        ),
        (
            {"messages": [USER, RESULT, ASSISTANT]},
            "has the tool_call_id 'call_1', which no tool call",
        ),
        ({"messages": [USER, ASKS, RESULT]}, "the last message must be the assistant's"),
        (
            {"messages": [USER | {"tool_calls": [CALL]}, ASSISTANT]},
            "messages[0] has 'tool_calls', which is not",
        ),
        ({"messages": [USER, ASKS, RESULT | {"name": 3}, ASSISTANT]}, "has a number for name"),
    ],
)
def test_tools_that_cannot_be_learned_from_say_why(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        read_chat_row(row)
    assert said in str(caught.value)
