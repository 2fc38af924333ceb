"""Parameter groups forget nothing; AdamW in 8 bits follows AdamW in a quarter of its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from luthier.train.engine.optimizers import (
    BLOCK,
    AdamW8bit,
    _code,
    dynamic_tree_code,
    make_optimizer,
    parameter_groups,
)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 50}


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3, tie_word_embeddings=tied))


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SIZES, num_hidden_layers=2))


def found(model: torch.nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return (scale, weight decay) by parameter name; every trainable parameter must be in one group, once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [
        (names[id(parameter)], (group["scale"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert sorted(name for name, _ in listed) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    return dict(listed)


def test_deeper_layers_of_a_decoder_learn_slower() -> None:
    model = llama()
    groups = parameter_groups(model, 1e-3, 0.1, layer_decay=0.5)
    by_name = found(model, groups)
    assert by_name["model.embed_tokens.weight"] == (0.5**4, 0)
    assert by_name["model.layers.0.self_attn.q_proj.weight"] == (0.5**3, 0.1)
    assert by_name["model.layers.2.mlp.down_proj.weight"] == (0.5, 0.1)
    assert by_name["model.layers.2.input_layernorm.weight"] == (0.5, 0)
    assert by_name["model.norm.weight"] == (1, 0)
    assert by_name["lm_head.weight"] == (1, 0.1)
    assert all(group["lr"] == 1e-3 * group["scale"] for group in groups)


def test_deeper_layers_of_an_encoder_learn_slower() -> None:
    model = bert()
    by_name = found(model, parameter_groups(model, 1e-3, 0.1, layer_decay=0.5))
    assert by_name["bert.embeddings.word_embeddings.weight"] == (0.5**3, 0)
    assert by_name["bert.embeddings.LayerNorm.weight"] == (0.5**3, 0)
    assert by_name["bert.encoder.layer.0.attention.self.query.weight"] == (0.5**2, 0.1)
    assert by_name["bert.encoder.layer.1.output.dense.bias"] == (0.5, 0)
    assert by_name["bert.pooler.dense.weight"] == (1, 0.1)
    assert by_name["classifier.weight"] == (1, 0.1)


def test_without_layer_decay_there_are_two_groups_and_a_tied_head_is_in_one() -> None:
    model = llama(tied=True)
    groups = parameter_groups(model, 1e-3, 0.1)
    by_name = found(model, groups)
    assert sorted(group["weight_decay"] for group in groups) == [0, 0.1]
    assert by_name["model.embed_tokens.weight"] == (1, 0)


def test_low_rank_matrices_alone_are_one_group_and_follow_their_layer() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    (group,) = parameter_groups(model, 1e-3, 0.1)
    assert (group["lr"], group["weight_decay"], group["scale"]) == (1e-3, 0.1, 1)
    by_name = found(model, parameter_groups(model, 1e-3, 0.1, layer_decay=0.5))
    assert {scale for scale, _ in by_name.values()} == {0.5, 0.25, 0.125}
    assert by_name["base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"] == (0.125, 0.1)


def test_frozen_parameters_are_in_no_group() -> None:
    model = bert()
    model.bert.requires_grad_(False)
    by_name = found(model, parameter_groups(model, 1e-3, 0.1, layer_decay=0.5))
    assert set(by_name) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("signed", [True, False])
def test_the_tree_code_has_256_different_values_with_zero_and_one(signed: bool) -> None:
    values = dynamic_tree_code(signed)
    assert len(set(values)) == 256
    assert {0.0, 1.0} <= set(values)
    assert values[0] == (pytest.approx(-0.1 - 0.9 * 63.5 / 64) if signed else 0)


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_gets_the_nearest_code_but_for_a_128th_of_itself(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = 10 ** (-8 * torch.rand(40 * BLOCK, generator=generator))  # every decade of the code
    values = exponents * torch.randn(40 * BLOCK, generator=generator) if signed else exponents
    code = _code(signed, torch.device("cpu"))
    codes, absmax = torch.zeros(40, BLOCK, dtype=torch.uint8), torch.zeros(40)
    code.encode(values, codes, absmax)
    scaled = values.view(40, BLOCK) / absmax[:, None]
    tree = torch.tensor(dynamic_tree_code(signed), dtype=torch.float64)[0 if signed else 1 :]
    least = (scaled.double()[..., None] - tree).abs().amin(-1)
    mine = (code.decode(codes, absmax).view(40, BLOCK) / absmax[:, None] - scaled).abs().double()
    assert bool((mine <= least + scaled.abs() / 128 + 1e-7).all())
    assert float(mine.norm() / least.norm()) < 1.2


def regression(name: str, steps: int, dtype: torch.dtype = torch.float32) -> tuple[list[float], Any]:
    """Fit a teacher network whose inputs differ a thousandfold in size; return the losses and the optimizer."""
    torch.manual_seed(0)
    x = torch.randn(256, 128) * torch.logspace(-3, 0, 128)
    teacher = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Tanh(), torch.nn.Linear(64, 80))
    y = teacher(x * 3).detach()
    student = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Tanh(), torch.nn.Linear(64, 80)).to(dtype)
    optimizer = make_optimizer(name, parameter_groups(student, 3e-3, 0.01))
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(student(x.to(dtype)).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def test_adamw_in_8_bits_ends_where_adamw_does() -> None:
    whole, _ = regression("adamw", 200)
    coded, _ = regression("adamw_8bit", 200)
    assert whole[-1] < 0.05 * whole[0]
    assert coded[-1] == pytest.approx(whole[-1], rel=0.1)  # 3 to 4 % lower with each of six seeds


def test_adamw_in_8_bits_trains_bfloat16_weights() -> None:
    losses, _ = regression("adamw_8bit", 100, torch.bfloat16)
    assert losses[-1] < 0.2 * losses[0]


def test_the_first_step_is_that_of_adamw() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(100, 100), torch.randn(100, 100)
    ends = []
    for kind in (AdamW8bit, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = gradient
        kind([parameter], lr=0.1, weight_decay=0.1).step()
        ends.append(parameter.detach())
    assert torch.allclose(ends[0], ends[1], atol=1e-6)


def test_gradients_of_very_different_size_in_one_block_do_not_blow_up() -> None:
    parameter = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = AdamW8bit([parameter], lr=1.0, weight_decay=0.0)
    sizes = torch.logspace(-7, 0, 256).expand(16, 256)
    for step in range(20):
        before = parameter.detach().clone()
        parameter.grad = sizes.clone() if step < 10 else sizes * 1e-3  # what is left of the first moment goes on
        optimizer.step()
        assert float((parameter.detach() - before).abs().max()) < 4


def test_the_state_takes_less_than_30_percent_of_adamw() -> None:
    sizes = {}
    for kind in (AdamW8bit, torch.optim.AdamW):
        parameter = torch.nn.Parameter(torch.randn(300, 101))
        parameter.grad = torch.randn(300, 101)
        optimizer = kind([parameter])
        optimizer.step()
        sizes[kind] = sum(tensor.nbytes for tensor in optimizer.state[parameter].values())
    assert sizes[AdamW8bit] < 0.3 * sizes[torch.optim.AdamW]


def test_small_tensors_keep_whole_moments_and_are_exactly_adamw() -> None:
    torch.manual_seed(0)
    start, ends = torch.randn(40, 50), []
    for kind in (AdamW8bit, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=0.1)
        for step in range(20):
            parameter.grad = torch.sin(start + step)
            optimizer.step()
        ends.append(parameter.detach())
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
    assert torch.allclose(ends[0], ends[1], atol=1e-6)


def steps(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()


@pytest.mark.parametrize("way", ["tensors by name", "state_dict"])
def test_saved_and_restored_it_goes_on_with_the_same_numbers(way: str, tmp_path: Path) -> None:
    first = [torch.nn.Parameter(torch.ones(90, 91)), torch.nn.Parameter(torch.ones(7))]
    optimizer = AdamW8bit(first)
    steps(first, optimizer, range(5))
    second = [torch.nn.Parameter(parameter.detach().clone()) for parameter in first]
    restored = AdamW8bit(second)
    if way == "state_dict":
        restored.load_state_dict(optimizer.state_dict())
    else:
        tensors = {f"{key}/{i}": t for i, p in enumerate(first) for key, t in optimizer.state[p].items()}
        save_file(tensors, tmp_path / "state.safetensors")
        for name, tensor in load_file(tmp_path / "state.safetensors").items():
            key, place = name.split("/")
            restored.state[second[int(place)]][key] = tensor
    steps(first, optimizer, range(5, 10))
    steps(second, restored, range(5, 10))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        for key, value in optimizer.state[one].items():
            assert value.dtype == restored.state[other][key].dtype
            assert torch.equal(value, restored.state[other][key])
