"""The learning rate over the steps of a run. Pure."""

from __future__ import annotations

import math

from luthier.records.training import Resolved

LEAST_FACTOR = 1e-3


def rate_factor(step: int, steps: int, resolved: Resolved) -> float:
    """Return the factor on the peak learning rate at a step (from 0): linear warm-up, then down to a thousandth."""
    if step < resolved.warmup_steps:
        return (step + 1) / resolved.warmup_steps
    if resolved.schedule == "constant":
        return 1.0
    done = (step - resolved.warmup_steps) / max(1, steps - resolved.warmup_steps)
    factor = 1 - done if resolved.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return max(LEAST_FACTOR, factor)
