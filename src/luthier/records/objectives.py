"""The options of each training method, and what a method needs of its data and its model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from luthier.records.record import Record

Method = Literal["supervised", "raw_text", "dpo", "orpo", "kto", "reward", "classification", "regression"]
Product = Literal["generator", "scorer", "classifier"]

Weight = Annotated[float, Field(gt=0)]

PAIRED: frozenset[Method] = frozenset({"dpo", "orpo", "reward"})


class SupervisedOptions(Record):
    """Options of learning answers (and, for raw text, every token)."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over the vocabulary")
    neftune_alpha: float = Field(0.0, ge=0, description="NEFTune noise on the embeddings (5 is usual); 0: none")


class DpoOptions(Record):
    """Options of direct preference optimisation."""

    beta: float = Field(0.1, gt=0, description="strength of the pull towards the starting model")
    loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="DPO's own loss, or IPO's squared one")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs whose preference may be wrong")

    @model_validator(mode="after")
    def _refuse_smoothing_without_effect(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing would have no effect with loss=ipo")
        return self


class OrpoOptions(Record):
    """Options of odds-ratio preference optimisation."""

    beta: float = Field(0.1, gt=0, description="weight of the odds-ratio term beside the answer's own loss")
    learn_prompt: bool = Field(False, description="count the prompt's tokens in the answer's loss, as TRL does")


class KtoOptions(Record):
    """Options of Kahneman-Tversky optimisation, which learns from thumbs."""

    beta: float = Field(0.1, gt=0, description="strength of the pull towards the starting model")
    desirable_weight: Weight | Literal["auto"] = Field("auto", description="weight of examples with thumbs up")
    undesirable_weight: Weight | Literal["auto"] = Field("auto", description="weight of examples with thumbs down")


class RewardOptions(Record):
    """Options of a reward model."""

    centre: float = Field(0.0, ge=0, description="pull of the two scores' sum towards zero (0.01 is usual)")


def product(method: Method) -> Product:
    """Return what a method makes: a model that writes, one that scores an answer, or one that labels a text."""
    if method == "reward":
        return "scorer"
    return "classifier" if method in ("classification", "regression") else "generator"
