"""What a base model's ``config.json`` says of it, read without the libraries that run it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from luthier.errors import InputError
from luthier.records.base_model import ModelKind, ModelShape
from luthier.records.training import AdapterShape

ENCODER_TYPES = frozenset({"bert", "roberta", "distilbert", "electra", "mpnet", "modernbert", "deberta-v2"})
POSITIONS_BEHIND_PADDING = frozenset({"roberta", "mpnet"})  # their first position is the padding token's id plus one
PLAIN_MLP = ENCODER_TYPES - {"modernbert"} | {"bloom", "falcon", "gpt2", "gpt_neox", "mpt", "opt", "phi", "starcoder2"}
FUSED_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})  # see luthier.llm.engine.fused_decoder
BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2}
# fmt: off
ROW_FAMILIES = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "ernie4_5_moe", "exaone4", "flex_olmo", "gemma",
    "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_neox", "granite", "granitemoe", "granitemoeshared", "helium",
    "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "olmo", "olmo2",
    "olmo3", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "starcoder2",
})
# fmt: on
"""Decoders whose tokens meet in attention alone, and whose attention takes ours (``tests/llm/test_families.py``)."""
ROW_LAYERS = frozenset({"full_attention", "sliding_attention"})
OTHER_ATTENTION = ("attn_logit_softcapping", "use_bidirectional_attention")
ROPES_BY_LENGTH = frozenset({"dynamic", "longrope"})
UNBOUNDED = 1 << 31
UNSTATED_CONTEXT = 2048  # what a chat format takes too
OTHER_NAMES = {
    "num_attention_heads": ("n_heads", "n_head"),
    "num_hidden_layers": ("n_layers", "n_layer"),
    "hidden_size": ("dim", "n_embd", "d_model"),
    "intermediate_size": ("hidden_dim", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
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
    for name, others in OTHER_NAMES.items():
        found = next((config[other] for other in others if config.get(other) is not None), None)
        if config.get(name) is None and found is not None:
            config[name] = found
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


def rows_up_to(config: Mapping[str, Any]) -> int:
    """Return how many tokens an example may have that is packed into a row; 0 where a model cannot take rows.

    Rows are for models in which tokens meet in attention alone, and for examples that their attention sees whole.
    """
    kinds = set(config.get("layer_types") or ())
    known = config.get("model_type") in ROW_FAMILIES and kinds <= ROW_LAYERS
    if not known or any(config.get(name) for name in OTHER_ATTENTION):
        return 0
    slides = "sliding_attention" in kinds if kinds else config.get("use_sliding_window", True)
    window = config.get("sliding_window") if slides else None
    return min(int(window or UNBOUNDED), same_positions_up_to(config))


def same_positions_up_to(config: Mapping[str, Any]) -> int:
    """Return up to which length a model's positions do not depend on the longest text of its batch."""
    ropes = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for rope in (ropes, *(found for found in ropes.values() if isinstance(found, dict))):
        if rope.get("rope_type", rope.get("type")) in ROPES_BY_LENGTH:
            name = "original_max_position_embeddings"
            return int(config.get(name) or rope.get(name) or config.get("max_position_embeddings") or 0)
    return UNBOUNDED


ADAPTER_FILE = "adapter_model.safetensors"
USUAL_ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "lora_bias": False,
    "trainable_token_indices": None,
    "target_parameters": None,
}


def read_adapter(folder: Path) -> AdapterShape:
    """Read what an adapter is from its ``adapter_config.json``, as PEFT writes it.

    Raises:
        InputError: there is none that says it, it is of a kind that is not known here, or has no safetensors.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        strange = [name for name, usual in USUAL_ADAPTER.items() if (config.get(name) or usual) != usual]
        if strange:
            said = ", ".join(f"{name}={config[name]!r}" for name in strange)
            raise InputError(f"{path} is of a kind of adapter that is not known here: {said}.")
        if not (folder / ADAPTER_FILE).is_file():
            raise InputError(
                f"{folder} has no {ADAPTER_FILE}; formats that can run code when they are loaded are refused.",
                hint="save it with a newer PEFT, which writes safetensors",
            )
        mode: Literal["lora", "rslora", "dora"] = "lora"
        if config.get("use_rslora") or config.get("use_dora"):
            mode = "dora" if config.get("use_dora") else "rslora"
        return AdapterShape(
            mode=mode,
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout") or 0.0,
            base=config.get("base_model_name_or_path"),
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} does not say which rank and scale its adapter has.") from error


def read_shape(folder: Path, parameters: int) -> ModelShape:
    """Read the sizes of a model from its folder.

    Raises:
        InputError: there is no config.json, or it lacks a size.
    """
    config = read_config(folder)
    try:
        heads = config.get("num_attention_heads") or 1  # some mix tokens without attention
        return ModelShape(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            intermediate=config.get("intermediate_size") or 4 * config["hidden_size"],
            heads=heads,
            key_heads=config.get("num_key_value_heads") or heads,
            vocabulary=config["vocab_size"],
            context_length=context_length(config) or UNSTATED_CONTEXT,
            parameters=parameters,
            mlp_matrices=2 if config.get("model_type") in PLAIN_MLP else 3,
            head_width=config.get("head_dim") or 0,
            head_norms=config.get("model_type") == "qwen3",
            fused=_is_fused(config),
            bytes_per_number=BYTES_OF.get(config.get("dtype") or config.get("torch_dtype") or "float32", 2),
            rows_up_to=rows_up_to(config),
        )
    except KeyError as error:
        raise InputError(f"The config.json in {folder} does not say {error}.") from error


def _is_fused(config: dict[str, Any]) -> bool:
    """Return whether a model's layers run as fused functions where nothing but its weights is asked of them."""
    known = config.get("model_type") in FUSED_TYPES and config.get("hidden_act") == "silu"
    return known and rows_up_to(config) == UNBOUNDED
