"""A chat format renders messages as its model was taught, and puts loss on answers and their end-of-turn alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from luthier.errors import InputError, NotFoundError
from luthier.records.example import Message
from luthier.templates.chat_format import ChatFormat, RenderedConversation

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, START, END = range(3)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
)
WITHOUT_END_OF_TURN = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRIPS_EARLIER_THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {"max_position_embeddings": 256, "eos_token_id": END}
TOKENIZER_CONFIG = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|endoftext|>"}


def write_chat_model(
    folder: Path,
    template: str | None = CHATML,
    *,
    config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
) -> Path:
    """Write what a chat format is read from: a byte-level BPE tokenizer of 300 tokens, a template, and configs."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["the system and the user ask the assistant; it is positive or negative\n\n"], trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    configs = {"config": CONFIG if config is None else config, "generation_config": generation_config}
    configs["tokenizer_config"] = TOKENIZER_CONFIG if tokenizer_config is None else tokenizer_config
    for name, values in configs.items():
        if values is not None:
            (folder / f"{name}.json").write_text(json.dumps(values), "utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat.load(write_chat_model(tmp_path_factory.mktemp("chatml")))


def system(content: str) -> Message:
    return Message(role="system", content=content)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str, weight: int = 1) -> Message:
    return Message.model_validate({"role": "assistant", "content": content, "weight": weight})


def learned_text(chat_format: ChatFormat, rendered: RenderedConversation) -> str:
    learned = [token for token, has_loss in zip(rendered.tokens, rendered.loss_mask, strict=True) if has_loss]
    return str(chat_format.tokenizer.decode(learned, skip_special_tokens=False))


def whole_text(chat_format: ChatFormat, rendered: RenderedConversation) -> str:
    return str(chat_format.tokenizer.decode(rendered.tokens, skip_special_tokens=False))


# Tokens and mask


def test_mask_covers_the_answer_and_its_end_of_turn_and_nothing_else(chatml: ChatFormat) -> None:
    rendered = chatml.render([system("Judge."), user("Great film"), assistant("positive")])
    assert whole_text(chatml, rendered) == (
        "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\nGreat film<|im_end|>\n"
        "<|im_start|>assistant\npositive<|im_end|>\n"
    )
    assert learned_text(chatml, rendered) == "positive<|im_end|>"
    first = rendered.loss_mask.index(True)
    assert rendered.prompt_tokens == first
    assert all(rendered.loss_mask[first : first + rendered.loss_tokens])
    assert rendered.has_end_of_turn


def test_mask_covers_every_answer_of_several_turns(chatml: ChatFormat) -> None:
    turns = [user("one"), assistant("first"), user("two"), assistant("second"), user("three"), assistant("third")]
    rendered = chatml.render(turns)
    assert learned_text(chatml, rendered) == "first<|im_end|>second<|im_end|>third<|im_end|>"
    assert whole_text(chatml, rendered) == chatml.text(turns, add_generation_prompt=False)


def test_turn_of_weight_zero_has_no_loss_and_stays_in_the_text(chatml: ChatFormat) -> None:
    turns = [user("one"), assistant("first", 0), user("two"), assistant("second")]
    rendered = chatml.render(turns)
    assert learned_text(chatml, rendered) == "second<|im_end|>"
    assert "first<|im_end|>" in whole_text(chatml, rendered)
    assert chatml.render([user("one"), assistant("first", 0)]).loss_tokens == 0


def test_answer_without_text_has_loss_on_its_end_of_turn_only(chatml: ChatFormat) -> None:
    assert learned_text(chatml, chatml.render([user("one"), assistant("")])) == "<|im_end|>"


def test_conversation_without_answers_has_no_tokens_with_loss(chatml: ChatFormat) -> None:
    assert chatml.render([user("one")]).loss_tokens == 0
    assert chatml.render([]).tokens == []


@pytest.mark.parametrize("answer", ["positive", " positive", "\npositive", "\n\n", "tive", "日本", "e\u0301"])
def test_model_is_asked_with_the_tokens_that_it_was_trained_on(chatml: ChatFormat, answer: str) -> None:
    turns = [system("Judge."), user("one"), assistant("first"), user("Great film"), assistant(answer)]
    rendered = chatml.render(turns)
    prompt = chatml.prompt_tokens(turns[:-1])
    assert rendered.tokens[: rendered.prompt_tokens] == prompt
    assert rendered.tokens == prompt + chatml.encode(f"{answer}<|im_end|>\n")


