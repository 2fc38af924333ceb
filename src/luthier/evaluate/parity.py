"""Parity: how far the forms of one model agree, computed from their answers on the same prompts. Pure.

The measure is teacher-forced: a form answers greedily, and the adapter (the reference, in float32) is asked at every
token of that answer which token it would choose, given the same text before. Greedy decoding of both gives the same
answer exactly where they agree on every token; and one flip does not count as many, as it would if two answers that
have parted were compared place by place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from luthier.records.model import FormParity


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer under one form: what it would choose at each place, and its first tokens' log-probabilities."""

    chosen: Sequence[int]
    logprobs: Sequence[float] | None


def agreement(
    form: Literal["merged", "gguf", "served"], reference: Sequence[ScoredAnswer], other: Sequence[ScoredAnswer]
) -> FormParity:
    """Compare a form with the reference over the same answers; see :class:`~luthier.records.model.FormParity`."""
    pairs = list(zip(reference, other, strict=True))
    tokens = sum(len(left.chosen) for left, _ in pairs)
    same = sum(a == b for left, right in pairs for a, b in zip(left.chosen, right.chosen, strict=True))
    identical = sum(list(left.chosen) == list(right.chosen) for left, right in pairs)
    gaps = [
        abs(a - b)
        for left, right in pairs
        if left.logprobs is not None and right.logprobs is not None
        for a, b in zip(left.logprobs, right.logprobs, strict=False)
    ]
    return FormParity(
        form=form,
        token_agreement=same / tokens if tokens else 0.0,
        identical_answers=identical / len(pairs) if pairs else 0.0,
        mean_logprob_difference=sum(gaps) / len(gaps) if gaps else None,
    )
