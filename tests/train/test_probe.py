"""Steps are made in a process of their own: what they took is the plan's, and what they cannot is refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_methods import MACHINE, make_job, units

from luthier.errors import CapacityError, EngineError, InputError
from luthier.records.training import TrainingConfig
from luthier.templates.renderer import RenderReport, TokenizedExample
from luthier.train.engine.loop import TrainingJob
from luthier.train.engine.probe import _longest, measured_plan
from luthier.train.plan import Material, plan_training, rows_of, with_measured
from luthier.workflows.models import shape


def long_example(length: int) -> TokenizedExample:
    return TokenizedExample("long", [5, 6, 7, 8, *[20] * (length - 4)], [False] * (length - 2) + [True, True])


@contextmanager
def each_child(do: Callable[[int, int], object]) -> Iterator[list[object]]:
    """Call ``do`` with the number and the id of each process that makes steps, as it starts; collect its answers."""
    found: list[object] = []
    seen: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for child in multiprocessing.active_children():
                if child.pid and child.pid not in seen:
                    seen.add(child.pid)
                    found.append(do(len(seen), child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def score(pid: int) -> int:
    """Return how likely the system is to end a process where memory runs out."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def kill_the_first(number: int, pid: int) -> int:
    """Kill the first process as the system does; return the score of others, once they have set it."""
    if number == 1:
        os.kill(pid, signal.SIGKILL)
        return 0
    while score(pid) != 1000:
        time.sleep(0.02)
    return score(pid)


def test_a_plan_has_what_its_steps_took_once_they_fit(tiny_base: Path, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path)
    before = score(os.getpid())
    said: list[str] = []
    with each_child(kill_the_first) as scores:
        plan = measured_plan(job, TrainingConfig(), MACHINE, said.append)
    assert said == ["Trying steps of 1,024 tokens", "Trying steps of 512 tokens"]
    assert scores == [0, 1000]  # where memory runs out, the system ends the steps and not the run
    assert score(os.getpid()) == before
    assert plan.measured is not None
    assert plan.resolved == job.plan.resolved.model_copy(update={"tokens_per_row": 512})
    assert plan.reasons[-1].reason == "halved to fit the memory"
    assert 50e6 < plan.measured.peak_bytes < 4e9
    assert plan.memory_bytes == plan.measured.peak_bytes + plan.data_bytes
    assert plan.data_bytes > 0
    learned = plan.computed_tokens_per_epoch * plan.resolved.epochs
    assert plan.seconds > learned * plan.measured.seconds / plan.measured.tokens
    assert list(tmp_path.iterdir()) == []
    small = job.plan.model_copy(update={"machine_memory_bytes": plan.measured.peak_bytes // 2})
    with pytest.raises(CapacityError, match="needs about") as refused:
        with_measured(small, plan.measured)
    assert "a machine with more memory" in (refused.value.hint or "")  # the process alone is larger


def test_steps_that_the_system_kills_do_not_fit(tiny_base: Path, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path, tokens_per_row=2, recompute=True)
    with each_child(kill_the_first) as killed, pytest.raises(CapacityError, match="out of memory") as refused:
        measured_plan(job, TrainingConfig(), MACHINE)
    assert killed == [0]
    assert "more memory" in (refused.value.hint or "")


def test_what_a_user_has_chosen_is_not_made_smaller(tiny_base: Path, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path, tokens_per_row=1024, recompute=False)
    with (
        each_child(kill_the_first) as killed,
        pytest.raises(CapacityError, match=r"out of memory, in rows of 1,024 tokens"),
    ):
        measured_plan(job, TrainingConfig(tokens_per_row=1024, recompute=False), MACHINE)
    assert killed == [0]


def test_another_end_of_the_steps_is_no_lack_of_memory(tiny_base: Path, tmp_path: Path) -> None:
    def end(number: int, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)

    with each_child(end), pytest.raises(EngineError, match="ended with -15"):
        measured_plan(make_job(tiny_base, tmp_path), TrainingConfig(), MACHINE)


def test_what_the_steps_cannot_learn_is_said_as_in_a_run(tiny_base: Path, tmp_path: Path) -> None:
    job = replace(make_job(tiny_base, tmp_path), start_adapter=tmp_path)
    with pytest.raises(InputError, match="does not fit this base"):
        measured_plan(job, TrainingConfig(), MACHINE)


def job_with(base: Path, folder: Path, validation: list[Any]) -> TrainingJob:
    material = Material(units(32, "supervised"), validation, RenderReport())
    plan = plan_training(material, TrainingConfig(precision="float32"), shape(base, 200_000), MACHINE)
    return TrainingJob(plan, material.examples, validation, base, "tiny", folder)


def test_the_longest_steps_are_those_of_every_side(tiny_base: Path, tmp_path: Path) -> None:
    job = job_with(tiny_base, tmp_path, [*units(4, "supervised"), long_example(1_500)])
    assert job.plan.resolved.tokens_per_row == 1_500
    assert _longest(job)[0].example_id == "long"
    in_test = replace(job_with(tiny_base, tmp_path, []), test=(long_example(90),))
    assert _longest(in_test)[0].example_id == "long"


def test_steps_are_measured_in_full_rows_however_much_the_longest_units_share(tiny_base: Path, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path, tokens_per_row=64)
    long = TokenizedExample("long", list(range(1, 41)), [False] * 30 + [True] * 10)
    copies = [replace(long, example_id=str(i)) for i in range(6)]
    found = _longest(replace(job, examples=[*job.examples, *copies]))
    assert sum(len(row.tokens) for row in rows_of(found, job.plan)) >= 64
