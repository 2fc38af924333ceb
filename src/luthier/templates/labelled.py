"""THE renderer for text with a label: examples → texts → tokens, for classification and regression.

Nothing is generated here, so the loss mask is False everywhere; what is learned is ``TokenizedExample.label``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from luthier.errors import PROBLEMS_KEPT, InputError, NotFoundError, did_you_mean
from luthier.records.columns import Columns
from luthier.records.example import Example
from luthier.records.record import canonical_json
from luthier.records.template import Template
from luthier.templates.column_values import finite_number, in_parts, read_weights, with_weight
from luthier.templates.handlebars import HandlebarsText
from luthier.templates.renderer import RenderReport, TokenizedExample

DEFAULT_TEXT_FIELD = "text"


@dataclass(frozen=True)
class LabelledText:
    """A text, and what stands in its label column: a class, or the number to predict."""

    example_id: str
    text: str
    label: Any
    weight: float = 1.0


class TextRenderer:
    """Turns examples into plain texts: documents, or what is to be classified.

    An example's text is the template's user text; without a template, the text column; without that, the last message
    of the user, the only field, or the field called ``text``.

    Raises:
        InputError: a column is unknown, or the template does not parse or uses unknown fields.
    """

    def __init__(self, template: Template | None, columns: Columns, fields: Sequence[str]) -> None:
        columns.check(fields)
        self._column = columns.text
        self._default = fields[0] if len(fields) == 1 else DEFAULT_TEXT_FIELD
        self._user = HandlebarsText(template.user, "user template") if template else None
        if self._user:
            self._user.check_fields(fields)

    def text(self, example: Example) -> str:
        """Return an example's text.

        Raises:
            InputError: there is none, or it is not text.
        """
        if self._user:
            return self._user.render(example.fields)
        if self._column is None and example.messages:
            return next((turn.content for turn in reversed(example.messages) if turn.role == "user"), "")
        name = self._column or self._default
        value = example.fields.get(name)
        if not isinstance(value, str):
            found = "no text" if value is None else f"{value!r}, which is no text,"
            raise InputError(
                f"Example {example.id} has {found} in the field {name!r}.", hint="name the text column, or a template"
            )
        return value


def iter_labelled_texts(
    examples: Iterable[Example], renderer: TextRenderer, columns: Columns
) -> Iterator[LabelledText]:
    """Yield the text, label and weight of each example; memory does not grow with their number.

    Raises:
        InputError: no label column is named; a text is wrong; or, once all of them were read, examples without a label
            or with a wrong weight (all at once), or no weight is above 0.
    """
    column = _label_column(examples, columns)

    def read(some: Sequence[Example]) -> list[LabelledText]:
        rows = zip(some, _labels(column, some), read_weights(some, columns.weight), strict=True)
        return [LabelledText(example.id, renderer.text(example), label, weight) for example, label, weight in rows]

    return with_weight(in_parts(examples, read), columns.weight)


def label_names(examples: Iterable[Example], columns: Columns) -> tuple[str, ...]:
    """Return the classes that occur, sorted: a class's index is its place here. Nothing but their names is held.

    Raises:
        InputError: no label column is named, examples have no label (all at once), or there are fewer than two classes.
    """
    labels = in_parts(examples, partial(_labels, _label_column(examples, columns)))
    names = tuple(sorted({_name(label) for label in labels}))
    if len(names) < 2:
        raise InputError(f"Classification needs two classes or more; the labels are: {', '.join(names) or 'none'}.")
    return names


def _label_column(examples: Iterable[Example], columns: Columns) -> str:
    if columns.label is None:
        known = {name for example in examples for name in example.fields}
        raise InputError(f"No label column is named.{did_you_mean('label', known)}")
    return columns.label


def _labels(column: str, examples: Sequence[Example]) -> list[Any]:
    missing = [example.id for example in examples if example.fields.get(column) in (None, "")]
    if missing:
        raise InputError(
            f"{len(missing):,} of {len(examples):,} examples have no label in the field {column!r}.",
            problems=[f"example {example_id} has no {column!r}" for example_id in missing],
            hint="fill the label in, or leave these rows out of the dataset",
        )
    return [example.fields[column] for example in examples]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model folder, without the padding and truncation that it may bring.

    Raises:
        NotFoundError: the folder has no ``tokenizer.json``.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(f"{folder} has no tokenizer.json.")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize_labelled(
    texts: Iterable[LabelledText],
    tokenizer: Tokenizer,
    labels: Sequence[str] | None,
    max_tokens: int,
    *,
    empty: Literal["refuse", "drop"] = "refuse",
) -> tuple[list[TokenizedExample], RenderReport]:
    """Return texts as tokens, and the count of what was left out or cut: see :func:`iter_labelled`."""
    report = RenderReport()
    return list(iter_labelled(texts, tokenizer, labels, max_tokens, report, empty=empty)), report


def iter_labelled(
    texts: Iterable[LabelledText],
    tokenizer: Tokenizer,
    labels: Sequence[str] | None,
    max_tokens: int,
    report: RenderReport,
    *,
    empty: Literal["refuse", "drop"] = "refuse",
) -> Iterator[TokenizedExample]:
    """Yield texts as tokens with the tokenizer's special tokens, and labels as indexes or numbers, one by one.

    Memory does not grow with their number. A text that is too long loses its end, but not its special tokens ([CLS],
    [SEP]), and is counted as truncated.

    Args:
        texts: What is to be classified.
        tokenizer: From :func:`load_tokenizer`: one without padding and truncation of its own.
        labels: The classes, in the order of their indexes; None for regression, where a label is a number.
        max_tokens: The most tokens of an example, special ones included.
        report: Counts, as they become known, texts and what was left out or cut.
        empty: What happens to texts that are nothing but white space.

    Raises:
        InputError: ``max_tokens`` leaves no room for text; or, once all of them were read, labels that are not among
            the classes, or no finite numbers, or empty texts that are refused (all at once), or nothing is left.
    """
    room = max_tokens - tokenizer.num_special_tokens_to_add(is_pair=False)
    if room < 1:
        raise InputError(f"max_tokens = {max_tokens} leaves no room for text between the tokenizer's special tokens.")
    index_of = None if labels is None else {name: index for index, name in enumerate(labels)}
    return _iter_labelled(texts, tokenizer, index_of, room, report, empty)


def _iter_labelled(
    texts: Iterable[LabelledText],
    tokenizer: Tokenizer,
    index_of: dict[str, int] | None,
    room: int,
    report: RenderReport,
    empty: Literal["refuse", "drop"],
) -> Iterator[TokenizedExample]:
    refused = 0
    problems: list[str] = []
    for text in texts:
        is_empty, label = not text.text.strip(), _read_label(text.label, index_of)
        if is_empty and empty == "drop":
            report.dropped["empty_text"] += 1
        elif is_empty or label is None:
            refused += 1
            if len(problems) < PROBLEMS_KEPT:
                found = [_label_problem(text.label, index_of)] if label is None else []
                found += ["the text is empty"] if is_empty else []
                problems += [f"example {text.example_id}: {problem}" for problem in found]
        elif not refused:
            report.rendered += 1
            tokens = _encode(text.text, tokenizer, room, report)
            yield TokenizedExample(text.example_id, tokens, [False] * len(tokens), text.weight, label)
    if refused:
        raise InputError(f"{refused:,} texts cannot be learned from.", problems=problems)
    if not report.rendered:
        raise report.nothing_left("text")


def _read_label(value: Any, index_of: dict[str, int] | None) -> float | None:
    """Return the number that is learned for a label; None where there is none."""
    if index_of is not None:
        return index_of.get(_name(value))
    try:
        return finite_number(value)
    except ValueError:
        return None


def _label_problem(value: Any, index_of: dict[str, int] | None) -> str:
    if index_of is None:
        return f"the label {value!r} is not a finite number"
    name = _name(value)
    return f"the label {name!r} is unknown.{did_you_mean(name, index_of)}"


def _name(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value)


def _encode(text: str, tokenizer: Tokenizer, room: int, report: RenderReport) -> list[int]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if len(encoding.ids) > room:
        encoding.truncate(room)
        report.truncated += 1
    return list(tokenizer.post_process(encoding, None, True).ids)
