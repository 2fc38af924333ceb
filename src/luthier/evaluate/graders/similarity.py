"""How alike two texts are, from 0 to 1, by the field's own packages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

from luthier.evaluate.graders.failure import GradingError
from luthier.records.grader import SimilarityMetric

MAX_LETTERS = 2**15  # measured: no metric takes longer than a second for two such texts, or more than some megabytes
METRICS: tuple[SimilarityMetric, ...] = get_args(SimilarityMetric)


def string_check(operation: str, text: str, reference: str) -> float:
    """Return 1 where a text stands in a relation to a reference, else 0; like and ilike ask whether it contains it."""
    holds = {
        "eq": text == reference,
        "ne": text != reference,
        "like": reference in text,
        "ilike": reference.casefold() in text.casefold(),
    }
    return float(holds[operation])


def similarity(metric: SimilarityMetric, text: str, reference: str) -> float:
    """Return how alike two texts are by any metric but cosine.

    Raises:
        GradingError: one of them is too long.
    """
    for name, value in (("input", text), ("reference", reference)):
        if len(value) > MAX_LETTERS:
            raise GradingError(
                "other_error", f"The {name} has {len(value)} letters; at most {MAX_LETTERS} are compared."
            )
    if metric.startswith("rouge_") and metric != "rouge_l":
        return _rouge(metric.replace("_", ""), text, reference)
    own = {"fuzzy_match": _fuzzy_match, "bleu": _bleu, "gleu": _gleu, "meteor": _meteor, "rouge_l": _rouge_l}
    return own[metric](text, reference)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine of the angle between two vectors."""
    lengths = math.hypot(*one) * math.hypot(*other)
    product = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return product / lengths if lengths else 0.0


def _fuzzy_match(text: str, reference: str) -> float:
    """Return the normalised similarity of Levenshtein's kind: rapidfuzz's ratio."""
    from rapidfuzz import fuzz

    return float(fuzz.ratio(text, reference)) / 100


def _bleu(text: str, reference: str) -> float:
    """Return the BLEU of a sentence (Papineni et al. 2002), smoothed as sacrebleu does by default."""
    from sacrebleu import sentence_bleu

    return float(sentence_bleu(text, [reference]).score) / 100


def _gleu(text: str, reference: str) -> float:
    """Return Google's BLEU (Wu et al. 2016)."""
    from nltk.translate.gleu_score import sentence_gleu

    return float(sentence_gleu([reference.split()], text.split()))


class _NoSynonyms:
    """WordNet without words: METEOR then matches by form and stem alone, the same everywhere."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _meteor(text: str, reference: str) -> float:
    """Return METEOR (Banerjee and Lavie 2005) without its stage of synonyms, for which WordNet would be needed."""
    from nltk.translate.meteor_score import meteor_score

    return float(meteor_score([reference.split()], text.split(), wordnet=_NoSynonyms()))


def _rouge(kind: str, text: str, reference: str) -> float:
    """Return the F1 of ROUGE over n words (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer([kind]).score(reference, text)[kind].fmeasure)


def _rouge_l(text: str, reference: str) -> float:
    """Return ROUGE-L's F1 over rouge-score's words, whose longest common subsequence rapidfuzz finds.

    rouge-score itself makes a table of all pairs of words for it: gigabytes for long texts.
    """
    from rapidfuzz.distance import LCSseq
    from rouge_score.scoring import fmeasure
    from rouge_score.tokenizers import DefaultTokenizer

    words, wanted = (DefaultTokenizer().tokenize(one) for one in (text, reference))
    common = LCSseq.similarity(words, wanted)
    return float(fmeasure(common / len(words), common / len(wanted))) if common else 0.0
