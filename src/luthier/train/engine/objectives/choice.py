"""Which objective a method is."""

from __future__ import annotations

from typing import Any

from luthier.records.training import TrainingPlan
from luthier.train.engine.objectives.kto import Kto
from luthier.train.engine.objectives.labelled import Labelled
from luthier.train.engine.objectives.objective import Objective
from luthier.train.engine.objectives.preference import Dpo, Orpo, Reward
from luthier.train.engine.objectives.supervised import Supervised


def make_objective(model: Any, plan: TrainingPlan) -> Objective[Any]:
    """Return a plan's objective over a model that takes rows (or, for encoders, batches)."""
    resolved, tokens = plan.resolved, plan.resolved.tokens_per_row
    match resolved.method:
        case "supervised" | "raw_text":
            return Supervised(model, resolved.supervised, tokens)
        case "dpo":
            return Dpo(model, resolved.dpo, tokens)
        case "orpo":
            return Orpo(model, resolved.orpo, tokens)
        case "kto":
            return Kto(model, resolved.kto, tokens)
        case "reward":
            return Reward(model, resolved.reward, tokens)
        case "classification" | "regression":
            return Labelled(model, resolved.method, tokens)
