"""Find texts that are nearly the same, without keeping the texts or comparing each with each.

In: texts, one at a time, in lower case and with white space folded. Out: for each text the first one of its group.

1. *Shingles.* A text is the set of its runs of one to three words. :func:`choose_shingling` looks at some of the texts
   and decides how many words make a shingle, and which runs of words are an instruction that many texts share, and
   which says nothing about their likeness.
2. *Signatures.* :func:`signature` keeps 256 bytes of a text: MinHash (Broder, "On the resemblance and containment of
   documents", 1997).
3. *Groups.* :func:`group_near_duplicates` bands the signatures for candidates (Leskovec, Rajaraman, Ullman, "Mining of
   Massive Datasets", section 3.4), which their estimated Jaccard similarity confirms, and joins what is alike.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PERMUTATIONS = 128
SIGNATURE_BYTES = 2 * PERMUTATIONS
BAND_RECALL = 0.99
WINDOW = 8
PAIRS_AT_ONCE = 1 << 16
SHINGLES_AT_ONCE = 1 << 12
COMMON_SHARE = 0.2
COMMON_TEXTS = 20

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Signatures = npt.NDArray[np.uint16]

# Letters of scripts without spaces are words of their own; signs of arithmetic and code tell "3 + 4" from "3 * 4".
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[+*/=<>^%|]")


@dataclass(frozen=True)
class Shingling:
    """How texts are cut up: words per shingle, and the hashes of the runs of three words to ignore, sorted."""

    words: int
    common_runs: Hashes


def choose_shingling(texts: Collection[str]) -> Shingling:
    """Return how to cut up texts such as these, all different from each other."""
    words = [_word_hashes(text) for text in texts]
    common = _common_runs(words)
    lengths = sorted(len(_without_runs(hashes, common)) for hashes in words)
    return Shingling(_shingle_words(lengths[len(lengths) // 2] if lengths else 0), common)


def signature(text: str, shingling: Shingling) -> Signatures:
    """Return the MinHash signature: for each of 128 hash functions, the low 16 bits of its least value.

    Sixteen bits agree by chance once in 65,536 (b-bit minwise hashing; Li and König 2010): more functions in the same
    memory estimate the similarity better.
    """
    shingles = _shingles(text, shingling)
    least = np.full(PERMUTATIONS, 0xFFFFFFFF, np.uint64)
    for start in range(0, len(shingles), SHINGLES_AT_ONCE):
        part = shingles[start : start + SHINGLES_AT_ONCE, None]
        least = np.minimum(least, ((part * _FACTORS + _OFFSETS) >> np.uint64(32)).min(axis=0))
    return least.astype(np.uint16)


def group_near_duplicates(signatures: Signatures, similarity: float) -> list[int]:
    """Return for each text the first text of its group.

    Args:
        signatures: One row of 128 numbers for each text, as :func:`signature` returns it.
        similarity: The Jaccard similarity of shingles, above 0 and at most 1, from which two texts are one group. It
            is estimated: within one standard error below it, two texts still count as alike.
    """
    roots = list(range(len(signatures)))
    # One standard error of the estimate in favour of alike: a pair kept together costs less than one torn apart.
    least = (similarity - (similarity * (1 - similarity) / PERMUTATIONS) ** 0.5) * PERMUTATIONS
    rows = _rows_per_band(similarity)
    for start in range(0, PERMUTATIONS - rows + 1, rows):
        for one, other in _alike_pairs(signatures, signatures[:, start : start + rows], least):
            _join(roots, one, other)
    return [_root(roots, text) for text in range(len(roots))]


# Shingles


def _mix(values: Hashes) -> Hashes:
    """Scatter 64-bit values (the finalizer of SplitMix64; Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_FACTORS = _mix(np.arange(1, PERMUTATIONS + 1, dtype=np.uint64)) | np.uint64(1)
_OFFSETS = _mix(np.arange(1_001, PERMUTATIONS + 1_001, dtype=np.uint64))


def _shingle_words(median_words: int) -> int:
    """Return how many words make a shingle: so few that one word changed in ten leaves two texts alike (0.8)."""
    if median_words < 20:
        return 1
    return 2 if median_words < 30 else 3


def _common_runs(texts: Sequence[Hashes]) -> Hashes:
    """Return the runs of three words that more than a fifth of the different texts share, sorted."""
    counts: Counter[int] = Counter()
    for hashes in texts:
        counts.update(np.unique(_runs(hashes, 3)).tolist())
    least = max(COMMON_SHARE * len(texts), COMMON_TEXTS)
    return np.array(sorted(run for run, count in counts.items() if count > least), np.uint64)


def _word_hashes(text: str) -> Hashes:
    words = _WORD.findall(text) or [text]
    codes = (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words)
    return np.fromiter(codes, np.uint64, len(words))


def _runs(words: Hashes, length: int) -> Hashes:
    """Return a hash of each run of ``length`` words; a shorter text is one run."""
    length = min(length, len(words))
    count = len(words) - length + 1
    runs = words[:count]
    for offset in range(1, length):
        runs = _mix(runs) + words[offset : offset + count]
    return runs


def _without_runs(words: Hashes, common: Hashes) -> Hashes:
    """Leave out the words of common runs, unless nothing else is there."""
    if not len(common) or len(words) < 3:
        return words
    runs = _runs(words, 3)
    places = np.searchsorted(common, runs).clip(max=len(common) - 1)
    starts = np.flatnonzero(common[places] == runs)
    kept = np.ones(len(words), bool)
    for offset in range(3):
        kept[starts + offset] = False
    return words[kept] if kept.any() else words


def _shingles(text: str, shingling: Shingling) -> Hashes:
    """Return the shingles as a set of hashes; a shingle met again is another member, so "no no" is not "no"."""
    runs = np.sort(_runs(_without_runs(_word_hashes(text), shingling.common_runs), shingling.words))
    positions = np.arange(len(runs), dtype=np.uint64)
    first = np.concatenate(([True], runs[1:] != runs[:-1]))
    repeats = positions - np.maximum.accumulate(np.where(first, positions, np.uint64(0)))
    return _mix(_mix(runs) + repeats)


# Groups


def _rows_per_band(similarity: float) -> int:
    """Return the most rows of a band under which an alike pair still shares one in 99 cases of 100.

    With b bands of r rows that chance is 1 - (1 - s^r)^b at similarity s.
    """
    for rows in range(16, 1, -1):
        if 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows) >= BAND_RECALL:
            return rows
    return 1


