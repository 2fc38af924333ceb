"""Checkpoints: all that a run needs to go on as if nothing had happened, in safetensors and JSON.

A checkpoint is a folder that appears whole: it is written beside its place and renamed. It holds the adapter, the
optimizer's two moments, the random state, and the step; the position in the data follows from step and seed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping

from luthier.errors import ConflictError
from luthier.llm.base_bits import write_base_bits
from luthier.llm.engine.weight_files import save_weights

LATEST = "latest"
BEST = "best"
EPOCH = "epoch"
TENSORS = "state.safetensors"
STATE = "state.json"
RANDOM = "random"
ADAPTER = "default"
WEIGHT = "weight"


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Save the state of a run as its latest checkpoint; the one before is replaced only once this one is whole."""
    tensors = {RANDOM: torch.get_rng_state()}
    for index, state_of_device in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ()):
        tensors[f"{RANDOM}.{index}"] = state_of_device
    for name, parameter in trainable(model).items():
        tensors[f"{WEIGHT}/{name}"] = parameter.detach().cpu()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value.detach().cpu()
    with _replacing(folder / LATEST) as staged:
        save_file(tensors, staged / TENSORS)
        (staged / STATE).write_text(json.dumps(state))


def check_checkpoint(folder: Path, fingerprint: str) -> None:
    """Refuse to go on from a checkpoint of something else, before anything is done.

    Raises:
        ConflictError: the checkpoint belongs to other data or other options.
    """
    _read_state(folder, fingerprint)


def load_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str
) -> dict[str, Any] | None:
    """Restore the latest checkpoint into a model and its optimizer; return its state, None where there is none.

    Raises:
        ConflictError: the checkpoint belongs to other data or other options.
    """
    found = _read_state(folder, fingerprint)
    if found is None:
        return None
    latest, state = found
    tensors = load_file(latest / TENSORS)
    fused = bool(optimizer.defaults.get("fused"))  # then the count of steps lies with the parameter
    parameters = trainable(model)
    for label, tensor in tensors.items():
        key, _, name = label.partition("/")
        if key == WEIGHT:
            parameters[name].data.copy_(tensor)
        elif name:
            parameter = parameters[name]
            optimizer.state[parameter][key] = tensor.to("cpu" if key == "step" and not fused else parameter.device)
    torch.set_rng_state(tensors[RANDOM])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"{RANDOM}.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"{RANDOM}.{index}"], index)
    return state


def _read_state(folder: Path, fingerprint: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder of the latest checkpoint and its state, None where there is none."""
    # Killed between the two renames of a replacement, the one before is whole under its other name.
    places = [place for place in (folder / LATEST, _old(folder / LATEST)) if (place / STATE).is_file()]
    if not places:
        return None
    state: dict[str, Any] = json.loads((places[0] / STATE).read_text())
    if state["fingerprint"] != fingerprint:
        raise ConflictError(
            "The checkpoint of this run was made with other examples or options, so it cannot go on from it.",
            hint="start a new run",
        )
    return places[0], state


def save_best(folder: Path, model: Any, base: str) -> None:
    """Save the adapter as the best so far, in PEFT's own files; ``base`` is written as the model that it belongs to.

    A model without an adapter is saved whole, in transformers' own files.
    """
    _save_weights(folder / BEST, model, base)


def save_epoch(folder: Path, model: Any, base: str) -> Path:
    """Save the adapter as that of the latest epoch, as :func:`save_best` does, and return its folder."""
    _save_weights(folder / EPOCH, model, base)
    return folder / EPOCH


def _save_weights(target: Path, model: Any, base: str) -> None:
    with _replacing(target) as staged:
        if hasattr(model, "peft_config"):
            _save_adapter(staged, model, base)
        else:
            _save_whole(staged, model)


def _save_adapter(folder: Path, model: Any, base: str) -> None:
    model.save_pretrained(folder)
    if model.peft_config[ADAPTER].task_type == "SEQ_CLS":
        model.config.save_pretrained(folder)  # the classes' names belong to the adapter, not to the base
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    (folder / "README.md").unlink(missing_ok=True)
    if bits := getattr(model.get_base_model(), "base_bits", None):
        write_base_bits(folder, bits)


def _save_whole(folder: Path, model: Any) -> None:
    """Write a model as transformers does; its weights may be views of one tensor, and a file holds each by itself."""
    weights = model.state_dict()
    if getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False):
        # The family's files have names of their own, which only transformers knows: a second copy of all weights.
        model.save_pretrained(folder, state_dict={name: tensor.clone() for name, tensor in weights.items()})
        return
    tied = model.all_tied_weights_keys
    save_weights(((name, tensor.to("cpu", copy=True)) for name, tensor in weights.items() if name not in tied), folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def best_folder(folder: Path) -> Path:
    """Return the folder of the best weights so far, also where a replacement of it was cut short."""
    return folder / BEST if (folder / BEST).is_dir() else _old(folder / BEST)


def load_best(folder: Path, model: Any) -> None:
    """Put the best weights so far into a model."""
    best = best_folder(folder)
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, load_file(best / "adapter_model.safetensors"))
        return
    missing = set(trainable(model))
    for path in best.glob("*.safetensors"):
        tensors = load_file(path)
        model.load_state_dict(tensors, strict=False)
        missing -= tensors.keys()
    if missing:  # under names that only transformers can read
        saved = type(model).from_pretrained(best, dtype="auto", local_files_only=True)
        model.load_state_dict(saved.state_dict())


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give a folder to write into, which then takes the place of another; where writing fails, nothing is left of it.

    Whatever moment the process is killed at, the folder before is whole, here or under its other name.
    """
    staged, old = target.with_name(f".{target.name}"), _old(target)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        for path in staged.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)  # a full disk has room again
        raise
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    staged.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(f".old-{target.name}")
