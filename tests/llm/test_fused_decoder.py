"""The fused decoder gives what transformers' own modules give, forward and backward, for every family it knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.errors import InputError
from luthier.llm.engine.fused_decoder import can_fuse
from luthier.llm.engine.gradual import Holding, hold
from luthier.llm.engine.row_attention import ATTENTION_NAME
from luthier.llm.engine.row_model import RowModel
from luthier.llm.rows import pack, pack_groups
from luthier.templates.renderer import TokenizedExample

VOCABULARY = 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


def tiny(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(7)
    if family == "mistral":
        more = {"sliding_window": None, **more}
    config = AutoConfig.for_model(family, **SIZES, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases that are not all ones or zeros
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.eval()


def lora(model: Any, **more: Any) -> Any:
    torch.manual_seed(8)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **more))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def examples(lengths: tuple[int, ...], prefix: int = 9, learned: int = 3) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(1, VOCABULARY, (prefix,), generator=generator).tolist()
    found = []
    for index, length in enumerate(lengths):
        own = [index + 1, *torch.randint(1, VOCABULARY, (length - 1,), generator=generator).tolist()]
        mask = [False] * (prefix + length - learned) + [True] * learned
        found.append(TokenizedExample(str(index), shared + own, mask))
    return found


def loss_and_gradients(model: Any, rows: Any, *, fused: bool, recompute: bool = False) -> tuple[float, dict[str, Any]]:
    rowed = RowModel(model, fused=fused, recompute=recompute)
    assert rowed.is_fused == fused
    total = sum(rowed.targets(row).logprobs_M.sum() for row in rows)
    model.zero_grad()
    total.backward()
    return float(total.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(
    found: tuple[float, dict[str, Any]], expected: tuple[float, dict[str, Any]], tolerance: float = 1e-5
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    difference, whole = (
        torch.cat([values[name].flatten() for name in sorted(values)])
        for values in ({n: found[1][n] - g for n, g in expected[1].items()}, expected[1])
    )
    assert float(difference.norm()) <= tolerance * float(whole.norm())
    for name, gradient in expected[1].items():  # a small gradient may be what is left of large ones
        assert float((found[1][name] - gradient).norm()) <= 10 * tolerance * float(gradient.norm()) + 1e-8, name


def plain(model: Any, given: list[TokenizedExample]) -> tuple[float, dict[str, Any]]:
    """Compute the same with transformers alone, one example at a time, by its own attention."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation("eager")
    total = torch.zeros(())
    for example in given:
        logits = inner(input_ids=torch.tensor([example.tokens])).logits[0]
        logprobs = torch.log_softmax(logits, -1)
        total = total + sum(logprobs[i - 1, t] for i, t in enumerate(example.tokens) if example.loss_mask[i])
    inner.set_attn_implementation(ATTENTION_NAME)
    model.zero_grad()
    total.backward()
    return float(total.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapt", [lora, lambda model: model], ids=["lora", "full"])
def test_a_packed_row_gives_the_gradients_of_plain_examples(family: str, adapt: Callable[[Any], Any]) -> None:
    given = examples((12, 5, 11, 30))
    rows = pack(given, 200)
    model = adapt(tiny(family))
    if hasattr(model, "get_base_model") is False:
        model.lm_head.weight.requires_grad_(True)
    assert_same(loss_and_gradients(model, rows, fused=True), plain(adapt(tiny(family)), given))


@pytest.mark.parametrize("recompute", [False, True])
def test_long_sequences_that_attend_in_pieces_give_the_same(recompute: bool) -> None:
    given = examples((700,), prefix=0, learned=600)
    rows = pack(given, 1024, share=False)
    found = loss_and_gradients(lora(tiny("llama")), rows, fused=True, recompute=recompute)
    assert_same(found, plain(lora(tiny("llama")), given))


def test_groups_in_one_row_do_not_see_each_other() -> None:
    first, second = examples((8, 14)), examples((20, 6), prefix=4)
    given = [*first, *second]
    rows = pack_groups(given, [(0, 1), (2, 3)], 400)
    assert len(rows) == 1
    assert_same(loss_and_gradients(lora(tiny("llama")), rows, fused=True), plain(lora(tiny("llama")), given))


def test_the_unfused_path_gives_the_same_through_transformers_modules() -> None:
    given = examples((12, 5, 11, 30))
    rows = pack(given, 200)
    found = loss_and_gradients(lora(tiny("llama")), rows, fused=False)
    assert_same(found, plain(lora(tiny("llama")), given))


@pytest.mark.parametrize("adapt", [lora, lambda model: lora(model, use_dora=True)], ids=["lora", "dora"])
def test_layers_that_transformers_computes_again_give_the_same(adapt: Callable[[Any], Any]) -> None:
    given = examples((12, 5, 11, 30))
    rows = pack(given, 200)
    model = adapt(tiny("llama"))
    expected = loss_and_gradients(model, rows, fused=False)
    ran: list[str] = []
    layer = model.get_base_model().model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: ran.append("mlp"))
    found = loss_and_gradients(model.train(), rows, fused=False, recompute=True)
    assert ran == ["mlp", "mlp"]  # once more for the backward pass
    assert_same(found, expected)


