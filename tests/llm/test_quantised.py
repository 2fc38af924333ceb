"""A base in 4 or 8 bits: every value the nearest code, gradients to the input alone, adapters that train over it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from luthier.llm.engine.gradual import Holding, hold
from luthier.llm.engine.held_linear import HeldLinear, holdable
from luthier.llm.engine.quantised import BLOCK, NF4, Bits, quantise
from luthier.llm.engine.torch_model import load_base

BITS = pytest.mark.parametrize("bits", [4, 8])


def weights(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.02


def layer(outputs: int = 48, inputs: int = 80, *, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias)


def in_few_bits(linear: torch.nn.Linear, bits: Bits) -> HeldLinear:
    return HeldLinear(quantise(linear.weight, bits), linear.weight.dtype, linear.bias)


def test_nf4_is_made_of_quantiles_of_the_normal_distribution() -> None:
    # As the QLoRA authors do it: 9 quantiles from probability 1/2 up to the mean of 1 - 1/30 and 1 - 1/32, 8 below.
    edge = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    assert (values / values.max()).tolist() == pytest.approx(NF4, abs=1e-6)


def test_every_value_becomes_the_nearest_code_times_the_scale_of_its_block() -> None:
    weight = weights(24, 50)  # 1,200 values: the last block is not full
    quantised = quantise(weight, 4)
    scales = quantised.scales().tolist()
    codebook = torch.tensor(NF4).tolist()
    expected = []
    for index, value in enumerate(weight.flatten().tolist()):
        scale = scales[index // BLOCK]
        nearest = min(codebook, key=lambda code: abs(code * scale - value))
        expected.append(float(torch.tensor(nearest) * torch.tensor(scale)))
    assert quantised.whole(torch.float32).flatten().tolist() == expected


def test_scales_in_8_bits_are_within_half_a_step_of_the_true_ones() -> None:
    weight = weights(320, 64) * torch.linspace(0.5, 2, 320)[:, None]  # one block a row; 320 blocks are two groups
    true = weight.abs().amax(1)
    for group, scales in zip(true.split(256), quantise(weight, 4).scales().split(256), strict=True):
        step = (group.max() - group.min()) / 255
        assert float((scales - group).abs().max()) <= 0.5001 * float(step)


def test_int8_is_within_half_a_step() -> None:
    weight = weights(24, 50)
    error = (quantise(weight, 8).whole(torch.float32) - weight).abs().flatten()
    steps = quantise(weight, 8).scales().repeat_interleave(BLOCK)[: error.numel()] / 127
    assert bool((error <= 0.5001 * steps).all())


def test_nf4_of_normal_weights_has_the_error_that_its_codebook_says() -> None:
    weight = weights(512, 512)
    error = quantise(weight, 4).whole(torch.float32) - weight
    assert float(error.norm() / weight.norm()) == pytest.approx(0.0915, abs=0.003)  # 20.8 dB


def test_a_layer_in_4_bits_takes_about_half_a_byte_a_weight() -> None:
    assert quantise(weights(64, 64), 4).bytes / 64**2 <= 0.57
    assert quantise(weights(512, 512), 4).bytes / 512**2 <= 0.517
    assert quantise(weights(64, 64), 8).bytes / 64**2 <= 1.07


@BITS
def test_blocks_of_zeros_stay_zero(bits: Bits) -> None:
    weight = weights(8, 64)
    weight[2] = 0
    whole = quantise(weight, bits).whole(torch.float32)
    assert not whole[2].any()
    assert not quantise(torch.zeros(3, 5), bits).whole(torch.float32).any()


@BITS
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 5), (7, 63), (5, 65), (64, 64)])
def test_no_size_is_odd(bits: Bits, outputs: int, inputs: int) -> None:
    linear = layer(outputs, inputs)
    whole = in_few_bits(linear, bits)
    assert whole.weight.shape == (outputs, inputs)
    assert whole(torch.randn(2, 3, inputs)).shape == (2, 3, outputs)
    assert torch.allclose(whole.weight, linear.weight, atol=0.2 * float(linear.weight.detach().abs().max()))


@BITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_given_in_its_own_number_type(bits: Bits, dtype: torch.dtype) -> None:
    quantised = in_few_bits(layer().to(dtype), bits)
    assert quantised.weight.dtype == dtype
    assert torch.equal(quantised.weight, quantised.held.whole(torch.float32).to(dtype))


@BITS
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_dequantised_layer(bits: Bits, bias: bool) -> None:
    quantised = in_few_bits(layer(bias=bias), bits)
    plain = layer(bias=bias)
    plain.weight.data = quantised.weight
    x = torch.randn(2, 6, 80)
    gradients, outputs = [], []
    for linear in (quantised, plain):
        mine = x.clone().requires_grad_()
        outputs.append(linear(mine))
        outputs[-1].square().sum().backward()
        gradients.append(mine.grad)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)
    assert [name for name, _ in quantised.named_parameters()] == (["bias"] if bias else [])


@BITS
def test_no_whole_weight_is_kept_for_backward(bits: Bits) -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    quantised = in_few_bits(layer(bias=False), bits)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantised(torch.randn(4, 80, requires_grad=True))
    assert kept == []


@BITS
def test_products_run_in_the_number_type_of_autocast(bits: Bits) -> None:
    quantised = in_few_bits(layer(), bits)
    x = torch.randn(4, 80, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantised(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@BITS
def test_a_change_of_number_type_leaves_the_codes_and_scales(bits: Bits) -> None:
    quantised = in_few_bits(layer(), bits)
    before = quantised.held.whole(torch.float32)
    quantised.to(torch.bfloat16)
    assert quantised.weight.dtype == torch.bfloat16
    assert quantised.bias.dtype == torch.bfloat16
    assert torch.equal(quantised.held.whole(torch.float32), before)
    assert torch.equal(copy.deepcopy(quantised).weight, quantised.weight)


@BITS
def test_a_model_is_quantised_but_for_its_embeddings_and_head(bits: Bits, tiny_base: Path) -> None:
    model = load_base(tiny_base, "float32")
    hold(model, Holding(torch.float32, bits))
    held = [module.held for module in model.modules() if isinstance(module, HeldLinear)]
    assert len(held) == 2 * 7
    before = 4 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert sum(weight.bytes for weight in held) / before <= {4: 0.15, 8: 0.27}[bits]
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_a_shared_weight_and_what_is_skipped_stay_whole() -> None:
    blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"mlp": layer(8, 8), "score": layer(8, 8)}) for _ in range(2))
    model = torch.nn.ModuleDict({"layers": blocks, "head": layer(8, 8)})
    blocks[1]["mlp"].weight = model["head"].weight
    assert list(holdable(model)) == ["layers.0.mlp"]


@BITS
def test_adapters_train_over_a_quantised_base(bits: Bits, tiny_base: Path) -> None:
    model = load_base(tiny_base, "float32")
    hold(model, Holding(torch.float32, bits))
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7
    assert all("lora_" in name for name in trained)
    codes = tuned.base_model.model.model.layers[0].mlp.up_proj.base_layer.held.codes.clone()
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3)
    tokens = torch.randint(0, 300, (1, 12))
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(plain_logits(tuned, tokens)[0, :-1], tokens[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(codes, tuned.base_model.model.model.layers[0].mlp.up_proj.base_layer.held.codes)


def plain_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits with the library's own attention: rows are tested elsewhere."""
    model.get_base_model().set_attn_implementation("sdpa")
    return model(input_ids=tokens).logits
