"""THE renderer, first half: examples → messages; and the whole way from examples to what a model trains on.

What cannot be learned is never passed on in silence: an example whose loss mask is empty, which lacks its end of
turn, or which is longer than the context is refused, left out or (if too long) truncated, as the user chose, and
counted. Raw text is in :mod:`luthier.templates.raw_text`, text with a label in :mod:`luthier.templates.labelled`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

from pydantic import Field

from luthier.errors import PROBLEMS_KEPT, InputError, NothingToLearnError
from luthier.records.columns import Columns
from luthier.records.example import Conversation, Example, Message, Tool
from luthier.records.record import Record
from luthier.records.template import Template
from luthier.templates.chat_format import ChatFormat, RenderedConversation
from luthier.templates.column_values import in_parts, read_margins, read_thumbs, read_weights, with_weight
from luthier.templates.handlebars import HandlebarsText

T = TypeVar("T")
Problem = Literal["empty_mask", "missing_end_of_turn", "too_long", "equal_answers"]
PROBLEM_TEXTS: dict[str, str] = {
    "empty_mask": "no token carries loss (an empty answer, or every answer has weight 0)",
    "missing_end_of_turn": "the chat format does not end the answer with a stop token, so the model would never stop",
    "too_long": "longer than the limit",
    "equal_answers": "the preferred and the rejected answer are equal, so there is nothing to prefer",
}


class RenderPolicy(Record):
    """What happens to an example that cannot be learned as it is.

    ``refuse`` stops with an error that lists them; ``drop`` leaves them out; ``truncate`` shortens the longest
    prompt message from its end until the example fits ``max_tokens``: the chat format stays whole, and no answer is
    ever cut; ``append`` adds the end-of-turn token to every answer that lacks it. Both sides of a pair get the same
    shortened prompt.
    """

    max_tokens: int = Field(gt=1)
    too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    empty_mask: Literal["refuse", "drop"] = "refuse"
    missing_end_of_turn: Literal["refuse", "drop", "append"] = "refuse"
    equal_answers: Literal["refuse", "drop"] = "refuse"


@dataclass(frozen=True)
class TokenizedExample:
    """An example ready for training: ``tokens`` and, of equal length, ``loss_mask``.

    ``label`` is the index of a class, the number to predict, or 1.0 / 0.0 for an answer that was liked or not.
    """

    example_id: str
    tokens: list[int]
    loss_mask: list[bool]
    weight: float = 1.0
    label: float | None = None


@dataclass(frozen=True)
class TokenizedPair:
    """Two answers to one prompt, ready for training: whole conversations, with loss on the final answer alone.

    ``margin`` is by how much the chosen answer is better.
    """

    example_id: str
    chosen: TokenizedExample
    rejected: TokenizedExample
    weight: float = 1.0
    margin: float = 0.0


Unit = TokenizedExample | TokenizedPair
"""What a batch counts, an order shuffles and a validation holds out."""


def sides_of(unit: Unit) -> tuple[TokenizedExample, ...]:
    """Return what goes through a model for a unit: itself, or both answers of a pair."""
    return (unit.chosen, unit.rejected) if isinstance(unit, TokenizedPair) else (unit,)


def tokens_of(unit: Unit) -> int:
    """Return how many tokens a unit has, as if nothing were shared or padded."""
    return sum(len(side.tokens) for side in sides_of(unit))


@dataclass
class RenderReport:
    """What was rendered, dropped, truncated or repaired."""

    rendered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    appended: int = 0

    def nothing_left(self, what: str) -> NothingToLearnError:
        """Return the error that says why there is not one text or example left."""
        problems = [f"{reason}: {count}" for reason, count in self.dropped.items()]
        return NothingToLearnError(f"No {what} is left to learn from.", problems=problems)


class TemplateRenderer:
    """Turns examples into conversations with one template (None: the examples are conversations already).

    Raises:
        InputError: a text does not parse, or uses a field that is not in ``fields``.
    """

    def __init__(self, template: Template | None, fields: Sequence[str]) -> None:
        self._texts: dict[Literal["system", "user", "assistant"], HandlebarsText] = {}
        self._rejected: HandlebarsText | None = None
        self._known_fields = tuple(fields)
        if template is None:
            return
        if template.system is not None:
            self._texts["system"] = HandlebarsText(template.system, "system template")
        self._texts["user"] = HandlebarsText(template.user, "user template")
        self._texts["assistant"] = HandlebarsText(template.assistant, "assistant template")
        if template.rejected is not None:
            self._rejected = HandlebarsText(template.rejected, "rejected template")
        for text in self._all_texts():
            text.check_fields(fields)

    @property
    def fields(self) -> frozenset[str]:
        """The fields that the template uses."""
        return frozenset().union(*(text.fields for text in self._all_texts()))

    def _all_texts(self) -> list[HandlebarsText]:
        return [*self._texts.values(), *([self._rejected] if self._rejected else [])]

    def conversation(self, example: Example) -> Conversation:
        """Return an example as messages.

        Raises:
            InputError: the example has neither messages nor a template to make them, or a text fails on it.
        """
        if example.messages is not None:
            return Conversation(
                example_id=example.id, messages=example.messages, rejected=example.rejected, tools=example.tools
            )
        if not self._texts:
            raise InputError(
                f"Example {example.id} has fields but no messages, so a template is needed.",
                hint="make one with: luthier template save NAME --user '{{text}}' --assistant '{{label}}'",
            )
        messages = [Message(role=role, content=text.render(example.fields)) for role, text in self._texts.items()]
        rejected = self._rejected and (Message(role="assistant", content=self._rejected.render(example.fields)),)
        return Conversation(example_id=example.id, messages=tuple(messages), rejected=rejected)

    def conversations(self, examples: Sequence[Example], columns: Columns) -> list[Conversation]:
        """Return examples as messages, with the weight, margin and thumb that their columns say.

        Raises:
            InputError: as :meth:`conversation`; or a column is unknown, or a value in it breaks its rule (all at once).
        """
        return list(self.iter_conversations(examples, columns))

    def iter_conversations(self, examples: Iterable[Example], columns: Columns) -> Iterator[Conversation]:
        """Yield examples as :meth:`conversations` returns them; memory does not grow with their number.

        What breaks a rule is known, and raised, once all of them were read.
        """
        columns.check(self._known_fields)
        return with_weight(in_parts(examples, partial(self._part, columns)), columns.weight)

    def _part(self, columns: Columns, examples: Sequence[Example]) -> list[Conversation]:
        weights = read_weights(examples, columns.weight)
        margins = read_margins(examples, columns.margin)
        thumbs = read_thumbs(examples, columns.thumb)
        return [
            self.conversation(example).model_copy(update={"weight": weight, "margin": margin, "thumb": thumb})
            for example, weight, margin, thumb in zip(examples, weights, margins, thumbs, strict=True)
        ]


def tokenize(
    conversations: Iterable[Conversation], chat_format: ChatFormat, policy: RenderPolicy
) -> tuple[list[TokenizedExample], RenderReport]:
    """Return what a model trains on, and the count of what was left out or changed.

    Raises:
        InputError: examples that cannot be learned where the policy refuses them, all at once; or nothing is left.
    """
    report = RenderReport()
    return list(iter_tokenized(conversations, chat_format, policy, report)), report


def iter_tokenized(
    conversations: Iterable[Conversation], chat_format: ChatFormat, policy: RenderPolicy, report: RenderReport
) -> Iterator[TokenizedExample]:
    """Yield what a model trains on, one by one, and count in ``report``; memory does not grow with their number.

    Raises:
        InputError: as :func:`tokenize`, once all of them were read.
    """

    def read(conversation: Conversation, report: RenderReport) -> TokenizedExample | Problem:
        sides = _tokenize_sides([conversation.messages], conversation.tools, chat_format, policy, report)
        if isinstance(sides, str):
            return sides
        return TokenizedExample(conversation.example_id, *sides[0], conversation.weight)

    return _iter_tokenized(conversations, read, policy, report)


def iter_pairs(
    conversations: Iterable[Conversation], chat_format: ChatFormat, policy: RenderPolicy, report: RenderReport
) -> Iterator[TokenizedPair]:
    """Yield the pairs of answers that a model learns to prefer between; memory does not grow with their number.

    Both sides start with the same tokens: the prompt, which is shortened for both where one is too long.

    Raises:
        InputError: as :func:`tokenize`, or conversations without a rejected answer, once all of them were read.
    """

    def read(pair: Conversation, report: RenderReport) -> TokenizedPair | Problem:
        rejected = pair.rejected or ()
        if [_said(turn) for turn in rejected] == [_said(pair.messages[-1])]:
            return "equal_answers"
        answers = (pair.messages[-1:], rejected)
        both = [pair.ending_in(answer) for answer in answers]
        sides = _tokenize_sides(both, pair.tools, chat_format, policy, report)
        if isinstance(sides, str):
            return sides
        chosen, worse = (TokenizedExample(pair.example_id, *side, pair.weight) for side in sides)
        return TokenizedPair(pair.example_id, chosen, worse, pair.weight, pair.margin)

    pairs = _those_with(
        conversations,
        lambda pair: bool(pair.rejected),
        "no rejected answer",
        hint="import preferences, or give the template one: luthier template save NAME --rejected '{{worse}}' …",
    )
    return _iter_tokenized(pairs, read, policy, report)


def iter_thumbs(
    conversations: Iterable[Conversation],
    chat_format: ChatFormat,
    policy: RenderPolicy,
    report: RenderReport,
    *,
    both: bool = True,
) -> Iterator[TokenizedExample]:
    """Yield answers with the label 1.0 (liked) or 0.0 (not), and loss on the final answer alone, one by one.

    ``both`` refuses thumbs that are all the same: they can be measured, but not learned from.

    Raises:
        InputError: as :func:`tokenize`, conversations without a thumb, or all thumbs that are left are the same, once
            all of them were read.
    """

    def read(answer: Conversation, report: RenderReport) -> TokenizedExample | Problem:
        whole = answer.ending_in(answer.messages[-1:])
        sides = _tokenize_sides([whole], answer.tools, chat_format, policy, report)
        if isinstance(sides, str):
            return sides
        return TokenizedExample(answer.example_id, *sides[0], answer.weight, float(bool(answer.thumb)))

    answers = _those_with(
        conversations,
        lambda answer: answer.thumb is not None,
        "no thumb",
        hint="name the column that says whether an answer was liked",
    )
    kinds: set[float | None] = set()
    for example in _iter_tokenized(answers, read, policy, report):
        kinds.add(example.label)
        yield example
    if both and len(kinds) == 1:
        which = "up" if kinds == {1.0} else "down"
        raise InputError(
            f"All {report.rendered:,} thumbs are {which}; learning from thumbs needs both.",
            hint="add answers with the other thumb, or train on the liked answers alone",
        )


Side = tuple[list[int], list[bool]]
"""The tokens of a whole conversation up to its last one with loss, and their loss mask."""


def _iter_tokenized(
    conversations: Iterable[Conversation],
    read: Callable[[Conversation, RenderReport], T | Problem],
    policy: RenderPolicy,
    report: RenderReport,
) -> Iterator[T]:
    refused = 0
    problems: list[str] = []
    for conversation in conversations:
        made = read(conversation, report)
        if not isinstance(made, str):
            report.rendered += 1
            yield made
        elif getattr(policy, made) == "refuse":
            refused += 1
            if len(problems) < PROBLEMS_KEPT:
                problems.append(f"example {conversation.example_id}: {PROBLEM_TEXTS[made]}")
        else:
            report.dropped[made] += 1
    if refused:
        raise InputError(
            f"{refused:,} examples cannot be learned as they are (limit {policy.max_tokens} tokens).",
            problems=problems,
            hint="mend them, or choose drop (or truncate, for too long ones) in the training options",
        )
    if not report.rendered:
        raise report.nothing_left("example")


def _those_with(
    conversations: Iterable[Conversation], has: Callable[[Conversation], bool], what: str, hint: str
) -> Iterator[Conversation]:
    """Yield the conversations that have something; those without it are refused once all were read."""
    missing = 0
    problems: list[str] = []
    for conversation in conversations:
        if has(conversation):
            yield conversation
            continue
        missing += 1
        if len(problems) < PROBLEMS_KEPT:
            problems.append(f"example {conversation.example_id} has {what}")
    if missing:
        raise InputError(f"{missing:,} examples have {what}.", problems=problems, hint=hint)


def _tokenize_sides(
    sides: Sequence[Sequence[Message]],
    tools: Sequence[Tool],
    chat_format: ChatFormat,
    policy: RenderPolicy,
    report: RenderReport,
) -> list[Side] | Problem:
    """Return the tokens and mask of conversations that differ in their last message alone."""
    if not all(any(_is_learned(turn) for turn in messages) for messages in sides):
        return "empty_mask"
    rendered = [chat_format.render(messages, tools) for messages in sides]
    if not all(one.loss_tokens for one in rendered):
        return "empty_mask"
    appended = max(len(one.open_ends) for one in rendered)
    if appended and policy.missing_end_of_turn != "append":
        return "missing_end_of_turn"
    room = policy.max_tokens - appended
    truncated = max(map(_learned_length, rendered)) > room
    if truncated:
        shorter = _shorten(sides, tools, chat_format, room) if policy.too_long == "truncate" else None
        if shorter is None:
            return "too_long"
        rendered = shorter
    report.appended += appended > 0
    report.truncated += truncated
    return [_learned_part(one, chat_format) for one in rendered]


def _is_learned(turn: Message) -> bool:
    return turn.role == "assistant" and bool(turn.weight) and turn.says_something


def _said(turn: Message) -> tuple[str, list[tuple[str, str]]]:
    return turn.content.strip(), [(call.name, call.arguments) for call in turn.tool_calls]


def _learned_part(rendered: RenderedConversation, chat_format: ChatFormat) -> Side:
    # What follows the last learned token teaches nothing.
    length = _learned_length(rendered)
    tokens, mask = rendered.tokens[:length], rendered.loss_mask[:length]
    for end in reversed(rendered.open_ends):  # the places before it stay where they are
        if end <= length:
            tokens.insert(end, min(chat_format.stop_tokens))
            mask.insert(end, True)
    return tokens, mask


def _learned_length(rendered: RenderedConversation) -> int:
    return max(index for index, learned in enumerate(rendered.loss_mask) if learned) + 1


def _shorten(
    sides: Sequence[Sequence[Message]], tools: Sequence[Tool], chat_format: ChatFormat, max_tokens: int
) -> list[RenderedConversation] | None:
    """Shorten the longest message of the prompt from its end, in all sides alike, until each of them fits.

    None where even an empty one does not.
    """
    prompt = sides[0][:-1]
    sizes = {i: len(chat_format.encode(turn.content)) for i, turn in enumerate(prompt) if turn.role != "assistant"}
    if not sizes:
        return None
    longest = max(sizes, key=lambda i: sizes[i])
    content = chat_format.encode(prompt[longest].content)
    while True:
        # A character of several tokens that was cut in two decodes to U+FFFD at the end.
        text = chat_format.tokenizer.decode(content, skip_special_tokens=False).rstrip("\ufffd")
        message = prompt[longest].model_copy(update={"content": text})
        rendered = [chat_format.render([*side[:longest], message, *side[longest + 1 :]], tools) for side in sides]
        excess = max(map(_learned_length, rendered)) - max_tokens
        if excess <= 0:
            return rendered
        if not content:
            return None
        content = content[: max(0, len(content) - excess)]
