"""The weights of a model folder, read and written one tensor after the other: a whole model never lies in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FILE_BYTES = 1_000_000_000
INDEX = "model.safetensors.index.json"


class WeightFiles:
    """The tensors of all safetensors files in a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._paths: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._paths |= dict.fromkeys(file.keys(), path)

    @property
    def names(self) -> list[str]:
        """The names of the tensors, file by file."""
        return list(self._paths)

    @property
    def bytes(self) -> int:
        """The size of the files."""
        return sum(path.stat().st_size for path in set(self._paths.values()))

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the first tensor that holds fractions, which is that of a model's weights."""
        return next(dtype for name in self._paths if (dtype := self.read(name).dtype).is_floating_point)

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, by its file's header alone."""
        with safe_open(self._paths[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor. It is a view of its file: what is to be kept must be copied."""
        # A file that stays open stays mapped, and what was read of it counts as memory: each tensor opens it anew.
        with safe_open(self._paths[name], "pt") as file:
            return file.get_tensor(name)


def save_weights(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write tensors as they come, as transformers names a model's files; no more than one file is held in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    names: list[list[str]] = []
    total = 0
    for index, group in enumerate(_groups(tensors)):
        save_file(group, folder / f".part-{index}", metadata={"format": "pt"})
        names.append(list(group))
        total += sum(tensor.nbytes for tensor in group.values())
        group.clear()  # before the next one is gathered
    _name_files(folder, names, total)


def _groups(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Gather tensors into files of at most :data:`FILE_BYTES`; a larger tensor has a file of its own."""
    group: dict[str, torch.Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if group and held + tensor.nbytes > FILE_BYTES:
            yield group
            group, held = {}, 0
        group[name] = tensor.contiguous()
        held += tensor.nbytes
    yield group


def _name_files(folder: Path, names: list[list[str]], total: int) -> None:
    if len(names) == 1:
        (folder / ".part-0").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for index, inside in enumerate(names):
        file = f"model-{index + 1:05}-of-{len(names):05}.safetensors"
        (folder / f".part-{index}").rename(folder / file)
        places |= dict.fromkeys(inside, file)
    table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(table, indent=2), "utf-8")
