"""Products in integers are those of the numbers that the integers stand for, and near the exact ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from luthier.llm.base_config import ROW_FAMILIES
from luthier.llm.engine.gradual import Holding, hold
from luthier.llm.engine.held_linear import HeldLinear
from luthier.llm.engine.integers import IntegerWeight
from luthier.llm.engine.layer_operations import FINER, INT16_MAX, Adapter, IntegerSums, LayerOperations
from luthier.llm.engine.native_operations import NativeOperations, operations_for
from luthier.llm.engine.row_attention import ATTENTION_NAME
from luthier.llm.engine.row_model import RowModel
from luthier.llm.engine.target_logprobs import Head, target_logprobs
from luthier.llm.rows import pack
from luthier.templates.renderer import TokenizedExample
from luthier.train.engine.samples import answer_samples

CPU = torch.device("cpu")
TORCH = LayerOperations()
INTEGERS = Holding(torch.float32, integers=True)
WIDTHS = (16, 48, 80, 96, 576, 1536)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def native() -> NativeOperations:
    found = operations_for(torch.float32, CPU)
    if not isinstance(found, NativeOperations):
        pytest.skip("no C compiler here")
    return found


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hidden_states(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return numbers as models have them: one of them is far larger than the others in every token."""
    x_TI = numbers(tokens, width, seed=seed)
    x_TI[:, width // 3] *= 60.0
    return x_TI


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def whole_of(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes * scales[:, None]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_factors", [False, True])
def test_the_kernels_give_what_torch_gives(
    native: NativeOperations, threads: int, width: int, with_factors: bool
) -> None:
    x, onto = hidden_states(7, width), numbers(7, width, seed=1)
    factors = numbers(width, seed=2).abs() + 0.1 if with_factors else None
    fine, exact_fine = torch.empty(7, width, dtype=torch.int8), torch.empty(7, width, dtype=torch.int8)
    codes, scales = native.to_int8(x, factors, fine)
    exact_codes, exact_scales = TORCH.to_int8(x, factors, exact_fine)
    assert torch.allclose(scales, exact_scales, rtol=1e-5)
    # Of two integers that are as near, either may be taken; what is left over then has the other sign.
    assert int((codes.int() - exact_codes.int()).abs().max()) <= 1
    both, exact = (c + f / FINER for c, f in ((codes.double(), fine), (exact_codes.double(), exact_fine)))
    assert float((both - exact).abs().max()) < 1.1 / FINER

    sums = torch.randint(-(10**6), 10**6, (7, width), dtype=torch.int32)
    given = IntegerSums(sums, scales, factors)
    for add in (False, True):
        found, expected = onto.clone(), onto.clone()
        native.from_integers(found, given, add=add)
        TORCH.from_integers(expected, given, add=add)
        assert error(found, expected) < 1e-5
    in_place = sums.view(torch.float32)
    expected = torch.empty(7, width)
    TORCH.from_integers(expected, given)
    native.from_integers(in_place, given)
    assert error(in_place, expected) < 1e-5


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_become_the_nearest_16_bits(native: NativeOperations, threads: int, width: int) -> None:
    x = hidden_states(7, width)
    found = [do.to_int16(x) for do in (native, TORCH)]
    for codes, scales in found:
        off = codes.double() * scales.double()[:, None] - x.double()
        assert bool((off.abs() <= 0.501 * scales[:, None]).all())
    (codes, scales), (exact_codes, exact_scales) = found
    assert torch.allclose(scales, exact_scales, rtol=1e-5)
    assert int((codes.int() - exact_codes.int()).abs().max()) <= 1


@pytest.mark.parametrize("tokens", [1, 5, 24, 97, 200])
@pytest.mark.parametrize("sizes", [(64, 48), (200, 576), (131, 96), (16, 7), (7, 1536), (576, 2)])
def test_products_of_16_bits_are_exact(
    native: NativeOperations, threads: int, tokens: int, sizes: tuple[int, int]
) -> None:
    outputs, inputs = sizes
    x, _ = TORCH.to_int16(hidden_states(tokens, inputs))
    weight, _ = TORCH.to_int16(numbers(outputs, inputs, seed=1))
    exact = x.double() @ weight.double().T
    for operations in (native, TORCH):
        sums = torch.full((tokens, outputs), 7, dtype=torch.int32)
        operations.multiply_int16(sums, x, weight)
        assert torch.equal(sums.double(), exact)


@pytest.mark.parametrize("operations", ["native", "torch"])
@pytest.mark.parametrize("width", [16, 576, 4096])
def test_sums_of_16_bits_fit_whatever_is_multiplied(
    operations: str, width: int, request: pytest.FixtureRequest
) -> None:
    do = request.getfixturevalue("native") if operations == "native" else TORCH
    one_hot = torch.zeros(width)
    one_hot[3] = -1e30
    rows = torch.stack([numbers(width), *(torch.full((width,), value) for value in (1.0, -1e-25, 3e38)), one_hot])
    codes, scales = do.to_int16(rows)
    sums = torch.empty(5, 5, dtype=torch.int32)
    do.multiply_int16(sums, codes, codes)
    assert torch.equal(sums.double(), codes.double() @ codes.double().T)
    for row, found in zip(rows.double(), codes.double() * scales.double()[:, None], strict=True):
        assert torch.allclose(found / row.abs().max(), row / row.abs().max(), rtol=1e-3, atol=1e-3)
    assert not do.to_int16(torch.full((1, width), 1e-36))[0].any()
    assert int(codes.abs().max()) <= INT16_MAX


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 24, 61])
def test_adapters_are_added_to_the_numbers_of_sums(native: NativeOperations, threads: int, tokens: int) -> None:
    x, dy = numbers(tokens, 96, seed=1), numbers(tokens, 176, seed=2)
    ends = (0, 96, 128, 176)
    adapters = [
        Adapter(
            torch.nn.Parameter(numbers(16, 96, seed=3 + i)),
            torch.nn.Parameter(numbers(end - first, 16, seed=6 + i)),
            2.0,
            slice(first, end),
            slice(16 * i, 16 * i + 16),
        )
        for i, (first, end) in enumerate(itertools.pairwise(ends))
    ]
    for name, given, width in (("adapt", x, 176), ("adapt_backward", dy, 96)):
        sums = torch.randint(-(10**6), 10**6, (tokens, width), dtype=torch.int32)
        factors = numbers(width, seed=9) if name == "adapt" else None
        base = IntegerSums(sums, numbers(tokens, seed=8).abs() / 1e4, factors)
        outputs = (176,) if name == "adapt" else ()
        expected, expected_low = getattr(TORCH, name)(given, adapters, *outputs, base)
        found, low = getattr(native, name)(given, adapters, *outputs, base)
        assert found.data_ptr() == sums.data_ptr()
        assert error(low, expected_low) < 1e-5
        assert error(found, expected) < 1e-5


