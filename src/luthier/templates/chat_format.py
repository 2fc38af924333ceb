"""THE renderer, second half: messages → tokens and loss mask, in a base model's own chat format.

Training, evaluation and serving all come through here, so that a model is asked exactly as it was trained.
A chat format is read from a model folder (``tokenizer.json``, ``chat_template.jinja`` …) with the ``tokenizers``
package and Jinja's sandbox; torch and transformers are not needed.

The mask is not guessed from special strings. For every assistant turn the conversation up to it is rendered with
and without the turn; what the turn adds is its span. Each span is tokenised by itself, because at inference the
model continues from a prompt that was tokenised by itself. Loss falls on the answer and on its end-of-turn token,
and on nothing behind it: the model never has to produce that.

What a message says never becomes a special token: a content with ``<|im_end|>`` in it is that text, and ends no turn
(:mod:`luthier.templates.plain_content`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from luthier.errors import InputError, NotFoundError
from luthier.records.example import Message, Tool
from luthier.templates.plain_content import PlainContent
from luthier.templates.token_bytes import TokenBytes
from luthier.templates.tool_formats import ToolFormat, mentions_tools, template_message, tool_format_of, use_tools

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as tokens.

    ``loss_mask[i]`` says that ``tokens[i]`` is to be predicted with loss. ``prompt_tokens`` counts the tokens
    before the final answer. ``open_ends`` are the places behind answers with loss that do not end in a stop token.
    """

    tokens: list[int]
    loss_mask: list[bool]
    prompt_tokens: int
    open_ends: tuple[int, ...] = ()

    @property
    def has_end_of_turn(self) -> bool:
        """Whether every answer with loss ends in a stop token."""
        return not self.open_ends

    @property
    def loss_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(self.loss_mask)


