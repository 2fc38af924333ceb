"""A row of a chat or preference file becomes messages, or says every rule that it breaks."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.ingest.chat_rows import ChatRow, is_chat_row, read_chat_row, read_messages
from luthier.records.example import Message

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
