"""Decoders of every kind give in rows, or in padded batches, what each example gives by itself in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_fused_decoder import assert_same, examples, lora
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from luthier.errors import InputError
from luthier.llm.base_config import ROW_FAMILIES, UNBOUNDED, read_config, read_shape, rows_up_to
from luthier.llm.engine import target_logprobs
from luthier.llm.engine.row_model import RowModel
from luthier.llm.engine.torch_model import load_base
from luthier.llm.rows import Row, pack_groups
from luthier.templates.renderer import TokenizedExample

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 16,
}
APART: dict[str, dict[str, Any]] = {  # their layers mix tokens in other ways, or know positions of their own
    "bloom": {},
    "falcon": {},
    "gemma2": GROUPED,
    "gpt2": {},
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"]},
    "mamba": {},
    "mpt": {},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 64},
    "phi3": GROUPED | {"rope_parameters": {**LONG_ROPE}, "original_max_position_embeddings": 16},
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "stablelm": {"num_key_value_heads": 2},
}
SLOW_APART = {"falcon_h1": GROUPED, "nemotron": GROUPED, "gpt_oss": GROUPED}
OFTEN = ("cohere", "gemma3_text", "gpt_neox", "granite", "olmo2")
FEW_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
}
GIVEN = examples((12, 5, 11, 30))


def saved(folder: Path, family: str, kind: Any = AutoModelForCausalLM, **more: Any) -> Path:
    """Write a model of random numbers, in which norms and biases are not all ones or zeros."""
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model(family, **SIZES | more)).float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def plain(folder: Path) -> torch.Tensor:
    """Return the log-probabilities of all targets by transformers alone, one example at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for one in GIVEN:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([one.tokens])).logits[0].log_softmax(-1)
        found += [float(logprobs[i - 1, token]) for i, token in enumerate(one.tokens) if one.loss_mask[i]]
    return torch.tensor(found)


def rows(model: RowModel) -> list[Row]:
    return model.pack(GIVEN, 200)


def asked(model: RowModel, given: list[Row]) -> torch.Tensor:
    """Return what a model says of all targets, in the order of the examples."""
    found: dict[int, list[float]] = {}
    for row in given:
        for owner, logprob in zip(row.owners, model.targets(row).logprobs_M.tolist(), strict=True):
            found.setdefault(row.examples[owner], []).append(logprob)
    return torch.tensor([logprob for index in sorted(found) for logprob in found[index]])


