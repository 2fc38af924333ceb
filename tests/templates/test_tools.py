"""Conversations with tools are rendered for models whose template knows tools, with loss on the text of the calls."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_chat_format import (
    CHATML,
    TOKENIZER_CONFIG,
    assistant,
    learned_text,
    system,
    user,
    whole_text,
    write_chat_model,
)
from tool_templates import HERMES, LLAMA, MISTRAL, QWEN_CODER

from luthier.errors import InputError
from luthier.records.example import Conversation, Example, Message, Tool, ToolCall
from luthier.templates.chat_format import ChatFormat
from luthier.templates.renderer import RenderPolicy, RenderReport, TemplateRenderer, iter_pairs, tokenize

WEATHER: Tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
POLICY = RenderPolicy(max_tokens=2000)


def calls(*arguments: str, content: str = "", id: str = "call_1") -> Message:
    made = (ToolCall(id=id, name="weather", arguments=text) for text in arguments)
    return Message(role="assistant", content=content, tool_calls=tuple(made))


def result(content: str, id: str = "call_1") -> Message:
    return Message(role="tool", content=content, tool_call_id=id)


@pytest.fixture
def hermes(tmp_path: Path) -> ChatFormat:
    config = {"max_position_embeddings": 4000, "eos_token_id": 2}
    return ChatFormat.load(write_chat_model(tmp_path / "hermes", HERMES, config=config))


def test_tools_and_calls_and_results_stand_in_the_text_as_the_template_writes_them(hermes: ChatFormat) -> None:
    turns = [user("Bonn?"), calls('{"city": "Bonn"}'), result("rain"), assistant("It rains.")]
    rendered = hermes.render(turns, [WEATHER])
    text = whole_text(hermes, rendered)
    assert text.count('{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}') == 1
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>' in text
    assert "<tool_response>\nrain\n</tool_response>" in text
    assert rendered.tokens[: rendered.prompt_tokens] == hermes.prompt_tokens(turns[:-1], [WEATHER])


def test_loss_falls_on_the_text_of_calls_and_on_the_answer_behind_them(hermes: ChatFormat) -> None:
    turns = [user("Bonn?"), calls('{"city": "Bonn"}', "{}", content="Wait."), result("rain"), assistant("It rains.")]
    assert learned_text(hermes, hermes.render(turns, [WEATHER])) == (
        'Wait.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>It rains.<|im_end|>'
    )


def test_an_example_with_tools_is_learned_with_them(hermes: ChatFormat) -> None:
    turns = (user("Bonn?"), calls('{"city": "Bonn"}'))
    example = Example(id="a", messages=turns, tools=(WEATHER,))
    conversation = TemplateRenderer(None, ()).conversation(example)
    assert conversation.tools == (WEATHER,)
    ((one,), _) = tokenize([conversation], hermes, POLICY)
    assert '"name": "weather"' in hermes.tokenizer.decode(one.tokens, skip_special_tokens=False)
    assert sum(one.loss_mask) == len(
        hermes.encode('<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}')
    ) + len(hermes.encode("\n</tool_call><|im_end|>"))


def test_calls_can_be_preferred_to_each_other(hermes: ChatFormat) -> None:
    pair = Conversation(
        example_id="a",
        messages=(user("Bonn?"), calls('{"city": "Bonn"}')),
        rejected=(calls('{"city": "Rome"}'),),
        tools=(WEATHER,),
    )
    (one,) = iter_pairs([pair], hermes, POLICY, RenderReport())
    assert one.chosen.tokens != one.rejected.tokens
    same = pair.model_copy(update={"rejected": (calls('{"city": "Bonn"}', id="other"),)})
    with pytest.raises(InputError, match="nothing to prefer"):
        list(iter_pairs([same], hermes, POLICY, RenderReport()))


@pytest.mark.parametrize(
    "conversation",
    [
        Conversation(example_id="a", messages=(user("x"), assistant("y")), tools=(WEATHER,)),
        Conversation(example_id="a", messages=(user("x"), calls("{}"))),
        Conversation(example_id="a", messages=(user("x"), result("y"), assistant("z"))),
    ],
)
def test_a_base_whose_template_knows_no_tools_refuses_them(tmp_path: Path, conversation: Conversation) -> None:
    chat_format = ChatFormat.load(write_chat_model(tmp_path, CHATML))
    assert (chat_format.tool_template, chat_format.tool_format) == (None, None)
    with pytest.raises(InputError, match="knows no tools"):
        tokenize([conversation], chat_format, POLICY)


@pytest.mark.parametrize(
    ("template", "name"), [(HERMES, "hermes"), (MISTRAL, "mistral"), (LLAMA, "llama3"), (QWEN_CODER, None)]
)
def test_how_answers_write_calls_is_told_by_the_template(tmp_path: Path, template: str, name: str | None) -> None:
    chat_format = ChatFormat.load(write_chat_model(tmp_path, template))
    assert chat_format.tool_template is not None
    assert (chat_format.tool_format and chat_format.tool_format.name) == name


def test_a_template_that_only_says_the_word_knows_no_tools(tmp_path: Path) -> None:
    template = "You are good with tools. <tool_call>" + CHATML
    assert ChatFormat.load(write_chat_model(tmp_path, template)).tool_template is None


def test_a_template_of_its_own_for_tools_is_used_for_them_alone(tmp_path: Path) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": HERMES}]
    config = {**TOKENIZER_CONFIG, "chat_template": named}
    chat_format = ChatFormat.load(write_chat_model(tmp_path, None, tokenizer_config=config))
    turns = [user("x")]
    assert "<tools>" not in chat_format.text(turns, add_generation_prompt=True)
    assert "<tools>" in chat_format.text(turns, [WEATHER], add_generation_prompt=True)


def test_ids_are_shortened_where_the_template_wants_nine_letters(tmp_path: Path) -> None:
    chat_format = ChatFormat.load(write_chat_model(tmp_path, MISTRAL))
    turns = [user("x"), calls("{}", id="call_of_24_letters_or_so"), result("y", id="call_of_24_letters_or_so")]
    text = chat_format.text(turns, [WEATHER], add_generation_prompt=True)
    id = text.partition('"id": "')[2][:9]
    assert id.isalnum()
    assert f"[TOOL_RESULTS]{id} y" in text
    kept = chat_format.text([user("x"), calls("{}", id="abcdefgh1")], [WEATHER], add_generation_prompt=True)
    assert '"id": "abcdefgh1"' in kept


def test_arguments_that_are_no_object_are_refused(hermes: ChatFormat) -> None:
    with pytest.raises(InputError, match="must be a JSON object"):
        hermes.text([user("x"), calls("[1]")], [WEATHER], add_generation_prompt=True)


def test_a_conversation_without_tools_has_the_tokens_that_it_always_had(hermes: ChatFormat) -> None:
    turns = [system("Be brief."), user("Hi"), assistant("Hello")]
    assert whole_text(hermes, hermes.render(turns)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
    )