def _alike_pairs(signatures: Signatures, band: Signatures, least: float) -> Iterator[tuple[int, int]]:
    """Yield the pairs that agree in one band and in at least ``least`` places of the whole signature."""
    hashes = np.zeros(len(band), np.uint64)
    for column in band.T:
        hashes = _mix(hashes + column)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    starts = np.ones(len(order), bool)
    starts[1:] = hashes[1:] != hashes[:-1]
    run_start = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    places = np.flatnonzero(~starts)
    for offset in range(1, WINDOW):
        near = places[places - offset >= run_start[places]]
        yield from _confirmed(signatures, order[near], order[near - offset], least)
    far = places[places - WINDOW >= run_start[places]]
    yield from _confirmed(signatures, order[far], order[run_start[far]], least)


def _confirmed(signatures: Signatures, ones: Indices, others: Indices, least: float) -> Iterator[tuple[int, int]]:
    for start in range(0, len(ones), PAIRS_AT_ONCE):
        one, other = ones[start : start + PAIRS_AT_ONCE], others[start : start + PAIRS_AT_ONCE]
        alike = (signatures[one] == signatures[other]).sum(axis=1) >= least
        yield from zip(one[alike].tolist(), other[alike].tolist(), strict=True)


def _root(roots: list[int], text: int) -> int:
    while roots[text] != text:
        roots[text] = roots[roots[text]]
        text = roots[text]
    return text


def _join(roots: list[int], one: int, other: int) -> None:
    first, second = sorted((_root(roots, one), _root(roots, other)))
    roots[second] = first
