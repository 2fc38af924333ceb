"""The model that a run trains: the base, frozen or not, in the precision and with the adapter of its mode."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from luthier.errors import InputError, did_you_mean
from luthier.llm.base_bits import Bits, read_base_bits
from luthier.llm.engine.encoder_model import EncoderModel
from luthier.llm.engine.gradual import Holding
from luthier.llm.engine.row_model import RowModel
from luthier.llm.engine.torch_model import (
    DTYPES,
    device,
    has_exact_integers,
    heads,
    is_encoder,
    load_base,
    load_held,
)
from luthier.records.objectives import product
from luthier.records.training import Resolved
from luthier.train.hyperparameters import NO_INTEGERS


def load_trainable(
    base_folder: Path, resolved: Resolved, labels: tuple[str, ...] = (), start_adapter: Path | None = None
) -> RowModel | EncoderModel:
    """Return the model to train, with gradients on exactly what is trained.

    ``labels`` are the classes of a classifier. With ``start_adapter`` training goes on from that adapter.

    Raises:
        InputError: the adapter belongs to another architecture, the mode or the method does not fit the model, or the
            precision not the machine.
    """
    torch.manual_seed(resolved.seed)
    if resolved.precision == "int8" and not has_exact_integers(device()):
        raise InputError(NO_INTEGERS.format(where="this machine"), hint="start the run again with precision=auto")
    model = _load(base_folder, resolved, labels, start_adapter)
    if product(resolved.method) != "generator" and not is_encoder(base_folder) and not hasattr(model, "score"):
        raise InputError(
            f"A {model.config.model_type} labels texts with a head that is not known here.",
            hint="take a base of another family, such as smollm2-135m",
        )
    if resolved.has_adapter:
        model = _with_adapter(model, resolved, start_adapter)
    elif resolved.mode == "full":
        model.requires_grad_(True)
    model.eval()  # PEFT's new dropouts are not, and what a preference is measured against must not be noisy
    dtype = DTYPES[resolved.numbers]
    if is_encoder(base_folder):
        return EncoderModel(model, dtype, recompute=resolved.recompute)
    return RowModel(model, dtype, recompute=resolved.recompute, integers=resolved.precision == "int8")


def _load(base_folder: Path, resolved: Resolved, labels: tuple[str, ...], start_adapter: Path | None) -> Any:
    # Weights that are trained stay in float32 and are rounded where they are used; frozen ones are held as used.
    options = {} if product(resolved.method) == "generator" else _classes(labels)
    options["longest"] = resolved.max_tokens
    dtype, bits, integers = DTYPES[resolved.numbers], _bits(resolved, start_adapter), resolved.precision == "int8"
    if resolved.mode == "last_layers":
        choose = partial(_train_last_layers, count=resolved.last_layers)
        return load_held(base_folder, Holding(dtype), choose=choose, **options)
    if bits or integers:
        holding = Holding(dtype, bits, rounded=resolved.mode != "qlora", integers=integers)
        return load_held(base_folder, holding, choose=_train_heads, **options)
    model = load_base(base_folder, resolved.numbers if resolved.has_adapter else "float32", **options)
    for _, head in heads(model):
        head.float()
    return model


def _classes(labels: tuple[str, ...]) -> dict[str, Any]:
    """Return what the head of a classifier, or of one number, needs to know."""
    names = dict(enumerate(labels)) or {0: "score"}
    return {
        "kind": AutoModelForSequenceClassification,
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "problem_type": "single_label_classification" if labels else "regression",
    }


def _bits(resolved: Resolved, start_adapter: Path | None) -> Bits | None:
    """Return the bits of the base: in mode qlora, or as an adapter that is trained on has it."""
    known = read_base_bits(start_adapter) if start_adapter else None
    if resolved.mode != "qlora":
        return known
    if known and known != resolved.base_bits:
        raise InputError(
            f"The adapter to go on from was trained over a base in {known} bits, not {resolved.base_bits}.",
            hint=f"set base_bits={known}",
        )
    return resolved.base_bits


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
            target_modules=_adapted_layers(model, resolved),
            modules_to_save=[name for name, _ in heads(model)] or None,  # whole: they may start at random
            task_type="CAUSAL_LM" if product(resolved.method) == "generator" else "SEQ_CLS",
        )
        adapted = get_peft_model(model, config)  # PEFT keeps the adapter in float32 over a bfloat16 base
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # autocast takes bfloat16 inputs as they are; no detour by float32
    return adapted


def _adapted_layers(model: Any, resolved: Resolved) -> list[str] | str:
    """Return the names of the layers that get an adapter, as PEFT takes them.

    Raises:
        InputError: the model has no linear layer of a name.
    """
    if not resolved.lora_layers:
        return "all-linear"
    known = {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear_within(name, module)}
    for name in resolved.lora_layers:
        if name not in known:
            raise InputError(
                f"lora_layers: a {model.config.model_type} has no linear layer {name!r} to adapt."
                f"{did_you_mean(name, known)}",
                hint=f"of {', '.join(sorted(known))}",
            )
    return list(resolved.lora_layers)


def _is_linear_within(name: str, module: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer of a numbered block: neither an embedding nor a head."""
    return isinstance(module, torch.nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))


def _resume_adapter(model: Any, folder: Path) -> Any:
    hint = "continue from an adapter that was trained on the same base model with the same method"
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        # The name that is stored there is ours: PEFT would look for it in the hub whenever it saves.
        adapted.peft_config["default"].base_model_name_or_path = model.name_or_path
    except (RuntimeError, ValueError, OSError) as error:
        message = str(error).strip().splitlines()[0]
        raise InputError(f"The adapter in {folder.name} does not fit this base: {message}", hint=hint) from error
    # PEFT is silent about layers that the adapter lacks, and about those that only the adapter has.
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        different = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
    if different:
        raise InputError(
            f"The adapter in {folder.name} does not fit this base: {len(different):,} of their tensors have no "
            f"counterpart, such as {min(different)}.",
            hint=hint,
        )
    return adapted


def _train_heads(model: Any) -> None:
    model.requires_grad_(False)
    for _, head in heads(model):
        head.requires_grad_(True)


def _train_last_layers(model: Any, count: int) -> None:
    """Train the last layers, what comes behind them, and the head; embeddings stay (so does a head tied to them)."""
    model.requires_grad_(False)
    backbone = getattr(model, model.base_model_prefix)
    norms = [module for name, module in backbone.named_children() if name in ("norm", "final_norm")]
    behind = [module for module in model.children() if module is not backbone]
    for module in (*_layers(backbone)[-count:], *norms, *behind, *(head for _, head in heads(model))):
        module.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)


def _layers(backbone: Any) -> Any:
    """Return the numbered layers of a decoder or encoder."""
    for stack in (backbone, getattr(backbone, "encoder", None), getattr(backbone, "transformer", None)):
        for name in ("layers", "layer"):
            if isinstance(getattr(stack, name, None), torch.nn.ModuleList):
                return getattr(stack, name)
    raise InputError(f"Mode last_layers does not know the layers of {type(backbone).__name__}.", hint="use mode lora")
