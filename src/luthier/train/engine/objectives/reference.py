"""What the model said before its first step: the reference that preference methods hold it to.

The sums of log-probabilities are computed once and kept with the run, so that no second model is needed while training,
and a run that goes on has the very same numbers. A pass over many examples takes hours: it, too, goes on where it was.
The answers are read a few at a time: only two numbers of each unit are held.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from luthier.llm.engine.row_model import RowModel
from luthier.llm.rows import Row, pack_groups
from luthier.templates.renderer import TokenizedExample
from luthier.train.engine.objectives.objective import OnProgress, sum_by_owner

FILE = "reference.safetensors"
UNITS_AT_ONCE = 16
SAVE_SECONDS = 30.0

Answers = tuple[TokenizedExample, TokenizedExample]
"""The two answers of a unit that the reference is asked for. They share a prompt."""


def summed_logprobs(model: RowModel, rows: Iterable[Row], examples: int) -> torch.Tensor:
    """Return the summed log-probability of the targets of each example in some rows, (N,), without gradient."""
    sums_N = torch.zeros(examples)
    with torch.no_grad():
        for row in rows:
            found = model.targets(row)
            sums_N[list(row.examples)] = sum_by_owner(found.logprobs_M, row.owners, len(row.examples)).cpu()
    return sums_N


def load_or_compute(
    model: RowModel,
    units: int,
    answers: Callable[[int], Answers],
    tokens_per_row: int,
    folder: Path,
    fingerprint: str,
    on_progress: OnProgress,
) -> torch.Tensor:
    """Return the reference of both answers of every unit, (N, 2), from the folder where it is kept for this very run.

    ``answers`` reads those of the unit at a place. What is done is saved every :data:`SAVE_SECONDS`, and before
    ``on_progress`` ends the work by raising: it goes on there.
    """
    path = folder / FILE
    found_N2, done = _load(path, fingerprint, units)
    saved_at = time.monotonic()
    while done < units:
        end = min(done + UNITS_AT_ONCE, units)
        found_N2[done:end] = _of_some(model, map(answers, range(done, end)), tokens_per_row)
        done = end
        if done == units or time.monotonic() - saved_at >= SAVE_SECONDS:
            _save(path, fingerprint, found_N2, done)
            saved_at = time.monotonic()
        try:
            on_progress("reference", done / units)
        except BaseException:
            _save(path, fingerprint, found_N2, done)
            raise
    return found_N2


def _of_some(model: RowModel, units: Iterable[Answers], tokens_per_row: int) -> torch.Tensor:
    examples = [answer for answers in units for answer in answers]
    groups = [(index, index + 1) for index in range(0, len(examples), 2)]
    return summed_logprobs(model, pack_groups(examples, groups, tokens_per_row), len(examples)).view(-1, 2)


def _load(path: Path, fingerprint: str, units: int) -> tuple[torch.Tensor, int]:
    """Return what a run has computed already, (N, 2), and of how many units."""
    if path.is_file():
        with safe_open(path, "pt") as file:
            kept = file.metadata() or {}
            known = file.get_slice("logprobs").get_shape() == [units, 2]  # an older file has another one, and order
            if known and kept.get("fingerprint") == fingerprint:
                return file.get_tensor("logprobs"), int(kept["units"])
    return torch.zeros(units, 2), 0


def _save(path: Path, fingerprint: str, found_N2: torch.Tensor, done: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    save_file({"logprobs": found_N2}, staged, metadata={"fingerprint": fingerprint, "units": str(done)})
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    staged.rename(path)
