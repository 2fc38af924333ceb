"""A merged model folder → one GGUF file, which OpenVINO, llama.cpp, Ollama and LM Studio read.

The file is made from the model folder alone: sizes from ``config.json``, vocabulary and merges from
``tokenizer.json``, the chat template as it stands. Layout after llama.cpp's own converter: for the Llama family the
rows of q and k are permuted from the halves order of transformers to the interleaved order of ggml's rotary embedding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

from luthier.errors import InputError, did_you_mean
from luthier.llm.engine.weight_files import WeightFiles

Quantization = Literal["q8_0", "f16"]
TYPES: dict[Quantization, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}
ARCHITECTURES = {
    "LlamaForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "Qwen2ForCausalLM": (gguf.MODEL_ARCH.QWEN2, False),
    "Qwen3ForCausalLM": (gguf.MODEL_ARCH.QWEN3, False),
}
Q8_BLOCK = 32
HEAD = "lm_head.weight"
# llama.cpp's name for how a byte-level vocabulary splits text before merging, by a piece of the splitting pattern.
PRE_TOKENIZERS = {"smollm": "Digits", "llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}|"}


def write_gguf(folder: Path, destination: Path, quantization: Quantization, name: str = "") -> None:
    """Write the model in ``folder`` as a GGUF file.

    Raises:
        InputError: the architecture or the tokenizer cannot be written as GGUF here.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    architecture, permuted = _architecture(config)
    tensor_type, file_type = TYPES[quantization]
    writer = GGUFWriter(destination, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type("model")
    writer.add_name(name or folder.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config, file_type)
    _add_tokenizer(writer, folder, config)
    files = WeightFiles(folder)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    tensors = [name for name in files.names if not (name == HEAD and config.get("tie_word_embeddings", False))]
    kinds = {name: _tensor_type(files.shape(name), tensor_type) for name in tensors}
    for name in tensors:
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise InputError(f"The tensor {name!r} has no place in a GGUF file of {config['architectures'][0]}.")
        _announce(writer, target, files.shape(name), kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in tensors:  # one after the other: the model never lies in memory whole
        values = files.read(name).float().numpy()
        values = _permute(name, values, config) if permuted else values
        writer.write_tensor_data(gguf.quants.quantize(values, kinds[name]))
    writer.close()


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    """Say what a tensor will be, ahead of its numbers."""
    sizes = gguf.quant_shape_to_byte_shape(shape, kind)
    stored = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind)
    writer.add_tensor_info(
        name, sizes if stored is None else shape, np.dtype(stored or np.uint8), math.prod(sizes), raw_dtype=kind
    )


def _architecture(config: dict[str, Any]) -> tuple[gguf.MODEL_ARCH, bool]:
    name = (config.get("architectures") or ["unknown"])[0]
    if name not in ARCHITECTURES:
        raise InputError(
            f"A model of the architecture {name!r} cannot be exported to GGUF here.{did_you_mean(name, ARCHITECTURES)}",
            hint="its adapter and merged safetensors are complete and load in transformers",
        )
    return ARCHITECTURES[name]


def _add_sizes(writer: GGUFWriter, config: dict[str, Any], file_type: LlamaFileType) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"Rotary embeddings of the type {kind!r} cannot be exported to GGUF here.")
    writer.add_file_type(file_type)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    head_width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_rope_dimension_count(head_width)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    if tokenizer["model"]["type"] != "BPE" or tokenizer["model"].get("byte_fallback"):
        raise InputError("Only byte-level BPE tokenizers can be exported to GGUF here.")
    pieces, kinds = _vocabulary(tokenizer, config["vocab_size"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    ids = {piece: index for index, piece in enumerate(pieces)}
    for key, add in {
        "bos_token": writer.add_bos_token_id,
        "eos_token": writer.add_eos_token_id,
        "unk_token": writer.add_unk_token_id,
        "pad_token": writer.add_pad_token_id,
    }.items():
        piece = settings.get(key)
        piece = piece["content"] if isinstance(piece, dict) else piece
        if piece in ids:
            add(ids[piece])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if (folder / "chat_template.jinja").is_file():
        writer.add_chat_template((folder / "chat_template.jinja").read_text("utf-8"))


def _vocabulary(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    pieces = [f"[unused{index}]" for index in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    for piece, index in tokenizer["model"]["vocab"].items():
        pieces[index], kinds[index] = piece, int(TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        pieces[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    return pieces, kinds


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    description = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False).replace("\\\\", "\\")
    return next((name for name, mark in PRE_TOKENIZERS.items() if mark in description), "gpt-2")


def _permute(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    heads = config["num_attention_heads"]
    if name.endswith(("k_proj.weight", "k_proj.bias")):
        heads = config.get("num_key_value_heads", heads)
    elif not name.endswith(("q_proj.weight", "q_proj.bias")):
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _tensor_type(shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if wanted == GGMLQuantizationType.Q8_0 and shape[-1] % Q8_BLOCK:
        return GGMLQuantizationType.F16
    return wanted
