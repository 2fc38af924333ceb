"""Templates: save one, and see what it makes of real rows, down to the tokens that carry loss."""

from __future__ import annotations

from luthier.errors import LuthierError
from luthier.records.example import Message
from luthier.records.record import Record
from luthier.records.template import Template, TemplateVersion
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat
from luthier.templates.renderer import TemplateRenderer


class TokenPiece(Record):
    """One token's text, and whether it carries loss."""

    text: str
    learned: bool


class Preview(Record):
    """What one example becomes: messages, tokens, and what would keep it from being learned."""

    example_id: str
    messages: tuple[Message, ...] = ()
    pieces: tuple[TokenPiece, ...] = ()
    problem: str | None = None


def save_template(store: Store, name: str, template: Template) -> TemplateVersion:
    """Save a template; equal texts give the version that is there already.

    Raises:
        InputError: a text is not valid handlebars, or the name breaks its rule.
    """
    TemplateRenderer(template, fields=_fields_of(template))
    return store.templates.add(name, template)


def preview(store: Store, dataset: str, template: Template | None, base: str, *, rows: int = 3) -> list[Preview]:
    """Render a dataset's first rows with a template, in a base model's own chat format.

    Raises:
        NotFoundError: the dataset or the base model is not there.
        InputError: the template uses fields that the dataset does not have.
    """
    version = store.datasets.get(dataset)
    renderer = TemplateRenderer(template, version.fields)
    chat_format = ChatFormat.load(store.models.base_folder(store.models.base(base)))
    shown: list[Preview] = []
    for example in store.datasets.examples(version):
        if len(shown) == rows:
            break
        try:
            messages = renderer.conversation(example).messages
            shown.append(_preview(example.id, messages, chat_format))
        except LuthierError as error:
            shown.append(Preview(example_id=example.id, problem=str(error)))
    return shown


def _preview(example_id: str, messages: tuple[Message, ...], chat_format: ChatFormat) -> Preview:
    rendered = chat_format.render(messages)
    problem = None
    if rendered.loss_tokens == 0:
        problem = "no token carries loss"
    elif not rendered.has_end_of_turn:
        problem = "an answer does not end in a stop token"
    elif len(rendered.tokens) > chat_format.context_length:
        problem = f"{len(rendered.tokens)} tokens are more than the context of {chat_format.context_length}"
    decode = chat_format.tokenizer.decode
    pieces = tuple(
        TokenPiece(text=decode([token], skip_special_tokens=False), learned=learned)
        for token, learned in zip(rendered.tokens, rendered.loss_mask, strict=True)
    )
    return Preview(example_id=example_id, messages=messages, pieces=pieces, problem=problem)


def _fields_of(template: Template) -> list[str]:
    from luthier.templates.handlebars import HandlebarsText

    texts = [text for text in (template.system, template.user, template.assistant) if text is not None]
    return sorted(frozenset().union(*(HandlebarsText(text).fields for text in texts)))