@pytest.mark.parametrize("operations", ["native", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(operations: str, bad: float) -> None:
    do = operations_for(torch.float32, CPU) if operations == "native" else TORCH
    x = numbers(3, 96)
    x[1, 40] = bad
    for rounded in (do.to_int8, do.to_int16):
        _, scales = rounded(x)
        assert scales.isnan().tolist() == [False, True, False]
        assert not rounded(torch.zeros(2, 96))[0].any()


@pytest.mark.parametrize("sizes", [(64, 48), (960, 576), (33, 100), (16, 7)])
def test_products_are_those_of_the_numbers_that_integers_stand_for(sizes: tuple[int, int]) -> None:
    outputs, inputs = sizes
    weight, x, dy = numbers(outputs, inputs), hidden_states(9, inputs, seed=1), numbers(9, outputs, seed=2)
    held = IntegerWeight.of(weight)
    assert held.shape == (outputs, inputs)
    assert held.bytes == 3 * outputs * inputs + 8 * outputs
    assert error(held.times(x), whole_of(*TORCH.to_int16(x)) @ held.whole(torch.float32).T) < 1e-5
    scales_O = held.backward.scales_O
    dy_as_held = whole_of(*TORCH.to_int8(dy, scales_O)) / scales_O
    # A rounding that falls the other way is one step of 127.
    assert error(held.times_back(dy), dy_as_held @ whole_of(held.backward.codes_OI, scales_O)) < 1e-3

    onto, into = numbers(9, outputs, seed=3), torch.empty(9, outputs)
    expected = onto + held.times(x)
    assert torch.allclose(held.times(x, onto), expected, rtol=1e-5, atol=1e-4)
    held.times_into(into, x)
    assert torch.equal(into, held.times(x))
    back = numbers(9, inputs, seed=4)
    expected = back + held.times_back(dy)
    assert torch.allclose(held.times_back(dy, back), expected, rtol=1e-5, atol=1e-4)


def test_products_are_near_the_exact_ones_whatever_stands_out() -> None:
    weight, x, dy = numbers(960, 576), hidden_states(40, 576, seed=1), numbers(40, 960, seed=2)
    held = IntegerWeight.of(weight)
    assert error(held.whole(torch.float32), weight) < 2e-4
    assert error(held.times(x), x @ weight.T) < 5e-4
    assert error(held.times_back(dy), dy @ weight) < 0.02
    small, large = x.clone(), torch.zeros_like(x)
    small[:, 192], large[:, 192] = 0.0, x[:, 192]  # what stands out hides little of the rest
    assert error(held.times(x) - held.times(large), small @ weight.T) < 2e-3


def test_inputs_may_lie_in_memory_in_any_order() -> None:
    held, x, dy = IntegerWeight.of(numbers(48, 64)), numbers(64, 9), numbers(48, 9)
    assert error(held.times(x.T), held.times(x.T.contiguous())) < 1e-4
    assert error(held.times_back(dy.T), held.times_back(dy.T.contiguous())) < 1e-2
    codes, weight = torch.randint(-99, 99, (64, 9), dtype=torch.int16).T, held.forward.codes_OI
    sums = torch.empty(9, 48, dtype=torch.int32)
    operations_for(torch.float32, CPU).multiply_int16(sums, codes, weight)
    assert torch.equal(sums.double(), codes.double() @ weight.double().T)


def test_a_gradient_of_thousands_of_small_numbers_is_kept_by_fine_integers() -> None:
    weight, dy = numbers(4096, 64), torch.full((3, 4096), 1e-4)
    dy[:, 7] = 1.0
    exact = dy @ weight
    assert error(IntegerWeight.of(weight, fine=True).times_back(dy), exact) < 0.01
    dy[:, 7] = 0.0  # what the small ones alone give
    small, held = dy @ weight, IntegerWeight.of(weight)
    dy[:, 7] = 1.0
    assert error(held.times_back(dy) - weight[7], small) > 0.5


def tiny(kind: Any = AutoModelForCausalLM, family: str = "llama", **more: Any) -> Any:
    torch.manual_seed(7)
    sizes = {"vocab_size": 120, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "pad_token_id": 0}
    heads = {"num_attention_heads": 6}
    attention = {}
    if kind is AutoModelForCausalLM:
        heads |= {"num_key_value_heads": 2, "head_dim": 16}
        attention = {"attn_implementation": ATTENTION_NAME} if family in ROW_FAMILIES else {}
    config = AutoConfig.for_model(family, **(sizes | heads | more))
    return kind.from_config(config, **attention).eval().requires_grad_(False)


def adapted(model: Any) -> Any:
    torch.manual_seed(8)
    found = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return found


def texts() -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(1, 120, (length,), generator=generator).tolist() for length in (30, 17, 41)]
    return [TokenizedExample(str(i), some, [False] * 5 + [True] * (len(some) - 5)) for i, some in enumerate(tokens)]


def loss_and_gradients(model: RowModel) -> tuple[float, torch.Tensor]:
    (row,) = pack(texts(), 128, share=False)
    loss = -model.targets(row).logprobs_M.mean()
    loss.backward()
    trained = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in trained if p.grad is not None])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_fused_decoder_multiplies_as_the_layers_themselves_do(family: str, recompute: bool) -> None:
    def made(*, fused: bool, recompute: bool = False) -> tuple[float, torch.Tensor]:
        model = tiny(family=family)
        hold(model, INTEGERS)
        return loss_and_gradients(RowModel(adapted(model), fused=fused, recompute=recompute, integers=True))

    loss, gradients = made(fused=True, recompute=recompute)
    expected_loss, expected = made(fused=False)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert error(gradients, expected) < 0.02  # numbers that differ in the last digit can be rounded to other integers
    exact_loss, exact = loss_and_gradients(RowModel(adapted(tiny(family=family))))
    assert loss == pytest.approx(exact_loss, rel=1e-4)
    assert torch.nn.functional.cosine_similarity(gradients, exact, dim=0) > 0.999


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (1, 96), (2, 3, 96)])
@pytest.mark.parametrize("holding", [INTEGERS, Holding(torch.float32, 8)], ids=["integers", "8 bits"])
def test_a_layer_takes_any_number_of_tokens(holding: Holding, shape: tuple[int, ...]) -> None:
    weight = numbers(40, 96)
    layer = HeldLinear(holding.held(weight), torch.float32, torch.nn.Parameter(numbers(40)))
    x = numbers(*shape).requires_grad_()
    found = layer(x)
    assert found.shape == (*shape[:-1], 40)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.allclose(
        found, torch.nn.functional.linear(x, weight, layer.bias), atol=0.005 if holding.integers else 0.5
    )


