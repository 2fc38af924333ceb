"""The loop on a tiny random model: it learns, it is exact however it is packed, and it goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier.errors import ConflictError, RunStopped
from luthier.records.base_model import Machine
from luthier.records.training import StepMetrics, TrainingConfig
from luthier.templates.renderer import RenderReport, TokenizedExample
from luthier.train.engine.loop import TrainingJob, best_adapter, train
from luthier.train.plan import Material, plan_training
from luthier.workflows.models import shape

MACHINE = Machine(cores=2, memory_bytes=24 * 10**9, has_fast_bfloat16=False, matmul_flops=1e11)
OPTIONS = {"epochs": 4, "batch_size": 4, "lora_rank": 4, "precision": "float32", "learning_rate": 5e-3}


def examples(count: int = 24) -> list[TokenizedExample]:
    """Return examples whose last token is one of two, decided by the token before it."""
    made = []
    for index in range(count):
        asked = 100 + index % 2
        tokens = [5, 6, 7, 8, *[20 + index % 7] * (1 + index % 5), asked, 200 + index % 2]
        made.append(TokenizedExample(str(index), tokens, [False] * (len(tokens) - 1) + [True]))
    return made


def make_job(tiny_base: Path, folder: Path, **options: object) -> TrainingJob:
    config = TrainingConfig.model_validate(OPTIONS | options)
    sizes = shape(tiny_base, 200_000)
    plan = plan_training(Material(examples(), examples(6), RenderReport()), config, sizes, MACHINE)
    return TrainingJob(plan, examples(), examples(6), tiny_base, "tiny-base", folder)


def run(job: TrainingJob, stop_at: int | None = None) -> list[StepMetrics]:
    seen: list[StepMetrics] = []

    def stop() -> None:
        if stop_at and len(seen) == stop_at:
            raise RunStopped("asked to")

    train(job, seen.append, stop)
    return seen


def adapter(job: TrainingJob) -> dict[str, torch.Tensor]:
    return dict(load_file(best_adapter(job) / "adapter_model.safetensors"))


def test_a_model_learns_a_rule(tiny_base: Path, tmp_path: Path) -> None:
    seen = run(make_job(tiny_base, tmp_path, epochs=10))
    assert seen[-1].valid_loss is not None
    assert seen[-1].valid_loss < 0.2 * seen[0].train_loss


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tiny_base: Path, tmp_path: Path) -> None:
    first, second, other = (
        [m.train_loss for m in run(make_job(tiny_base, tmp_path / name, seed=seed))]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second
    assert first != other


def test_the_loss_of_a_batch_does_not_depend_on_how_it_is_packed(tiny_base: Path, tmp_path: Path) -> None:
    wide = [m.train_loss for m in run(make_job(tiny_base, tmp_path / "wide", tokens_per_row=512))]
    narrow = [m.train_loss for m in run(make_job(tiny_base, tmp_path / "narrow", tokens_per_row=12))]
    assert narrow == pytest.approx(wide, rel=1e-4)


def test_a_stopped_run_goes_on_to_the_same_numbers(tiny_base: Path, tmp_path: Path) -> None:
    whole = make_job(tiny_base, tmp_path / "whole")
    losses = [m.train_loss for m in run(whole)]
    parts = make_job(tiny_base, tmp_path / "parts")
    with pytest.raises(RunStopped):
        run(parts, stop_at=7)
    rest = run(parts)
    assert rest[0].step == 8
    assert [m.train_loss for m in rest] == losses[7:]
    for name, tensor in adapter(whole).items():
        assert torch.equal(tensor, adapter(parts)[name])


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_training_loop import make_job, run
from luthier.train.engine import loop
steps = 0
def step(metrics):
    global steps
    steps += 1
    if steps == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
loop.train(make_job(Path({base!r}), Path({folder!r}), checkpoints=8), step, lambda: None)
"""


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_numbers(tiny_base: Path, tmp_path: Path) -> None:
    whole = make_job(tiny_base, tmp_path / "whole", checkpoints=8)
    losses = [m.train_loss for m in run(whole)]
    script = textwrap.dedent(
        KILLED.format(
            tests=str(Path(__file__).parent), base=str(tiny_base), folder=str(tmp_path / "killed"), kill_at=11
        )
    )
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ}, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    state = json.loads((tmp_path / "killed" / "latest" / "state.json").read_text())
    assert 0 < state["step"] < 11
    again = make_job(tiny_base, tmp_path / "killed", checkpoints=8)
    rest = run(again)
    assert rest[0].step == state["step"] + 1
    assert [m.train_loss for m in rest] == losses[state["step"] :]
    for name, tensor in adapter(whole).items():
        assert torch.equal(tensor, adapter(again)[name])


def test_a_checkpoint_of_other_data_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        run(make_job(tiny_base, tmp_path), stop_at=3)
    with pytest.raises(ConflictError, match="other examples or options"):
        run(make_job(tiny_base, tmp_path, learning_rate=1e-3))


def test_the_adapter_loads_in_plain_peft(tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = make_job(tiny_base, tmp_path)
    run(job)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    tuned = PeftModel.from_pretrained(base, str(best_adapter(job)))
    one = examples(1)[0]
    with torch.no_grad():
        logits = tuned(input_ids=torch.tensor([one.tokens[:-1]])).logits[0, -1]
    assert int(logits.argmax()) == one.tokens[-1]
    config = json.loads((best_adapter(job) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-base"


def test_a_kill_between_the_two_renames_of_a_checkpoint_loses_nothing(tiny_base: Path, tmp_path: Path) -> None:
    whole = [m.train_loss for m in run(make_job(tiny_base, tmp_path / "whole"))]
    job = make_job(tiny_base, tmp_path / "parts")
    with pytest.raises(RunStopped):
        run(job, stop_at=5)
    (job.folder / "latest").rename(job.folder / ".old-latest")
    rest = run(job)
    assert rest[0].step == 6
    assert [m.train_loss for m in rest] == whole[5:]
