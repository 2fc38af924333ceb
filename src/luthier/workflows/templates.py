"""Templates: save one, and see what it makes of real rows, down to the tokens that carry loss."""

from __future__ import annotations

from luthier.errors import LuthierError
from luthier.records.example import Conversation, Message
from luthier.records.record import Record
from luthier.records.template import Template, TemplateVersion
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat, RenderedConversation
from luthier.templates.renderer import TemplateRenderer
from luthier.workflows.models import decoder


class TokenPiece(Record):
    """One token's text, and whether it carries loss."""

    text: str
    learned: bool


class Preview(Record):
    """What one example becomes: messages, tokens, and what would keep it from being learned.

    ``pieces`` is the conversation; of a pair, with the preferred answer. ``rejected`` is it with the worse answer.
    """

    example_id: str
    messages: tuple[Message, ...] = ()
    pieces: tuple[TokenPiece, ...] = ()
    rejected: tuple[TokenPiece, ...] = ()
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
        InputError: the template uses fields that the dataset does not have, or the base model is an encoder.
    """
    version = store.datasets.get(dataset)
    renderer = TemplateRenderer(template, version.fields)
    chat_format = ChatFormat.load(store.models.base_folder(decoder(store, base)))
    shown: list[Preview] = []
    for example in store.datasets.examples(version):
        if len(shown) == rows:
            break
        try:
            shown.append(_preview(renderer.conversation(example), chat_format))
        except LuthierError as error:
            shown.append(Preview(example_id=example.id, problem=str(error)))
    return shown


def _preview(conversation: Conversation, chat_format: ChatFormat) -> Preview:
    sides = [conversation.messages]
    if conversation.rejected:
        sides = [conversation.ending_in(answer) for answer in (conversation.messages[-1:], conversation.rejected)]
    rendered = [chat_format.render(messages, conversation.tools) for messages in sides]
    pieces = [_pieces(side, chat_format) for side in rendered]
    return Preview(
        example_id=conversation.example_id,
        messages=conversation.messages,
        pieces=pieces[0],
        rejected=pieces[1] if len(pieces) > 1 else (),
        problem=next((problem for side in rendered if (problem := _problem(side, chat_format))), None),
    )


def _problem(rendered: RenderedConversation, chat_format: ChatFormat) -> str | None:
    if rendered.loss_tokens == 0:
        return "no token carries loss"
    if not rendered.has_end_of_turn:
        return "an answer does not end in a stop token"
    if len(rendered.tokens) > chat_format.context_length:
        return f"{len(rendered.tokens)} tokens are more than the context of {chat_format.context_length}"
    return None


def _pieces(rendered: RenderedConversation, chat_format: ChatFormat) -> tuple[TokenPiece, ...]:
    decode = chat_format.tokenizer.decode
    return tuple(
        TokenPiece(text=decode([token], skip_special_tokens=False), learned=learned)
        for token, learned in zip(rendered.tokens, rendered.loss_mask, strict=True)
    )


def _fields_of(template: Template) -> list[str]:
    from luthier.templates.handlebars import HandlebarsText

    texts = (template.system, template.user, template.assistant, template.rejected)
    return sorted(frozenset().union(*(HandlebarsText(text).fields for text in texts if text is not None)))
