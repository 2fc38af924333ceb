"""Reads a label out of what a model wrote, and finds out whether a task has labels at all.

In: texts and the labels of a task. Out: one of the labels, exactly as it is spelled there, or None.

A base model says "The sentiment is **Positive**." where a tuned one says "positive". Comparing them by exact text
would measure manners, so texts and labels are folded before they are compared, the gentlest way first:

1. as they are, without white space around them;
2. Unicode form (NFKC), case, runs of white space, and quotes, brackets or full stops around the text folded;
3. everything but letters and digits folded into spaces ("card_arrival" = "Card-arrival").

A folding counts only where all labels stay different from each other and keep the signs that make their meaning: labels
such as "C" and "C++", "-1" and "1" or ">50K" and "<=50K" are never folded the third way.

Known limit: a negated label ("not positive") reads as the label.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from luthier.records.evaluation import TaskKind

MAX_LABELS = 100
MIN_USES_PER_LABEL = 3
MAX_LABEL_WORDS = 5
MAX_LABEL_CHARACTERS = 60

Fold = Callable[[str], str]

_AROUND = " \t\n.,;:!?\"'`*_()[]{}“”‘’„«»…。！？"
_SIGN_AT_AN_EDGE = re.compile(rf"^[^\w{re.escape(_AROUND)}]|[^\w{re.escape(_AROUND)}]$")
_NOT_A_WORD = re.compile(r"[\W_]+")
# Thai, Lao, Burmese, Khmer, Japanese, Chinese: no spaces between words. Korean: particles stick to words.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORD_CHARACTER = rf"[^\W{_UNSPACED}]"
_STARTS_A_WORD = re.compile(_WORD_CHARACTER)
_ENDS_A_WORD = re.compile(rf"{_WORD_CHARACTER}\Z")


def read_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the one label that a model's answer names, spelled as in ``labels``; None if none or several.

    The whole text is compared first. Else the labels that occur in it as whole words count; one that only occurs
    inside a longer one ("negative" in "very negative") does not.
    """
    reading = _reading(tuple(labels))
    whole = _whole_label(text, reading)
    return whole if whole is not None else _occurring_label(text, reading)


def label_named(text: str, labels: Sequence[str]) -> str | None:
    """Return the label that the whole text is, up to case, punctuation and white space; None if it is none."""
    return _whole_label(text, _reading(tuple(labels)))


def task_of(expected: Sequence[str], train_answers: Sequence[str]) -> TaskKind:
    """Return ``"label"`` if the answers look like a label set, else ``"text"``: a default, for the user to override.

    A label set is what a person could list on one page, and so often used that scores per label mean something:

    - 2 to 100 different answers (``MAX_LABELS``; banking77 has 77): one alone leaves nothing to tell apart;
    - each one used 3 times or more on average (``MIN_USES_PER_LABEL``): short free answers hardly ever repeat;
    - each at most 5 words and 60 characters (``MAX_LABEL_WORDS``, ``MAX_LABEL_CHARACTERS``): longer ones are
      sentences, and a reply that repeats (a macro of a help desk) is judged as text.
    """
    answers = [*expected, *train_answers]
    labels = label_set(expected, train_answers)
    few = 2 <= len(labels) <= MAX_LABELS
    repeated = len(answers) >= MIN_USES_PER_LABEL * len(labels)
    return "label" if few and repeated and all(map(_is_short, labels)) else "text"


def label_set(expected: Sequence[str], train_answers: Sequence[str]) -> tuple[str, ...]:
    """Return the different answers, sorted, without white space around them.

    Spellings that differ only in case or white space are one label, spelled as it is most often (then the first of
    the alphabet): "Positive" and "positive" in one column are a slip, not two classes.
    """
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in [*expected, *train_answers]:
        if plain := answer.strip():
            spellings[_squeeze(plain)][plain] += 1
    return tuple(sorted(min(counts, key=lambda text: (-counts[text], text)) for counts in spellings.values()))


@dataclass(frozen=True)
class _Reading:
    """How texts are compared with one set of labels: per folding that holds, folded label → label."""

    foldings: tuple[tuple[Fold, dict[str, str]], ...]
    patterns: tuple[tuple[str, re.Pattern[str]], ...]


@lru_cache(maxsize=64)
def _reading(labels: tuple[str, ...]) -> _Reading:
    foldings = []
    for fold in (str.strip, _without_manners, _only_words):
        folded = {fold(label): label for label in labels}
        if fold is _only_words and any(_SIGN_AT_AN_EDGE.search(label.strip()) for label in labels):
            continue
        if len(folded) == len(set(labels)) and all(folded):
            foldings.append((fold, folded))
    patterns = tuple((label, _phrase(folded)) for folded, label in foldings[-1][1].items()) if foldings else ()
    return _Reading(tuple(foldings), patterns)


def _whole_label(text: str, reading: _Reading) -> str | None:
    for fold, labels in reading.foldings:
        if (label := labels.get(fold(text))) is not None:
            return label
    return None


def _occurring_label(text: str, reading: _Reading) -> str | None:
    if not reading.foldings:
        return None
    fold = reading.foldings[-1][0]
    folded = fold(text)
    spans = [(*match.span(), label) for label, pattern in reading.patterns for match in pattern.finditer(folded)]
    found = {label for start, end, label in spans if not _is_inside(start, end, spans)}
    return found.pop() if len(found) == 1 else None


def _is_inside(start: int, end: int, spans: Sequence[tuple[int, int, str]]) -> bool:
    return any(left <= start and end <= right and right - left > end - start for left, right, _ in spans)


def _phrase(folded: str) -> re.Pattern[str]:
    """Return the pattern of a folded label as a whole word or phrase; letters of unspaced scripts need no edge."""
    before = rf"(?<!{_WORD_CHARACTER})" if _STARTS_A_WORD.match(folded) else ""
    after = rf"(?!{_WORD_CHARACTER})" if _ENDS_A_WORD.search(folded) else ""
    return re.compile(before + re.escape(folded) + after)


def _without_manners(text: str) -> str:
    return _squeeze(text).strip(_AROUND)


def _only_words(text: str) -> str:
    return _NOT_A_WORD.sub(" ", _squeeze(text)).strip()


def _squeeze(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _is_short(label: str) -> bool:
    return len(label) <= MAX_LABEL_CHARACTERS and len(label.split()) <= MAX_LABEL_WORDS