def test_a_quantised_base_gives_the_gradients_of_its_own_weights_restored() -> None:
    given = examples((12, 30))
    rows = pack(given, 200)

    def quantised() -> Any:
        model = tiny("llama")
        hold(model, Holding(torch.float32, 4))
        return lora(model)

    assert_same(loss_and_gradients(quantised(), rows, fused=True), loss_and_gradients(quantised(), rows, fused=False))


def test_layers_below_the_lowest_trained_one_get_no_gradient() -> None:
    given = examples((12, 5))
    rows = pack(given, 200)
    model = tiny("llama")
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    _, gradients = loss_and_gradients(model, rows, fused=True)
    assert {name.split(".")[2] for name in gradients} == {"2"}
    _, expected = plain(model, given)
    assert all(torch.allclose(gradients[n], expected[n], rtol=1e-4, atol=1e-6) for n in expected)


def test_attention_of_another_kind_is_refused_and_not_computed_wrongly() -> None:
    rows = pack(examples((12, 5)), 200, share=False)
    with pytest.raises(InputError, match="has softcap"):
        loss_and_gradients(lora(tiny("gemma2", attn_logit_softcapping=50.0, head_dim=8)), rows, fused=False)
    with pytest.raises(InputError, match="sees 8 tokens back, and an example has 21"):
        loss_and_gradients(lora(tiny("mistral", sliding_window=8)), rows, fused=False)
    wide = loss_and_gradients(lora(tiny("mistral", sliding_window=64)), rows, fused=False)
    assert_same(wide, loss_and_gradients(lora(tiny("mistral")), rows, fused=True))


def test_what_is_not_known_is_left_to_transformers() -> None:
    assert not can_fuse(lora(tiny("llama"), use_dora=True).get_base_model().model)
    assert not can_fuse(lora(tiny("llama"), lora_dropout=0.1).get_base_model().model)
    assert not can_fuse(tiny("mistral", sliding_window=8).model)
    assert can_fuse(lora(tiny("llama"), use_rslora=True).get_base_model().model)


def test_bfloat16_gives_about_what_float32_gives() -> None:
    given = examples((12, 5, 11, 30), learned=5)
    rows = pack(given, 200)
    low = loss_and_gradients(lora(tiny("llama", torch.bfloat16)), rows, fused=True)
    high = loss_and_gradients(lora(tiny("llama")), rows, fused=True)
    assert low[0] == pytest.approx(high[0], rel=0.01)
    together = [torch.cat([gradients[n].flatten() for n in sorted(gradients)]) for gradients in (low[1], high[1])]
    assert float(torch.nn.functional.cosine_similarity(together[0], together[1], dim=0)) > 0.99
    assert all(gradient.dtype == torch.float32 for gradient in low[1].values())
