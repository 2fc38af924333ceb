"""Makes one plain model folder of a base and an adapter, or of a model that was trained whole.

Tensor by tensor on the processor, straight from file to file: sums in float32, saved in the precision of the base's
own files, and never more than one file of weights in memory. An adapter that was trained over a base in few bits is
merged into the numbers that those bits stand for: what is served is what was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from luthier.llm.base_bits import Bits, read_base_bits
from luthier.llm.engine.gradual import Holding, hold, is_explained, outline, own_names
from luthier.llm.engine.held_linear import holdable
from luthier.llm.engine.quantised import quantise
from luthier.llm.engine.torch_model import copy_tokenizer, is_encoder, load_base
from luthier.llm.engine.weight_files import WeightFiles, save_weights
from luthier.llm.pad_token import pad_token, write_pad_token

PREFIX = "base_model.model."  # of the names in an adapter's file


def save_merged(base_folder: Path, adapter_folder: Path, destination: Path) -> None:
    """Write base + adapter as one plain model (safetensors), with the base's tokenizer and chat template."""
    adapter, files = _Adapter.read(adapter_folder), WeightFiles(base_folder)
    labelled = (adapter_folder / "config.json").is_file()  # the classes are the adapter's
    kind = AutoModelForSequenceClassification if labelled else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(adapter_folder if labelled else base_folder, local_files_only=True)
    model = outline(kind, config)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if is_explained(model, files, adapter.whole) and adapter.layers <= linear:
        tensors = _merged(model, files, adapter)
    else:  # an encoder, as a rule: its files have names of their own; or GPT-2, whose weights lie the other way round
        base = load_base(base_folder, "float32", kind=kind, on=torch.device("cpu"), config=config)
        tensors = _merged_by_peft(base, adapter_folder, adapter.bits)
    _save(model, tensors, files.dtype, base_folder, destination)


def save_whole(base_folder: Path, trained_folder: Path, destination: Path) -> None:
    """Write a model that was trained whole as :func:`save_merged` does one with an adapter.

    What was only held while its neighbours were trained, rounded perhaps, is taken from the base.
    """
    trained, base = WeightFiles(trained_folder), WeightFiles(base_folder)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in trained.names:
            tensor = trained.read(name)
            yield name, base.read(name) if tensor.dtype != torch.float32 and name in base else tensor

    config = AutoConfig.from_pretrained(trained_folder, local_files_only=True)
    labelled = "ForSequenceClassification" in config.architectures[0]
    kind = AutoModelForSequenceClassification if labelled else AutoModelForCausalLM
    _save(outline(kind, config), tensors(), base.dtype, base_folder, destination)


@dataclass(frozen=True)
class _Adapter:
    """A low-rank adapter on disk. ``whole`` are the names of tensors that it replaces, ``layers`` those it adds to."""

    files: WeightFiles
    scale: float
    bits: Bits | None
    whole: frozenset[str]
    layers: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> _Adapter:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        rank = config["r"]
        files = WeightFiles(folder)
        names = [name.removeprefix(PREFIX) for name in files.names]
        return cls(
            files,
            config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank),
            read_base_bits(folder),
            frozenset(name for name in names if ".lora_" not in name),
            frozenset(name.partition(".lora_")[0] for name in names if ".lora_" in name),
        )

    def replacing(self, name: str) -> torch.Tensor:
        """Return the tensor that stands in for the base's."""
        return self.files.read(PREFIX + name)

    def added(self, layer: str, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return a layer's weight with what the adapter adds to it, in float32 (see PEFT's own ``merge``)."""
        down_RI, up_OR = (self.files.read(f"{PREFIX}{layer}.lora_{part}.weight").float() for part in "AB")
        merged_OI = torch.addmm(weight_OI.float(), up_OR, down_RI, alpha=self.scale)
        magnitude = f"{PREFIX}{layer}.lora_magnitude_vector"
        if magnitude in self.files:  # DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5)
            merged_OI *= (self.files.read(magnitude).float() / torch.linalg.norm(merged_OI, dim=1))[:, None]
        return merged_OI


def _merged(model: Any, files: WeightFiles, adapter: _Adapter) -> Iterator[tuple[str, torch.Tensor]]:
    rounded = {f"{name}.weight" for name in holdable(model)} if adapter.bits else set()
    for name in own_names(model):
        if name in adapter.whole:
            yield name, adapter.replacing(name)
            continue
        tensor, layer = files.read(name), name.removesuffix(".weight")
        if adapter.bits and name in rounded:
            tensor = quantise(tensor, adapter.bits).whole(torch.float32)
        yield name, adapter.added(layer, tensor) if layer in adapter.layers else tensor
    parameters = {name for name, _ in model.named_parameters()}
    yield from ((name, files.read(name)) for name in model.state_dict() if name not in parameters)


def _merged_by_peft(base: Any, adapter_folder: Path, bits: Bits | None) -> Iterator[tuple[str, torch.Tensor]]:
    base.requires_grad_(False)
    hold(base, Holding(torch.float32, bits, rounded=True))
    merged = PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    tied = merged.all_tied_weights_keys
    yield from ((name, tensor) for name, tensor in merged.state_dict().items() if name not in tied)


def _save(
    model: Any, tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, base_folder: Path, destination: Path
) -> None:
    """Write tensors with the configuration of an outline, in a number type, beside the base's tokenizer."""
    save_weights(
        ((name, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in tensors), destination
    )
    model.config.dtype = dtype
    model.config.use_cache = True
    model.config.architectures = [type(model).__name__]
    reads_the_end = hasattr(model, "score") and not is_encoder(base_folder)
    pad = pad_token(base_folder) if reads_the_end else None
    if reads_the_end:
        model.config.pad_token_id = pad[0] if pad else None
    model.config.save_pretrained(destination)
    copy_tokenizer(base_folder, destination)
    if pad:
        write_pad_token(destination, pad[1])
    if model.can_generate() and not (destination / "generation_config.json").is_file():
        model.generation_config.save_pretrained(destination)
