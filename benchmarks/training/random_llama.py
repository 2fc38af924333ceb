"""A Llama with random weights and texts of random words: for a GPU to which no model and no data can be brought.

Weights are written a layer at a time, so that a base of 8 billion parameters needs no memory of its own.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

# fmt: off
SIZES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
}
# fmt: on
CONTEXT = 8192
SPREAD = 0.02  # of the weights, as Llama's own begin
COMMON = 10.0  # the n-th word is as frequent as 1 / (n + this), so that there is something to learn


def write_base(folder: Path, size: str) -> int:
    """Write a base model folder, unless it is there; return how many parameters it has."""
    config = LlamaConfig(
        **SIZES[size], max_position_embeddings=CONTEXT, rope_theta=500_000.0, dtype="bfloat16", bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    if not (folder / "tokenizer_config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        _write_weights(folder, shapes)
        _write_tokenizer(folder, config.vocab_size)
    return sum(shape.numel() for shape in shapes.values())


def texts(size: str, count: int, length: int) -> Iterator[list[int]]:
    """Yield so many texts of ``length`` tokens, the same every time."""
    vocabulary = SIZES[size]["vocab_size"]
    weights = list(itertools.accumulate(1 / (rank + COMMON) for rank in range(vocabulary)))
    words = random.Random(0)
    for _ in range(count):
        yield words.choices(range(vocabulary), cum_weights=weights, k=length)


def _write_weights(folder: Path, shapes: dict[str, torch.Size]) -> None:
    torch.manual_seed(0)
    files: dict[str, str] = {}
    layers = itertools.groupby(shapes, lambda name: name.rpartition(".layers.")[2].partition(".")[0])
    for number, (_, group) in enumerate(layers):
        file = f"model-{number:05}.safetensors"
        values = {name: _random(name, shapes[name]) for name in group}
        save_file(values, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(values, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, SPREAD)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    words = {str(number): number for number in range(vocabulary)}
    Tokenizer(models.WordLevel(words, "2")).save(str(folder / "tokenizer.json"))
    names = {"bos_token": "0", "eos_token": "1", "pad_token": "2", "model_max_length": CONTEXT}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