def test_end_of_turn_that_the_template_does_not_write_is_noticed(tmp_path: Path) -> None:
    chat_format = ChatFormat.load(write_chat_model(tmp_path, WITHOUT_END_OF_TURN))
    rendered = chat_format.render([user("one"), assistant("first")])
    assert not rendered.has_end_of_turn
    assert learned_text(chat_format, rendered) == "first\n"
    assert chat_format.render([user("one"), assistant("first", 0)]).has_end_of_turn


def test_other_end_of_turn_than_the_tokenizers_is_noticed(tmp_path: Path) -> None:
    folder = write_chat_model(
        tmp_path, config={"max_position_embeddings": 256}, tokenizer_config={"eos_token": "<|endoftext|>"}
    )
    assert not ChatFormat.load(folder).render([user("one"), assistant("first")]).has_end_of_turn


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    chat_format = ChatFormat.load(write_chat_model(tmp_path, STRIPS_EARLIER_THINKING))
    thinking = "<think>hm</think>first"
    assert learned_text(chat_format, chat_format.render([user("one"), assistant(thinking)])) == f"{thinking}<|im_end|>"
    with pytest.raises(InputError, match="rewrites earlier turns at message 4"):
        chat_format.render([user("one"), assistant(thinking), user("two"), assistant("second")])


def test_opening_that_the_answer_does_not_repeat_is_refused(tmp_path: Path) -> None:
    template = CHATML.replace("{{ '' }}", "<think>")
    chat_format = ChatFormat.load(write_chat_model(tmp_path, template))
    with pytest.raises(InputError, match="rewrites earlier turns at message 2"):
        chat_format.render([user("one"), assistant("first")])


@settings(deadline=None)
@given(answer=st.text(), question=st.text())
def test_answer_comes_back_from_its_tokens(chatml: ChatFormat, answer: str, question: str) -> None:
    rendered = chatml.render([user(question), assistant(answer)])
    assert chatml.decode(rendered.tokens[rendered.prompt_tokens :]) == answer
    assert rendered.tokens[: rendered.prompt_tokens] == chatml.prompt_tokens([user(question)])
    assert rendered.loss_mask == [False] * rendered.prompt_tokens + [True] * len(chatml.encode(answer)) + [True, False]


def test_decode_ends_before_the_first_stop_token(chatml: ChatFormat) -> None:
    assert chatml.decode([*chatml.encode("one"), END, *chatml.encode("two")]) == "one"
    assert chatml.decode([START, *chatml.encode("one")]) == "one"
    assert chatml.decode([]) == ""


# Chat templates


