"""THE renderer for text with a label: examples → texts → tokens, for classification and regression.

Nothing is generated here, so the loss mask is False everywhere; what is learned is ``TokenizedExample.label``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from luthier.errors import InputError, NotFoundError, did_you_mean
from luthier.records.columns import Columns
from luthier.records.example import Example
from luthier.records.record import canonical_json
from luthier.records.template import Template
from luthier.templates.column_values import finite_number, read_weights
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


def labelled_texts(examples: Sequence[Example], renderer: TextRenderer, columns: Columns) -> list[LabelledText]:
    """Return the text, label and weight of each example.

    Raises:
        InputError: no label column is named, examples without a label (all at once), or a text or weight is wrong.
    """
    column = columns.label
    if column is None:
        known = sorted({name for example in examples for name in example.fields})
        raise InputError(f"No label column is named.{did_you_mean('label', known)}")
    missing = [example.id for example in examples if example.fields.get(column) in (None, "")]
    if missing:
        raise InputError(
            f"{len(missing):,} of {len(examples):,} examples have no label in the field {column!r}.",
            problems=[f"example {example_id} has no {column!r}" for example_id in missing],
            hint="fill the label in, or leave these rows out of the dataset",
        )
    weights = read_weights(examples, columns.weight)
    return [
        LabelledText(example.id, renderer.text(example), example.fields[column], weight)
        for example, weight in zip(examples, weights, strict=True)
    ]


def label_names(texts: Iterable[LabelledText]) -> tuple[str, ...]:
    """Return the classes that occur, sorted: a class's index is its place here.

    Raises:
        InputError: there are fewer than two.
    """
    names = tuple(sorted({_name(text.label) for text in texts}))
    if len(names) < 2:
        raise InputError(f"Classification needs two classes or more; the labels are: {', '.join(names) or 'none'}.")
    return names


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
    """Return texts as tokens with the tokenizer's special tokens, and labels as indexes or numbers.

    A text that is too long loses its end, but not its special tokens ([CLS], [SEP]), and is counted as truncated.

    Args:
        texts: What is to be classified.
        tokenizer: From :func:`load_tokenizer`: one without padding and truncation of its own.
        labels: The classes, in the order of their indexes; None for regression, where a label is a number.
        max_tokens: The most tokens of an example, special ones included.
        empty: What happens to texts that are nothing but white space.

    Raises:
        InputError: labels that are not among the classes, or no finite numbers, or empty texts that are refused, all at
            once; ``max_tokens`` leaves no room for text; or nothing is left.
    """
    room = max_tokens - tokenizer.num_special_tokens_to_add(is_pair=False)
    if room < 1:
        raise InputError(f"max_tokens = {max_tokens} leaves no room for text between the tokenizer's special tokens.")
    index_of = None if labels is None else {name: index for index, name in enumerate(labels)}
    report = RenderReport()
    kept: list[TokenizedExample] = []
    problems: list[str] = []
    for text in texts:
        label, problem = _read_label(text.label, index_of)
        if not text.text.strip() and empty == "drop":
            report.dropped["empty_text"] += 1
            continue
        problems += [f"example {text.example_id}: {p}" for p in (problem, _text_problem(text.text)) if p]
        if not problems:
            tokens = _encode(text.text, tokenizer, room, report)
            kept.append(TokenizedExample(text.example_id, tokens, [False] * len(tokens), text.weight, label))
    if problems:
        raise InputError("Some texts cannot be learned from.", problems=problems)
    if not kept:
        raise report.nothing_left("text")
    report.rendered = len(kept)
    return kept, report


def _read_label(value: Any, index_of: dict[str, int] | None) -> tuple[float, str | None]:
    if index_of is not None:
        name = _name(value)
        problem = None if name in index_of else f"the label {name!r} is unknown.{did_you_mean(name, index_of)}"
        return float(index_of.get(name, 0)), problem
    try:
        return finite_number(value), None
    except ValueError:
        return 0.0, f"the label {value!r} is not a finite number"


def _text_problem(text: str) -> str | None:
    return None if text.strip() else "the text is empty"


def _name(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value)


def _encode(text: str, tokenizer: Tokenizer, room: int, report: RenderReport) -> list[int]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if len(encoding.ids) > room:
        encoding.truncate(room)
        report.truncated += 1
    return list(tokenizer.post_process(encoding, None, True).ids)
