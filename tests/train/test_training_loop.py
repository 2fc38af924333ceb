"""The loop on a tiny random model: it learns, it is exact however it is packed, and it goes on where it was."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.errors import ConflictError, DivergedError, RunStopped
from luthier.records.base_model import Machine
from luthier.records.training import StepMetrics, TrainingConfig
from luthier.templates.renderer import RenderReport, TokenizedExample
from luthier.train.engine import checkpoint
from luthier.train.engine.loop import LEFT_OUT_IN_A_ROW, TrainingJob, best_adapter, train
from luthier.train.notes import Note, WarningNote
from luthier.train.plan import Material, plan_training
from luthier.workflows.models import shape

MACHINE = Machine(cores=2, memory_bytes=24 * 10**9, has_fast_bfloat16=False, int8_speed=4.0, matmul_flops=1e11)
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


def run(job: TrainingJob, stop_at: int | None = None, notes: list[Note] | None = None) -> list[StepMetrics]:
    seen: list[StepMetrics] = []

    def stop() -> None:
        if stop_at and len(seen) == stop_at:
            raise RunStopped("asked to")

    train(job, seen.append, stop, (notes if notes is not None else []).append)
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


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_stopped_run_goes_on_to_the_same_numbers(tiny_base: Path, tmp_path: Path, precision: str) -> None:
    whole = make_job(tiny_base, tmp_path / "whole", precision=precision)
    losses = [m.train_loss for m in run(whole)]
    parts = make_job(tiny_base, tmp_path / "parts", precision=precision)
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


def killed_between_renames(job: TrainingJob) -> None:
    """Leave what a kill between the two renames of the checkpoint at step 5 leaves."""
    with pytest.raises(RunStopped):
        run(job, stop_at=5)
    (job.folder / "latest").rename(job.folder / ".old-latest")


def test_a_kill_between_the_two_renames_of_a_checkpoint_loses_nothing(tiny_base: Path, tmp_path: Path) -> None:
    whole = [m.train_loss for m in run(make_job(tiny_base, tmp_path / "whole"))]
    job = make_job(tiny_base, tmp_path / "parts")
    killed_between_renames(job)
    rest = run(job)
    assert rest[0].step == 6
    assert [m.train_loss for m in rest] == whole[5:]


def test_a_second_kill_between_the_renames_loses_nothing_either(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [m.train_loss for m in run(make_job(tiny_base, tmp_path / "whole"))]
    job = make_job(tiny_base, tmp_path / "parts")
    killed_between_renames(job)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if Path(target).name == "latest":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run(job, stop_at=2)
    rest = run(job)
    assert rest[0].step == 6
    assert [m.train_loss for m in rest] == whole[5:]


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_half_written(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [m.train_loss for m in run(make_job(tiny_base, tmp_path / "whole"))]
    job = make_job(tiny_base, tmp_path / "parts")
    with pytest.raises(RunStopped):
        run(job, stop_at=5)

    def fill(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", fill)
        with pytest.raises(OSError, match="No space left"):
            run(job, stop_at=2)
    assert not (job.folder / ".latest").exists()
    assert [m.train_loss for m in run(job)] == whole[5:]


def test_steps_that_are_only_measured_write_no_state(tiny_base: Path, tmp_path: Path) -> None:
    job = replace(make_job(tiny_base, tmp_path / "run"), validation=(), checkpoint_seconds=None)
    with pytest.raises(RunStopped):
        run(job, stop_at=3)
    assert not job.folder.exists()


def test_a_run_with_weights_and_repeated_examples_goes_on_to_the_same_numbers(tiny_base: Path, tmp_path: Path) -> None:
    """As after resampling: one example is there three times, one not at all."""
    chosen = [0, 0, 0, *range(2, 24), 5]
    weighted = [replace(examples()[index], weight=0.25 + index % 4) for index in chosen]
    whole, parts = (
        replace(make_job(tiny_base, tmp_path / name, epochs=2), examples=weighted) for name in ("whole", "parts")
    )
    losses = [m.train_loss for m in run(whole)]
    with pytest.raises(RunStopped):
        run(parts, stop_at=5)
    assert [m.train_loss for m in run(parts)] == losses[5:]
    assert all(torch.equal(tensor, adapter(parts)[name]) for name, tensor in adapter(whole).items())


def test_a_checkpoint_of_other_weights_of_the_same_name_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunStopped):
        run(make_job(tiny_base, tmp_path / "run"), stop_at=3)
    with pytest.raises(ConflictError, match="other examples or options"):
        run(make_job(other, tmp_path / "run"))
    named = replace(make_job(tiny_base, tmp_path / "named"), base_sha256="one")
    with pytest.raises(RunStopped):
        run(named, stop_at=3)
    with pytest.raises(ConflictError, match="other examples or options"):
        run(replace(named, base_sha256="two"))


def state_of(job: TrainingJob) -> dict[str, float]:
    return dict(json.loads((job.folder / "latest" / "state.json").read_text()))


def test_a_checkpoint_is_saved_wherever_its_time_has_come(tiny_base: Path, tmp_path: Path) -> None:
    job = replace(make_job(tiny_base, tmp_path, epochs=1, checkpoints=1), checkpoint_seconds=0.0)
    saved = []
    train(job, lambda metrics: saved.append(state_of(job)["step"] if metrics.step > 1 else 0), lambda: None)
    assert saved == [0, 1, 2, 3, 4, 5]


def test_gradients_are_clipped_to_their_norm(tiny_base: Path, tmp_path: Path) -> None:
    """The first moments after one step are a tenth of the gradients that the optimizer was given."""
    for limit in (1e9, 1e-3):
        job = make_job(tiny_base, tmp_path / str(limit), max_gradient_norm=limit)
        seen: list[StepMetrics] = []

        def stop(seen: list[StepMetrics] = seen) -> None:
            if seen:
                raise RunStopped("after one step")

        with pytest.raises(RunStopped):
            train(job, seen.append, stop)
        state = load_file(job.folder / "latest" / "state.safetensors")
        moments = [tensor for name, tensor in state.items() if name.startswith("exp_avg/")]
        given = 10 * float(torch.cat([tensor.flatten() for tensor in moments]).norm())
        assert seen[0].gradient_norm is not None
        assert given == pytest.approx(min(limit, seen[0].gradient_norm), rel=1e-4)


# Numbers that break


def broken(job: TrainingJob, places: Sequence[int]) -> TrainingJob:
    """Return a job in which the loss of some examples is not a number."""
    return replace(
        job,
        examples=[replace(one, weight=math.nan) if place in places else one for place, one in enumerate(job.examples)],
    )


def test_a_step_without_a_finite_loss_is_left_out_and_told(tiny_base: Path, tmp_path: Path) -> None:
    notes: list[Note] = []
    job = broken(make_job(tiny_base, tmp_path / "whole", validations=24), [3])
    seen = run(job, notes=notes)
    left_out = [metrics.step for metrics in seen if metrics.train_loss is None]
    assert len(left_out) == 4  # once a pass
    assert seen[-1].step == job.plan.steps
    losses = {metrics.step: metrics.valid_loss for metrics in seen}
    assert all(losses[step] == losses[step - 1] for step in left_out if step > 1)
    assert (seen[-1].valid_loss or math.inf) < 0.5 * (losses[1] or 0)
    (warned,) = [note.warning for note in notes if isinstance(note, WarningNote) and note.warning.kind == "diverging"]
    assert (warned.step, "left out" in warned.message) == (left_out[0], True)
    assert all(StepMetrics.model_validate_json(metrics.model_dump_json()) == metrics for metrics in seen)
    assert state_of(job)["left_out"] == 4


def test_a_run_with_a_step_left_out_goes_on_to_the_same_numbers(tiny_base: Path, tmp_path: Path) -> None:
    whole = broken(make_job(tiny_base, tmp_path / "whole"), [3])
    seen = run(whole)
    first = next(metrics.step for metrics in seen if metrics.train_loss is None)
    parts = broken(make_job(tiny_base, tmp_path / "parts"), [3])
    with pytest.raises(RunStopped):
        run(parts, stop_at=first)
    assert [m.train_loss for m in run(parts)] == [m.train_loss for m in seen[first:]]
    assert all(torch.equal(tensor, adapter(parts)[name]) for name, tensor in adapter(whole).items())


def test_several_broken_steps_in_a_row_pause_the_run_with_its_last_good_state(tiny_base: Path, tmp_path: Path) -> None:
    job = broken(make_job(tiny_base, tmp_path, batch_size=2, checkpoints=1), range(1, 24))
    seen: list[StepMetrics] = []
    with pytest.raises(DivergedError, match=f"{LEFT_OUT_IN_A_ROW} steps in a row") as ended:
        train(job, seen.append, lambda: None)
    assert "learning_rate_multiplier" in (ended.value.hint or "")
    assert [metrics.train_loss for metrics in seen[-LEFT_OUT_IN_A_ROW:]] == [None] * LEFT_OUT_IN_A_ROW
    assert state_of(job)["step"] == seen[-1].step
    assert all(tensor.isfinite().all() for tensor in load_file(job.folder / "latest" / "state.safetensors").values())
    with pytest.raises(DivergedError):
        train(job, seen.append, lambda: None)
    assert seen[LEFT_OUT_IN_A_ROW].step == LEFT_OUT_IN_A_ROW + 1  # it went on behind the broken steps


def test_weights_that_broke_do_not_take_the_place_of_a_good_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    options = {"learning_rate": 1e39, "schedule": "constant", "warmup_share": 0.0, "checkpoints": 24}
    job = make_job(tiny_base, tmp_path, **options)
    with pytest.raises(DivergedError):
        run(job)
    assert not (job.folder / "latest").exists()  # the first step broke them


def test_speed_is_that_of_training_without_validations(tiny_base: Path, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path, validations=24)
    result = train(job, lambda metrics: None, lambda: None)
    assert result.trained_tokens / result.tokens_per_second < 0.95 * result.seconds