@dataclass(frozen=True)
class ChatFormat:
    """How one base model writes a conversation. Make it with :meth:`load`.

    ``tool_template`` renders conversations with tools; None where the model's template knows none. ``tool_format`` is
    how its answers write calls, where that is known. ``token_bytes`` has what each token adds to a text, for tokenizers
    whose tokens do not depend on each other; ``special_ids`` are those that an answer's text leaves out.
    """

    tokenizer: Tokenizer
    template: Template
    special_tokens: dict[str, str]
    stop_tokens: frozenset[int]
    context_length: int
    pad_token: int
    tool_template: Template | None = None
    tool_format: ToolFormat | None = None
    plain_content: PlainContent = field(default_factory=PlainContent)
    token_bytes: TokenBytes | None = None
    special_ids: frozenset[int] = frozenset()

    @classmethod
    def load(cls, folder: Path) -> ChatFormat:
        """Read the chat format of a model folder.

        Raises:
            NotFoundError: the folder has no ``tokenizer.json``.
            InputError: no end-of-turn token can be found, or the chat template does not parse.
        """
        if not (folder / "tokenizer.json").is_file():
            raise NotFoundError(f"{folder} has no tokenizer.json, which a chat format needs.")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_json(folder / "config.json")
        tokenizer_config = _read_json(folder / "tokenizer_config.json")
        special = {
            key: value if isinstance(value, str) else value["content"]
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (value := tokenizer_config.get(key))
        }
        stop_tokens = _stop_tokens(tokenizer, special, config, _read_json(folder / "generation_config.json"))
        if not stop_tokens:
            raise InputError(
                f"The tokenizer in {folder} has no end-of-turn token: neither generation_config.json, config.json nor "
                "tokenizer_config.json names an eos token, so a tuned model could never stop.",
                hint='add "eos_token" to tokenizer_config.json',
            )
        pad = tokenizer.token_to_id(special["pad_token"]) if "pad_token" in special else None
        sources = _template_sources(folder, tokenizer_config)
        with_tools = sources.get("tool_use", sources["default"])
        knows_tools = _compiles(with_tools) and mentions_tools(_sandbox(), with_tools)
        return cls(
            tokenizer=tokenizer,
            template=_compile(sources["default"], folder),
            special_tokens=special,
            stop_tokens=frozenset(stop_tokens),
            context_length=int(config.get("max_position_embeddings") or 2048),
            pad_token=pad if pad is not None else min(stop_tokens),
            tool_template=_compile(with_tools, folder) if knows_tools else None,
            tool_format=tool_format_of(with_tools) if knows_tools else None,
            plain_content=PlainContent(tokenizer, stop_tokens),
            token_bytes=TokenBytes.of(tokenizer),
            special_ids=frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special),
        )

    @property
    def end_of_text(self) -> int:
        """The token that ends a document: the tokenizer's end-of-sequence token, or the first stop token."""
        token = self.tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        return min(self.stop_tokens) if token is None else token

    def text(self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, add_generation_prompt: bool) -> str:
        """Return messages as the model's text, with or without the opening of the next answer.

        Raises:
            InputError: the chat template refuses the messages (roles that do not alternate, say), or knows no tools.
        """
        return self.plain_content.shown(self._rendered(messages, tools, add_generation_prompt))

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Tool], add_generation_prompt: bool) -> str:
        """Return messages as the model's text, with stand-ins for the special tokens that they contain."""
        uses_tools = bool(tools) or use_tools(messages)
        if uses_tools and self.tool_template is None:
            raise InputError("The chat template of this model knows no tools, and the conversation uses them.")
        template = self.tool_template if uses_tools and self.tool_template is not None else self.template
        short_ids = self.tool_format is not None and self.tool_format.short_ids
        keep = self.plain_content.kept
        try:
            return template.render(
                messages=[keep(template_message(message, short_ids=short_ids)) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **({"tools": keep(list(tools))} if tools else {}),
                **self.special_tokens,
            )
        except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise InputError(f"The chat template of the base model refuses these messages: {error}") from error

    def prompt_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Return the tokens from which the model answers."""
        return self._encode_rendered(self._rendered(messages, tools, add_generation_prompt=True))

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> RenderedConversation:
        """Return a conversation's tokens and loss mask; see the module's text for the rule.

        Raises:
            InputError: the chat template rewrites earlier turns, so that no mask can be right.
        """
        tokens: list[int] = []
        mask: list[bool] = []
        done = ""
        prompt_length = 0
        open_ends: list[int] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._rendered(messages[:index], tools, add_generation_prompt=True)
            after = self._rendered(messages[: index + 1], tools, add_generation_prompt=False)
            if not before.startswith(done) or not after.startswith(before):
                raise InputError(
                    f"The chat template rewrites earlier turns at message {index + 1}, so no loss mask can be computed."
                )
            context = self._encode_rendered(before[len(done) :])
            answer = self._encode_rendered(after[len(before) :])
            end = next((i for i, token in enumerate(answer) if token in self.stop_tokens), None)
            learned = (len(answer) if end is None else end + 1) if message.weight else 0
            prompt_length = len(tokens) + len(context)
            tokens += context + answer
            if end is None and message.weight:
                open_ends.append(len(tokens))
            mask += [False] * len(context) + [i < learned for i in range(len(answer))]
            done = after
        return RenderedConversation(tokens, mask, prompt_length, tuple(open_ends))

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens without adding any special token of the tokenizer's own."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_rendered(self, text: str) -> list[int]:
        tokens = self.plain_content.encode(text)
        return self.encode(text) if tokens is None else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer's tokens, up to its end-of-turn token and without special tokens."""
        end = next((i for i, token in enumerate(tokens) if token in self.stop_tokens), len(tokens))
        return str(self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True))


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _template_sources(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates by name; there is always a "default" one."""
    if (folder / "chat_template.jinja").is_file():
        return {"default": (folder / "chat_template.jinja").read_text("utf-8")}
    template = tokenizer_config.get("chat_template")
    named = {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else {}
    return {"default": (template if isinstance(template, str) else None) or PLAIN_TEMPLATE} | named


def _compiles(source: str) -> bool:
    try:
        _sandbox().parse(source)
    except TemplateError:
        return False
    return True


def _stop_tokens(tokenizer: Tokenizer, special: dict[str, str], *configs: dict[str, Any]) -> set[int]:
    stops: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        stops |= set(value) if isinstance(value, list) else {value} if value is not None else set()
    if "eos_token" in special and (token := tokenizer.token_to_id(special["eos_token"])) is not None:
        stops.add(token)
    return stops


def _compile(source: str, folder: Path) -> Template:
    try:
        return _sandbox().from_string(source)
    except TemplateError as error:
        raise InputError(f"The chat template in {folder} does not parse: {error}") from error


def _sandbox() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension])
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, indent=options.get("indent")
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().astimezone().strftime(pattern)
    return environment


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