def assert_right(folder: Path, *, takes_rows: bool) -> RowModel:
    model = RowModel(load_base(folder, "float32"), fused=False)
    assert model.takes_rows == takes_rows
    assert (rows(model)[0].groups[0].prefix > 0) == takes_rows
    torch.testing.assert_close(asked(model, rows(model)), plain(folder), rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.parametrize("family", OFTEN)
def test_a_listed_family_takes_rows(family: str, tmp_path: Path) -> None:
    assert_right(saved(tmp_path, family, **GROUPED), takes_rows=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(ROW_FAMILIES - set(OFTEN)))
def test_every_listed_family_takes_rows(family: str, tmp_path: Path) -> None:
    assert_right(saved(tmp_path, family, **GROUPED, **FEW_EXPERTS, sliding_window=256), takes_rows=True)


@pytest.mark.parametrize("family", APART)
def test_examples_of_other_models_go_apart_and_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    model = assert_right(saved(tmp_path, family, **APART[family]), takes_rows=False)
    # The two answers of a pair stand behind their prompt in any case.
    together = pack_groups(GIVEN, [(0, 1), (2, 3)], 400)
    assert together[0].groups[0].prefix > 0
    torch.testing.assert_close(asked(model, together), plain(tmp_path), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW_APART)
def test_examples_of_slow_models_go_apart_too(family: str, tmp_path: Path) -> None:
    assert_right(saved(tmp_path, family, **SLOW_APART[family]), takes_rows=False)


def test_gradients_and_noise_are_those_of_the_examples_one_by_one(tmp_path: Path) -> None:
    folder = saved(tmp_path, "stablelm", **APART["stablelm"])

    def found(groups: list[list[TokenizedExample]]) -> tuple[float, dict[str, Any]]:
        model = lora(load_base(folder, "float32"))
        asking = RowModel(model)
        every = [row for group in groups for row in asking.pack(group, 200)]
        noise = torch.arange(64) / 640
        total = sum(asking.targets(row, noise=lambda embedded, _: embedded + noise).logprobs_M.sum() for row in every)
        total.backward()
        return float(total.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert_same(found([GIVEN]), found([[one] for one in GIVEN]))


# Which models take rows


def test_rows_are_for_examples_that_attention_sees_whole() -> None:
    assert rows_up_to({"model_type": "llama"}) == UNBOUNDED
    assert rows_up_to({"model_type": "mistral", "sliding_window": 4096}) == 4096
    assert rows_up_to({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}) == UNBOUNDED
    layers = ["sliding_attention", "full_attention"]
    assert rows_up_to({"model_type": "gemma3_text", "sliding_window": 512, "layer_types": layers}) == 512
    assert rows_up_to({"model_type": "phi3", "rope_parameters": LONG_ROPE}) == 16
    for change in ({"layer_types": ["conv"]}, {"attn_logit_softcapping": 50.0}, {"use_bidirectional_attention": True}):
        assert rows_up_to({"model_type": "llama"} | change) == 0
    assert rows_up_to({"model_type": "stablelm"}) == 0


def test_a_window_that_holds_every_example_leaves_rows(tmp_path: Path) -> None:
    folder = saved(tmp_path, "mistral", **GROUPED, sliding_window=64)
    assert RowModel(load_base(folder, "float32", longest=64)).takes_rows
    assert not RowModel(load_base(folder, "float32", longest=65)).takes_rows
    assert_right(folder, takes_rows=False)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mpt", "falcon", "opt", "mamba"])
def test_sizes_are_read_under_every_family_s_own_names(family: str, tmp_path: Path) -> None:
    saved(tmp_path, family)
    shape = read_shape(tmp_path, 1000)
    assert (shape.layers, shape.width, shape.rows_up_to) == (2, 64, 0)
    assert shape.intermediate in (read_config(tmp_path).get("intermediate_size"), 4 * 64)


# What cannot be trained


def test_a_model_that_makes_its_logits_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "modernbert-decoder", cls_token_id=1, sep_token_id=2)
    with pytest.raises(InputError, match="modernbert-decoder pads texts, or makes its logits"):
        RowModel(load_base(folder, "float32"))


def test_a_family_without_a_head_for_labels_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "mamba")
    with pytest.raises(InputError, match="A mamba cannot be trained here: transformers has no AutoModelForSequence"):
        load_base(folder, "float32", kind=AutoModelForSequenceClassification)


# What stands behind the head


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("phi", {}),  # with a bias
    ],
)
def test_logits_are_scaled_and_capped_as_the_family_does_it(
    family: str, more: dict[str, Any], trained: bool, smoothing: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_logprobs, "PIECE_LOGITS", 500)  # of 120 tokens: pieces of four targets
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path, family, **GROUPED, **more)).eval()
    model.requires_grad_(False)
    leaves = [torch.randn(1, 9, 64, requires_grad=True)]
    if trained:
        leaves += [parameter.requires_grad_() for parameter in model.get_output_embeddings().parameters()]
    targets_M, weights_M = torch.arange(9), torch.linspace(-1, 2, 9)

    def gradients(logprobs: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((logprobs * weights_M).sum(), leaves))

    logprobs_MV = model(inputs_embeds=leaves[0]).logits[0].log_softmax(-1)
    expected_M = (1 - smoothing) * logprobs_MV[range(9), targets_M] + smoothing * logprobs_MV.mean(-1)
    hidden_ME = model.base_model(inputs_embeds=leaves[0])[0][0]
    found = target_logprobs.target_logprobs(hidden_ME, target_logprobs.Head.of(model), targets_M, smoothing)
    found_M = found.logprobs_M
    assert found.chosen_M.tolist() == logprobs_MV.argmax(-1).tolist()
    torch.testing.assert_close(found_M, expected_M, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients(found_M), gradients(expected_M), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
