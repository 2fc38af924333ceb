"""Projections lose nothing of an adapter to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from luthier.llm.engine.layer_operations import LayerOperations
from luthier.llm.engine.native_operations import operations_for
from luthier.llm.engine.projections import Projection

WIDTH, TOKENS = 64, 256
OPERATIONS = [LayerOperations(), operations_for(torch.bfloat16, torch.device("cpu"))]
LITTLE = 2e-4  # what a first step of Adam moves a weight


def layers(count: int) -> torch.nn.ModuleDict:
    torch.manual_seed(5)
    plain = torch.nn.ModuleDict({f"l{i}": torch.nn.Linear(WIDTH, WIDTH, bias=False) for i in range(count)})
    adapted = inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=list(plain)), plain)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=LITTLE)
        elif "lora_A" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def down(layer: Any) -> torch.Tensor:
    return layer.lora_A["default"].weight


def up(layer: Any) -> torch.Tensor:
    return layer.lora_B["default"].weight


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("operations", OPERATIONS, ids=["torch", "fastest"])
def test_a_bfloat16_sum_keeps_on_average_what_an_adapter_adds(
    operations: LayerOperations, count: int, onto: bool
) -> None:
    adapted = layers(count)
    projection = Projection(list(adapted.values()), operations)
    x = torch.randn(TOKENS, WIDTH).to(torch.bfloat16)
    base = x.float() @ torch.cat([layer.get_base_layer().weight.float() for layer in adapted.values()]).T
    added = torch.cat([x.float() @ down(layer).T @ up(layer).T * 2.0 for layer in adapted.values()], 1).detach()
    assert added.abs().mean() < 2**-9 * base.abs().mean()  # a single sum would round it away
    more = torch.randn(TOKENS, count * WIDTH).to(torch.bfloat16) if onto else None
    with torch.no_grad():
        found = projection.forward(x, onto_TO=more)[0].float() - base - (more.float() if onto else 0.0)
    share = float((found * added).sum() / (added * added).sum())
    assert 0.7 < share < 1.3
