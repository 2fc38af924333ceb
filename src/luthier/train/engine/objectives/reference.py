"""What the model said before its first step: the reference that preference methods hold it to.

The sums of log-probabilities are computed once and kept with the run, so that no second model is needed while training,
and a run that goes on has the very same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from luthier.llm.engine.row_model import RowModel
from luthier.llm.rows import pack_groups
from luthier.templates.renderer import TokenizedExample
from luthier.train.engine.objectives.objective import OnProgress, sum_by_owner

FILE = "reference.safetensors"
EXAMPLES_AT_ONCE = 16


def summed_logprobs(
    model: RowModel, examples: Sequence[TokenizedExample], groups: Sequence[Sequence[int]], tokens_per_row: int
) -> torch.Tensor:
    """Return the summed log-probability of each example's targets, (N,), without gradient.

    ``groups`` are indices of examples that share a prompt: it is computed once for them.
    """
    sums_N = torch.zeros(len(examples))
    with torch.no_grad():
        for row in pack_groups(examples, groups, tokens_per_row):
            found = model.targets(row)
            sums_N[list(row.examples)] = sum_by_owner(found.logprobs_M, row.owners, len(row.examples)).cpu()
    return sums_N


def load_or_compute(
    model: RowModel,
    examples: Sequence[TokenizedExample],
    groups: Sequence[Sequence[int]],
    tokens_per_row: int,
    folder: Path,
    fingerprint: str,
    on_progress: OnProgress,
) -> torch.Tensor:
    """Return the reference of every example, (N,), from the folder where it was kept for this very run."""
    path = folder / FILE
    if path.is_file():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("fingerprint") == fingerprint:
                return file.get_tensor("logprobs")
    found_N = torch.zeros(len(examples))
    for first in range(0, len(groups), EXAMPLES_AT_ONCE):
        some = groups[first : first + EXAMPLES_AT_ONCE]
        members = [index for group in some for index in group]
        local = {index: place for place, index in enumerate(members)}
        found_N[members] = summed_logprobs(
            model, [examples[i] for i in members], [[local[i] for i in group] for group in some], tokens_per_row
        )
        on_progress("reference", min(1.0, (first + len(some)) / len(groups)))
    folder.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{FILE}")
    save_file({"logprobs": found_N}, staged, metadata={"fingerprint": fingerprint})
    staged.rename(path)
    return found_N
