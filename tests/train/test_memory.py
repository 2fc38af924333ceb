"""What a layer keeps of a token is what the estimate says: counted on small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.llm.base_config import read_shape
from luthier.llm.engine.row_model import RowModel
from luthier.llm.rows import pack
from luthier.records.base_model import Machine, ModelShape
from luthier.records.training import Resolved, TrainingConfig
from luthier.templates.renderer import RenderReport, TokenizedExample
from luthier.train.engine.trainable import load_trainable
from luthier.train.memory import data_bytes, memory_need
from luthier.train.plan import Material, plan_training

MACHINE = Machine(cores=2, memory_bytes=10**11, has_fast_bfloat16=True, int8_speed=4.0, matmul_flops=1e11)
TOKENS = 200
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("llama", {}),
    "fused-float32": ("llama", {"precision": "float32"}),
    "fused-int8": ("llama", {"precision": "int8"}),
    "fused-recomputed": ("llama", {"recompute": True}),
    "head norms": ("qwen3", {}),
    "unfused": ("gemma", {}),
    "dora": ("llama", {"mode": "dora"}),
    "dropout": ("llama", {"lora_dropout": 0.1}),
}


def write_base(folder: Path, family: str, layers: int) -> Path:
    config = AutoConfig.for_model(
        family,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def text(tokens: int) -> TokenizedExample:
    return TokenizedExample("a", list(range(tokens)), [False] * (tokens - 1) + [True])


def resolve(shape: ModelShape, **options: Any) -> Resolved:
    config = TrainingConfig.model_validate(options)
    return plan_training(Material([text(TOKENS)] * 4, [], RenderReport()), config, shape, MACHINE).resolved


def kept_bytes(folder: Path, resolved: Resolved, tokens: int) -> int:
    """Return the bytes that a forward pass over a text keeps for its backward pass, weights apart."""
    model = load_trainable(folder, resolved)
    assert isinstance(model, RowModel)
    model.model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    (row,) = pack([text(tokens)], 4096, share=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.targets(row).logprobs_M.sum()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_layers_below_what_is_trained_keep_nothing(tmp_path: Path) -> None:
    folder = write_base(tmp_path, "llama", 6)
    shape = read_shape(folder, 200_000)
    kept, expected = [], []
    for last in (1, 3):
        resolved = resolve(shape, mode="last_layers", last_layers=last)
        kept.append(kept_bytes(folder, resolved, TOKENS) - kept_bytes(folder, resolved, TOKENS // 2))
        expected.append(memory_need(resolved, shape).per_token * TOKENS / 2)
    assert 0.95 < (expected[1] - expected[0]) / (kept[1] - kept[0]) < 1.35


@pytest.mark.parametrize("case", CASES)
def test_what_a_layer_keeps_is_what_the_estimate_says(tmp_path: Path, case: str) -> None:
    family, options = CASES[case]
    found, expected = [], []
    for layers in (2, 4):
        folder = write_base(tmp_path / str(layers), family, layers)
        shape = read_shape(folder, 200_000)
        resolved = resolve(shape, **options)
        found.append(kept_bytes(folder, resolved, TOKENS) - kept_bytes(folder, resolved, TOKENS // 2))
        expected.append(memory_need(resolved, shape).per_token * TOKENS / 2)
    ratio = (expected[1] - expected[0]) / (found[1] - found[0])
    assert (0.99 if "fused" in case and case != "unfused" else 0.95) < ratio < 1.35


def test_an_estimate_of_a_data_set_is_what_it_takes() -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        # Tokens above 256 are objects of their own.
        made = [
            TokenizedExample(f"example-{i}", [1000 + i + j for j in range(100)], [j > 50 for j in range(100)])
            for i in range(500)
        ]
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.8 < data_bytes(len(made), 100 * len(made)) / taken < 1.3
