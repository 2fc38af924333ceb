"""What the model said before its first step: the reference that preference methods hold it to.

The sums of log-probabilities are computed once and kept with the run, so that no second model is needed while training,
and a run that goes on has the very same numbers. A pass over many examples takes hours: it, too, goes on where it was.
"""

from __future__ import annotations

import os
import time
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
SAVE_SECONDS = 30.0


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
    """Return the reference of every example, (N,), from the folder where it is kept for this very run.

    What is done is saved every :data:`SAVE_SECONDS`, and before ``on_progress`` ends the work by raising: it goes on
    there.
    """
    path = folder / FILE
    found_N, done = _load(path, fingerprint, len(examples))
    saved_at = time.monotonic()
    while done < len(groups):
        some = groups[done : done + EXAMPLES_AT_ONCE]
        members = [index for group in some for index in group]
        local = {index: place for place, index in enumerate(members)}
        found_N[members] = summed_logprobs(
            model, [examples[i] for i in members], [[local[i] for i in group] for group in some], tokens_per_row
        )
        done += len(some)
        if done == len(groups) or time.monotonic() - saved_at >= SAVE_SECONDS:
            _save(path, fingerprint, found_N, done)
            saved_at = time.monotonic()
        try:
            on_progress("reference", done / len(groups))
        except BaseException:
            _save(path, fingerprint, found_N, done)
            raise
    return found_N


def _load(path: Path, fingerprint: str, examples: int) -> tuple[torch.Tensor, int]:
    """Return what a run has computed already, (N,), and of how many groups."""
    if path.is_file():
        with safe_open(path, "pt") as file:
            kept = file.metadata() or {}
            if kept.get("fingerprint") == fingerprint:
                return file.get_tensor("logprobs"), int(kept["groups"])
    return torch.zeros(examples), 0


def _save(path: Path, fingerprint: str, found_N: torch.Tensor, done: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    save_file({"logprobs": found_N}, staged, metadata={"fingerprint": fingerprint, "groups": str(done)})
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    staged.rename(path)