@pytest.mark.parametrize("family", ["opt", "stablelm", "gemma"])
def test_families_that_do_not_run_fused_are_asked_over_integers_too(family: str) -> None:
    more: dict[str, Any] = {"ffn_dim": 160, "word_embed_proj_dim": 96} if family == "opt" else {}
    found, exact = tiny(family=family, **more), tiny(family=family, **more)
    for model in (found, exact):
        for parameter in model.parameters():
            parameter.data *= 3.0  # so that logits are far enough from each other for rounding to be seen
    hold(found, INTEGERS)
    loss, gradients = loss_and_gradients(RowModel(adapted(found), integers=True))
    expected_loss, expected = loss_and_gradients(RowModel(adapted(exact)))
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(gradients, expected, dim=0) > 0.99


def test_biases_and_vocabularies_of_any_size_are_taken() -> None:
    found, exact = (tiny(family="qwen2", vocab_size=131) for _ in range(2))
    for model in (found, exact):
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.bias.data = numbers(96, seed=index)
    hold(found, INTEGERS)
    loss, gradients = loss_and_gradients(RowModel(adapted(found), integers=True))
    expected_loss, expected = loss_and_gradients(RowModel(adapted(exact)))
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert torch.nn.functional.cosine_similarity(gradients, expected, dim=0) > 0.999


