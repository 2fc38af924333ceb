"""An adapter belongs to the base as it was held while it was trained: that is what all else uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_exactness import perturb
from test_methods import make_job, units

from luthier.errors import InputError
from luthier.evaluate.engine import scoring
from luthier.evaluate.engine.scoring import Scorer
from luthier.llm.base_bits import read_base_bits
from luthier.llm.engine.held_linear import HeldLinear
from luthier.llm.engine.merging import save_merged
from luthier.llm.engine.row_model import RowModel
from luthier.llm.engine.torch_model import load_base
from luthier.llm.rows import pack
from luthier.train.engine.checkpoint import BEST, save_best
from luthier.train.engine.trainable import load_trainable


def trainable(base: Path, folder: Path, start: Path | None = None, **options: Any) -> RowModel:
    job = make_job(base, folder, **options)
    model = load_trainable(base, job.plan.resolved, (), start)
    assert isinstance(model, RowModel)
    return model


def adapter_over_four_bits(base: Path, folder: Path) -> tuple[RowModel, Path]:
    model = trainable(base, folder, mode="qlora")
    perturb(model.model, 3)
    save_best(folder, model.model, "tiny")
    return model, folder / BEST


def losses(model: RowModel) -> torch.Tensor:
    (row,) = pack(units(8, "supervised", first=40), 4096)
    with torch.no_grad():
        return model.targets(row).logprobs_M


def test_an_adapter_says_in_how_many_bits_its_base_was(tiny_base: Path, tmp_path: Path) -> None:
    assert read_base_bits(adapter_over_four_bits(tiny_base, tmp_path)[1]) == 4
    save_best(tmp_path / "lora", trainable(tiny_base, tmp_path, mode="lora").model, "tiny")
    assert read_base_bits(tmp_path / "lora" / BEST) is None


@pytest.mark.parametrize("mode", ["qlora", "lora"])
def test_training_goes_on_over_the_base_that_the_adapter_knows(tiny_base: Path, tmp_path: Path, mode: str) -> None:
    first, adapter = adapter_over_four_bits(tiny_base, tmp_path)
    going_on = trainable(tiny_base, tmp_path, adapter, mode=mode)
    assert any(isinstance(module, HeldLinear) for module in going_on.model.modules()) == (mode == "qlora")
    assert torch.allclose(losses(going_on), losses(first), rtol=1e-6, atol=1e-6)
    save_best(tmp_path / "on", going_on.model, "tiny")
    assert read_base_bits(tmp_path / "on" / BEST) == 4


def test_training_does_not_go_on_over_other_bits(tiny_base: Path, tmp_path: Path) -> None:
    _, adapter = adapter_over_four_bits(tiny_base, tmp_path)
    with pytest.raises(InputError, match="a base in 4 bits, not 8") as refused:
        trainable(tiny_base, tmp_path, adapter, mode="qlora", base_bits=8)
    assert refused.value.hint == "set base_bits=4"


def test_what_is_scored_and_merged_is_what_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    model, adapter = adapter_over_four_bits(tiny_base, tmp_path)
    save_merged(tiny_base, adapter, tmp_path / "merged")
    examples = units(8, "supervised", first=40)
    prompts, answers = [one.tokens[:-1] for one in examples], [one.tokens[-1:] for one in examples]
    expected = losses(model).sort().values
    for scorer in (Scorer(tiny_base, adapter), Scorer(tmp_path / "merged")):
        scored = scorer.score(prompts, answers)
        found = torch.tensor([answer.logprobs[0] for answer in scored if answer.logprobs]).sort().values
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    over_the_whole_base = torch.tensor(
        [answer.logprobs[0] for answer in Scorer(tiny_base).score(prompts, answers) if answer.logprobs]
    )
    assert not torch.allclose(over_the_whole_base.sort().values, expected, atol=0.01)


@pytest.mark.parametrize("family", ["llama", "gemma"])  # whose layers run fused, and whose do not
def test_narrow_numbers_are_scored_in_float32_without_being_held_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model(family, **sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(narrow, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    held: list[RowModel] = []

    class Seen(RowModel):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            held.append(self)

    monkeypatch.setattr(scoring, "RowModel", Seen)
    (found,) = Scorer(tmp_path).score([[5, 6, 7]], [[8, 9]])
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = wide(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    assert found.logprobs == pytest.approx([float(expected[2, 8]), float(expected[3, 9])], abs=1e-5)
    dtype = torch.bfloat16 if family == "llama" else torch.float32
    assert {parameter.dtype for parameter in held[0].model.parameters()} == {dtype}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layers_below_the_last_are_held_as_they_are_used(tiny_base: Path, tmp_path: Path, precision: Any) -> None:
    model = trainable(tiny_base, tmp_path, mode="last_layers", last_layers=1, precision=precision).model
    dtypes = {parameter.requires_grad: set[torch.dtype]() for parameter in model.parameters()}
    for parameter in model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {getattr(torch, precision)}}
    whole = load_base(tiny_base, "float32")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, whole.model.layers[1].mlp.up_proj.weight)
