"""Checkpoints of runs as models: kept at the end of epochs, found by name, made ready for serving when first asked."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from luthier.errors import EngineError, NotFoundError
from luthier.records.access import DEFAULT_PROJECT
from luthier.records.fine_tuning import Checkpoint
from luthier.records.model import ArtifactKind, folder_name
from luthier.records.run import Run
from luthier.records.stored import now
from luthier.store.artifacts import folder_bytes
from luthier.store.store import Store

EPOCHS_KEPT = 3
STATE_FOLDER = "checkpoints"  # in the run's folder: what a run goes on from, which is no model yet
NAME = re.compile(r"ft:.+:ckpt-step-\d+")
MAKER = (sys.executable, "-m", "luthier.workflows.checkpoint_form")
SERVED: ArtifactKind = "gguf-f16"
FORMS: tuple[ArtifactKind, ...] = ("adapter", SERVED)


def is_checkpoint(name: str) -> bool:
    """Return whether a model's name is that of a checkpoint."""
    return NAME.fullmatch(name) is not None


def keep_checkpoint(
    store: Store, run: Run, base: str, model: str, weights: Path, step: int, metrics: dict[str, float]
) -> Checkpoint:
    """Keep the adapter in the folder ``weights`` as the checkpoint of a step of a run; those of old epochs go.

    A checkpoint that is there already, from before the run was killed, is kept as it is.

    Args:
        store: Where it is kept.
        run: Whose it is.
        base: The base model's id.
        model: The name that the run's model will have.
        weights: The adapter's files.
        step: The step that it was made after.
        metrics: What was measured at that step.
    """
    name, id = f"{model}:ckpt-step-{step}", f"ftckpt_{run.id.removeprefix('train-')}-{step}"
    adapter = store.models.add_artifact(name, "adapter", lambda folder: _copy(weights, folder))
    try:
        return store.checkpoints.get(run.project, id)
    except NotFoundError:
        checkpoint = store.checkpoints.add(
            Checkpoint(
                id=id,
                project=run.project,
                created_at=now(),
                parent=run.id,
                model=name,
                base=base,
                step=step,
                metrics=metrics,
                adapter=adapter,
            )
        )
    for old in list(store.checkpoints.all(run.project, parent=run.id, order="desc"))[EPOCHS_KEPT:]:
        remove_checkpoint(store, old)
    return checkpoint


def _copy(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        shutil.copy(path, folder / path.name)


def checkpoint_named(store: Store, project: str | None, name: str) -> Checkpoint:
    """Return a project's checkpoint by its name.

    Raises:
        NotFoundError: the project has none of that name.
    """
    found = store.checkpoints.page(project or DEFAULT_PROJECT, model=name, limit=1).items
    if not found:
        raise NotFoundError(f"There is no checkpoint {name!r}; the last {EPOCHS_KEPT} epochs of a job are kept.")
    return found[0]


def remove_checkpoint(store: Store, checkpoint: Checkpoint) -> None:
    """Delete a checkpoint: its record first, so that whatever is listed is there."""
    store.checkpoints.remove(checkpoint.project, checkpoint.id)
    for permission in list(store.permissions.all(checkpoint.project, parent=checkpoint.model)):
        store.permissions.remove(permission.project, permission.id)
    for kind in FORMS:
        store.artifacts.remove(_key(checkpoint, kind))


def remove_checkpoints(store: Store, project: str, run_id: str) -> None:
    """Delete all checkpoints of a run."""
    for checkpoint in list(store.checkpoints.all(project, parent=run_id)):
        remove_checkpoint(store, checkpoint)


def checkpoint_bytes(store: Store, checkpoint: Checkpoint) -> int:
    """Return what a checkpoint takes on disk, in bytes."""
    return sum(folder_bytes(store.artifacts.path(_key(checkpoint, kind))) for kind in FORMS)


def served_place(store: Store, checkpoint: Checkpoint) -> Path:
    """Return the folder from which a checkpoint is served, whether it is there already or not."""
    return store.artifacts.path(_key(checkpoint, SERVED))


def checkpoint_folder(store: Store, checkpoint: Checkpoint) -> Path:
    """Return the folder from which a checkpoint is served; it is made on first use, in a process of its own.

    Raises:
        EngineError: it could not be made.
    """
    folder = served_place(store, checkpoint)
    if folder.is_dir():
        return folder
    command = [*MAKER, "--home", str(store.home), "--project", checkpoint.project, "--id", checkpoint.id]
    made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if not folder.is_dir():
        last = (made.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EngineError(f"The checkpoint {checkpoint.model!r} could not be made ready for serving: {last}")
    return folder


def _key(checkpoint: Checkpoint, kind: ArtifactKind) -> str:
    return f"models/{folder_name(checkpoint.model)}/{kind}"
