"""The model that a run trains: the base, frozen or not, in the precision and with the adapter of its mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForSequenceClassification

from luthier.errors import InputError
from luthier.llm.engine.encoder_model import EncoderModel
from luthier.llm.engine.quantised import quantise_model
from luthier.llm.engine.row_model import RowModel
from luthier.llm.engine.torch_model import DTYPES, is_encoder, load_base
from luthier.records.objectives import product
from luthier.records.training import Resolved

HEADS = ("score", "classifier")


def load_trainable(
    base_folder: Path, resolved: Resolved, labels: tuple[str, ...] = (), start_adapter: Path | None = None
) -> RowModel | EncoderModel:
    """Return the model to train, with gradients on exactly what is trained.

    ``labels`` are the classes of a classifier. With ``start_adapter`` training goes on from that adapter.

    Raises:
        InputError: the adapter belongs to another architecture, or the mode does not fit the model.
    """
    torch.manual_seed(resolved.seed)
    model = _load(base_folder, resolved, labels)
    if resolved.mode == "qlora":
        quantise_model(model, resolved.base_bits)
    if resolved.has_adapter:
        model = _with_adapter(model, resolved, start_adapter)
    elif resolved.mode == "last_layers":
        _train_last_layers(model, resolved.last_layers)
    else:
        model.requires_grad_(True)
    dtype = DTYPES[resolved.precision]
    if is_encoder(base_folder):
        return EncoderModel(model, dtype, recompute=resolved.recompute)
    return RowModel(model, dtype, recompute=resolved.recompute)


def _load(base_folder: Path, resolved: Resolved, labels: tuple[str, ...]) -> Any:
    # Weights that are trained stay in float32 and are rounded where they are used; frozen ones are held as used.
    precision = resolved.precision if resolved.has_adapter else "float32"
    kind = product(resolved.method)
    if kind == "generator":
        return load_base(base_folder, precision)
    names = dict(enumerate(labels)) or {0: "score"}
    model = load_base(
        base_folder,
        precision,
        kind=AutoModelForSequenceClassification,
        num_labels=len(names),
        id2label=names,
        label2id={name: index for index, name in names.items()},
        problem_type="single_label_classification" if labels else "regression",
    )
    for name in HEADS:
        if hasattr(model, name):
            getattr(model, name).float()
    return model


def _with_adapter(model: Any, resolved: Resolved, start_adapter: Path | None) -> Any:
    if start_adapter is not None:
        adapted = _resume_adapter(model, start_adapter)
    else:
        config = LoraConfig(
            r=resolved.lora_rank,
            lora_alpha=resolved.lora_alpha,
            lora_dropout=resolved.lora_dropout,
            use_rslora=resolved.mode == "rslora",
            use_dora=resolved.mode == "dora",
            target_modules="all-linear",
            task_type="CAUSAL_LM" if product(resolved.method) == "generator" else "SEQ_CLS",
        )
        adapted = get_peft_model(model, config)  # PEFT keeps the adapter in float32 over a bfloat16 base
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # autocast takes bfloat16 inputs as they are; no detour by float32
    return adapted


def _resume_adapter(model: Any, folder: Path) -> Any:
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"The adapter in {folder.name} does not fit this base: {str(error).splitlines()[0]}",
            hint="continue from an adapter that was trained on the same base model",
        ) from error


def _train_last_layers(model: Any, count: int) -> None:
    """Train the last layers, what comes behind them, and the head; embeddings stay (so does a head tied to them)."""
    model.requires_grad_(False)
    backbone = getattr(model, model.base_model_prefix)
    layers = getattr(backbone, "layers", None) or backbone.encoder.layer
    for layer in layers[-count:]:
        layer.requires_grad_(True)
    for owner, name in ((backbone, "norm"), (backbone, "pooler"), *((model, head) for head in HEADS)):
        module = getattr(owner, name, None)
        if module is not None:
            module.requires_grad_(True)
