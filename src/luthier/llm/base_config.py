"""What a base model's ``config.json`` says of it, read without the libraries that run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.errors import InputError
from luthier.records.base_model import ModelKind, ModelShape

ENCODER_TYPES = frozenset({"bert", "roberta", "distilbert", "electra", "mpnet", "modernbert", "deberta-v2"})
POSITIONS_BEHIND_PADDING = frozenset({"roberta", "mpnet"})  # their first position is the padding token's id plus one
PLAIN_MLP = ENCODER_TYPES - {"modernbert"}
FUSED_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})  # see luthier.llm.engine.fused_decoder
BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2}
DISTILBERT_NAMES = {
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a model folder.

    Raises:
        InputError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no config.json that can be read, so it is no model folder.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object.")
    if config.get("model_type") == "distilbert":
        config |= {name: config[own] for name, own in DISTILBERT_NAMES.items() if own in config}
    return config


def kind_of(config: dict[str, Any]) -> ModelKind:
    """Return whether a model writes (decoder) or reads in both directions to label and embed (encoder).

    Raises:
        InputError: it is neither, or an encoder of a family that cannot be trained here.
    """
    family = config.get("model_type", "unknown")
    if family in ENCODER_TYPES:
        return "encoder"
    architecture = (config.get("architectures") or [""])[0]
    if config.get("is_encoder_decoder"):
        raise InputError(f"{architecture or family} is an encoder with a decoder; bases are one or the other.")
    if architecture.endswith("ForMaskedLM"):
        raise InputError(
            f"{architecture} is an encoder of the family {family!r}, which cannot be trained here; "
            f"those that can: {', '.join(sorted(ENCODER_TYPES))}."
        )
    return "decoder"


def context_length(config: dict[str, Any]) -> int | None:
    """Return the most tokens that a model takes, special ones included; None where its config does not say."""
    positions = config.get("max_position_embeddings")
    if positions and config.get("model_type") in POSITIONS_BEHIND_PADDING:
        return int(positions) - 1 - int(config.get("pad_token_id", 1))
    return int(positions) if positions else None


def read_shape(folder: Path, parameters: int) -> ModelShape:
    """Read the sizes of a model from its folder.

    Raises:
        InputError: there is no config.json, or it lacks a size.
    """
    config = read_config(folder)
    try:
        heads = config["num_attention_heads"]
        return ModelShape(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            key_heads=config.get("num_key_value_heads", heads),
            vocabulary=config["vocab_size"],
            context_length=context_length(config) or config["max_position_embeddings"],
            parameters=parameters,
            mlp_matrices=2 if config.get("model_type") in PLAIN_MLP else 3,
            head_width=config.get("head_dim") or 0,
            head_norms=config.get("model_type") == "qwen3",
            fused=_is_fused(config),
            bytes_per_number=BYTES_OF.get(config.get("dtype") or config.get("torch_dtype") or "float32", 2),
        )
    except KeyError as error:
        raise InputError(f"The config.json in {folder} does not say {error}.") from error


def _is_fused(config: dict[str, Any]) -> bool:
    """Return whether a model's layers run as fused functions where nothing but its weights is asked of them."""
    windows = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    windows = windows or any(kind != "full_attention" for kind in config.get("layer_types") or ())
    return config.get("model_type") in FUSED_TYPES and config.get("hidden_act") == "silu" and not windows