def test_template_that_refuses_the_messages_is_an_input_error(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role here') }}{% endif %}" + CHATML
    chat_format = ChatFormat.load(write_chat_model(tmp_path, template))
    with pytest.raises(InputError, match="No system role here"):
        chat_format.render([system("Judge."), user("one"), assistant("first")])
    assert chat_format.render([user("one"), assistant("first")]).has_end_of_turn


UNREACHABLE = [
    "''.__class__",
    "raise_exception.__globals__",
    "namespace.__init__",
    "'{0.__class__}'.format(1)",
    "messages | attr('__class__')",
    "messages[0].content.__class__",
]
REFUSED = [
    "messages.__class__.__mro__",
    "messages[0].__class__.__base__.__subclasses__()",
    "cycler.__init__.__globals__",
    "self.__init__.__globals__",
    "messages.append(1)",
    "messages[0].clear()",
    "messages[0].update(role='system')",
    "range(10 ** 9) | list",
    "1 // 0",
    "messages[0].content + 1",
    "nothing.deeper",
    "[1][7].deeper",
    "strftime_now()",
]


@pytest.mark.parametrize("expression", UNREACHABLE)
def test_template_sees_nothing_of_python(tmp_path: Path, expression: str) -> None:
    chat_format = ChatFormat.load(write_chat_model(tmp_path, f"[{{{{ {expression} }}}}]"))
    assert chat_format.text([user("one")], add_generation_prompt=True) == "[]"


@pytest.mark.parametrize("expression", REFUSED)
def test_template_that_reaches_further_or_fails_is_an_input_error(tmp_path: Path, expression: str) -> None:
    chat_format = ChatFormat.load(write_chat_model(tmp_path, f"{{{{ {expression} }}}}"))
    with pytest.raises(InputError, match="refuses these messages"):
        chat_format.text([user("one")], add_generation_prompt=True)


def test_template_cannot_include_files(tmp_path: Path) -> None:
    chat_format = ChatFormat.load(write_chat_model(tmp_path, "{% include '/etc/hostname' %}"))
    with pytest.raises(InputError, match="refuses these messages"):
        chat_format.text([user("one")], add_generation_prompt=True)


def test_template_that_does_not_parse_is_refused_with_its_folder(tmp_path: Path) -> None:
    write_chat_model(tmp_path, "{% for message in messages %}")
    with pytest.raises(InputError, match="does not parse") as caught:
        ChatFormat.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_template_has_what_templates_on_the_hub_expect(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{{ messages | tojson }}{{ strftime_now('%Y')[:2] }}"
        "{% for n in [1, 2] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}\n"
        "  {% if add_generation_prompt %}\n  go\n  {% endif %}\n{{ eos_token }}"
    )
    chat_format = ChatFormat.load(write_chat_model(tmp_path, template))
    assert chat_format.text([user("é")], add_generation_prompt=True) == (
        '<|im_start|>[{"role": "user", "content": "é"}]201  go\n<|im_end|>'
    )


def test_template_comes_from_the_tokenizer_config_where_there_is_no_file(tmp_path: Path) -> None:
    one = {**TOKENIZER_CONFIG, "chat_template": "only {{ messages[0].content }}"}
    several = {
        **TOKENIZER_CONFIG,
        "chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}],
    }
    texts = [
        ChatFormat.load(write_chat_model(tmp_path / str(number), None, tokenizer_config=config)).text(
            [user("one")], add_generation_prompt=False
        )
        for number, config in enumerate((one, several, TOKENIZER_CONFIG))
    ]
    assert texts == ["only one", "yes", "<|im_start|>user\none<|im_end|>\n"]


# The folder


def test_end_of_turn_may_be_any_of_a_list_in_the_generation_config(tmp_path: Path) -> None:
    folder = write_chat_model(
        tmp_path, config={}, tokenizer_config={}, generation_config={"eos_token_id": [END_OF_TEXT, END]}
    )
    chat_format = ChatFormat.load(folder)
    assert chat_format.stop_tokens == {END_OF_TEXT, END}
    assert learned_text(chat_format, chat_format.render([user("one"), assistant("first")])) == "first<|im_end|>"


@pytest.mark.parametrize(
    ("config", "tokenizer_config"),
    [
        ({"eos_token_id": END}, {}),
        ({}, {"eos_token": "<|im_end|>"}),
        ({}, {"eos_token": {"content": "<|im_end|>", "special": True}}),
    ],
)
def test_end_of_turn_is_found_wherever_it_is_named(
    tmp_path: Path, config: dict[str, Any], tokenizer_config: dict[str, Any]
) -> None:
    folder = write_chat_model(tmp_path, config=config, tokenizer_config=tokenizer_config)
    assert ChatFormat.load(folder).stop_tokens == {END}


@pytest.mark.parametrize("tokenizer_config", [{}, {"eos_token": None}, {"eos_token": "<|unknown|>"}])
def test_folder_without_an_end_of_turn_is_refused(tmp_path: Path, tokenizer_config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no end-of-turn token") as caught:
        ChatFormat.load(write_chat_model(tmp_path, config={}, tokenizer_config=tokenizer_config))
    assert caught.value.hint


def test_folder_without_a_tokenizer_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json"):
        ChatFormat.load(tmp_path)


def test_context_length_and_pad_token_come_from_the_folder(tmp_path: Path) -> None:
    chat_format = ChatFormat.load(write_chat_model(tmp_path / "named"))
    assert (chat_format.context_length, chat_format.pad_token) == (256, END_OF_TEXT)
    bare = ChatFormat.load(write_chat_model(tmp_path / "bare", config={}, tokenizer_config={"eos_token": "<|im_end|>"}))
    assert (bare.context_length, bare.pad_token) == (2048, END)


def test_truncation_and_padding_saved_in_the_tokenizer_are_switched_off(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(ChatFormat.load(folder).encode("0123456789")) == 10