def test_sample_answers_are_written_over_integers() -> None:
    model = tiny()
    hold(model, INTEGERS)
    prompts = [[5, 6, 7], [8, 9], [10]]
    answers = answer_samples(RowModel(adapted(model), integers=True), prompts, frozenset({2}), 4)
    exact = answer_samples(RowModel(adapted(tiny())), prompts, frozenset({2}), 1)
    assert all(1 <= len(answer) <= 4 for answer in answers)
    assert [answer[:1] for answer in answers] == exact


def test_layers_of_one_input_share_their_integers() -> None:
    model = tiny()
    hold(model, INTEGERS)
    RowModel(adapted(model), integers=True)
    attention = model.model.layers[0].self_attn
    held = [layer.base_layer.held for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert all(isinstance(weight, IntegerWeight) for weight in held)
    for codes in ("forward", "backward"):
        assert len({getattr(weight, codes).codes_OI.untyped_storage().data_ptr() for weight in held}) == 1


def test_an_encoder_learns_over_integers() -> None:
    model = tiny(AutoModelForSequenceClassification, "bert", num_labels=3)
    exact = adapted(tiny(AutoModelForSequenceClassification, "bert", num_labels=3))
    hold(model, INTEGERS)
    assert type(model.bert.encoder.layer[0].output.dense) is HeldLinear
    assert type(model.classifier) is torch.nn.Linear
    tokens = torch.randint(1, 120, (4, 12), generator=torch.Generator().manual_seed(1))
    logits, expected = adapted(model)(input_ids=tokens).logits, exact(input_ids=tokens).logits
    assert error(logits, expected) < 1e-3
    logits.sum().backward()


def test_a_head_in_integers_gives_nearly_the_same_probabilities_and_gradients() -> None:
    torch.manual_seed(4)
    linear = torch.nn.Linear(96, 2000, bias=True).requires_grad_(False)
    linear.weight += 3 * torch.randn(96)  # as embeddings are, which have much in common
    hidden, targets = numbers(40, 96), torch.randint(0, 2000, (40,))

    def made(head: Head, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
        given = hidden.clone().requires_grad_()
        logprobs = target_logprobs(given, head, targets, smoothing).logprobs_M
        logprobs.sum().backward()
        assert given.grad is not None
        return logprobs.detach(), given.grad

    for scale, smoothing in ((1.0, 0.0), (0.5, 0.0), (1.0, 0.1)):
        exact, exact_gradient = made(Head(linear, scale), smoothing)
        found, gradient = made(Head(linear, scale).in_integers(), smoothing)
        assert error(found, exact) < 1e-4
        assert error(gradient, exact_gradient) < 0.02


def test_a_head_that_is_trained_or_bends_its_logits_stays_as_it_is() -> None:
    linear = torch.nn.Linear(16, 30)
    assert Head(linear).in_integers().held is None
    linear.requires_grad_(False)
    assert Head(linear, cap=30.0).in_integers().held is None
    assert isinstance(Head(linear).in_integers().held, IntegerWeight)
