"""Weights are loaded, merged and saved tensor by tensor: the same numbers, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from luthier.llm.base_bits import read_base_bits, write_base_bits
from luthier.llm.engine import quantised, weight_files
from luthier.llm.engine.gradual import Holding
from luthier.llm.engine.held_linear import HeldLinear, holdable
from luthier.llm.engine.merging import save_merged, save_whole
from luthier.llm.engine.quantised import quantise
from luthier.llm.engine.torch_model import load_base, load_held, load_with_adapter
from luthier.llm.engine.weight_files import WeightFiles, save_weights

SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def write_model(folder: Path, family: str = "llama", **more: Any) -> Path:
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    kind.from_config(AutoConfig.for_model(family, **SIZES | more)).save_pretrained(folder)
    return folder


def numbers(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_a_base_has_the_numbers_that_transformers_gives_it(
    tmp_path: Path, family: str, dtype: torch.dtype, tied: bool
) -> None:
    folder = write_model(tmp_path, family, tie_word_embeddings=tied)
    expected = load_base(folder, "float32" if dtype == torch.float32 else "bfloat16")
    found = load_held(folder, Holding(dtype))
    assert numbers(found).keys() == numbers(expected).keys()
    for name, tensor in numbers(found).items():
        assert tensor.dtype == numbers(expected)[name].dtype
        assert torch.equal(tensor, numbers(expected)[name])
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == tied
    assert not found.training
    assert found.config._attn_implementation == expected.config._attn_implementation


def test_a_head_that_the_files_lack_starts_the_same_for_a_seed(tiny_base: Path) -> None:
    def scorer() -> Any:
        torch.manual_seed(3)
        return load_held(tiny_base, Holding(torch.bfloat16, 4), kind=AutoModelForSequenceClassification, num_labels=3)

    first, second = scorer(), scorer()
    assert first.score.weight.shape == (3, 64)
    assert torch.equal(first.score.weight, second.score.weight)
    assert 0.1 < float(first.score.weight.float().std()) < 0.3  # the base's initializer_range is 0.2


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert"])  # the files of an encoder have names of their own
def test_layers_in_few_bits_hold_what_the_files_say(tmp_path: Path, family: str, rounded: bool) -> None:
    folder = write_model(tmp_path, family)
    kind = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    whole = load_base(folder, "float32", kind=kind)
    held = load_held(folder, Holding(torch.bfloat16, 4, rounded=rounded), kind=kind)
    names = list(holdable(whole))
    assert len(names) == (14 if family == "llama" else 12)
    for name in names:
        expected = quantise(whole.get_submodule(name).weight, 4).whole(torch.bfloat16)
        assert isinstance(held.get_submodule(name), HeldLinear) != rounded
        assert torch.equal(held.get_submodule(name).weight, expected)
    assert {parameter.dtype for parameter in held.parameters()} == {torch.bfloat16}
    assert held.base_bits == 4


def test_what_is_quantised_in_pieces_is_quantised_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    whole = [quantise(weight, bits) for bits in (4, 8)]
    monkeypatch.setattr(quantised, "PIECE", quantised.BLOCK * quantised.GROUP)
    for bits, expected in zip((4, 8), whole, strict=True):
        found = quantise(weight, bits)  # type: ignore[arg-type]
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.whole(torch.float32), expected.whole(torch.float32))


# Files


def test_a_model_in_several_files_is_one_that_transformers_reads(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = WeightFiles(tiny_base)
    monkeypatch.setattr(weight_files, "FILE_BYTES", 100_000)
    save_weights(((name, files.read(name)) for name in files.names), tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((tmp_path / weight_files.INDEX).read_text())
    assert index["weight_map"].keys() == set(files.names)
    assert index["metadata"]["total_size"] == sum(files.read(name).nbytes for name in files.names)
    expected = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    again = WeightFiles(tmp_path)
    assert sorted(again.names) == sorted(files.names)
    assert again.shape("model.norm.weight") == (64,)
    assert again.dtype == torch.float32


# Merging


def write_adapter(base: Path, folder: Path, kind: Any = AutoModelForCausalLM, **more: Any) -> Path:
    task = "CAUSAL_LM" if kind is AutoModelForCausalLM else "SEQ_CLS"
    heads = None if kind is AutoModelForCausalLM else ["classifier"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task, modules_to_save=heads, **more)
    model = get_peft_model(kind.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    if kind is not AutoModelForCausalLM:
        model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_merged_encoder_is_the_base_as_its_adapter_knows_it(tmp_path: Path, bits: Any) -> None:
    base = write_model(tmp_path / "base", "bert")
    adapter = write_adapter(base, tmp_path / "adapter", AutoModelForSequenceClassification)
    if bits:
        write_base_bits(adapter, bits)
    save_merged(base, adapter, tmp_path / "merged")
    tokens = torch.tensor([[5, 6, 7, 8]])
    expected, merged = (
        load_with_adapter(base, adapter, "float32"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"),
    )
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-6)
    assert read_base_bits(adapter) == bits


def test_an_untied_head_and_narrow_numbers_survive_a_merge(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tie_word_embeddings=False)
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(narrow, base / "model.safetensors", metadata={"format": "pt"})
    adapter = write_adapter(base, tmp_path / "adapter", use_rslora=True)
    save_merged(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    with_peft = load_with_adapter(base, adapter, "float32").merge_and_unload().state_dict()
    assert merged.keys() == narrow.keys() == with_peft.keys()
    assert all(torch.equal(tensor, with_peft[name].to(torch.bfloat16)) for name, tensor in merged.items())
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_what_was_only_held_rounded_is_taken_from_the_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    model = load_held(base, Holding(torch.bfloat16), choose=lambda one: train_norm_alone(one))
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    model.model.norm.weight.data += 0.123
    model.save_pretrained(tmp_path / "trained")
    save_whole(base, tmp_path / "trained", tmp_path / "whole")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "whole"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.norm.weight"}
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"] + 0.123)


def train_norm_alone(model: Any) -> None:
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)


# Memory

BIG = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "tie_word_embeddings": True}
MEASURED = """
import json, sys
from pathlib import Path
import torch
from luthier.llm.engine import weight_files
from luthier.llm.engine.gradual import Holding
from luthier.llm.engine.merging import save_merged
from luthier.llm.engine.torch_model import load_held
base, adapter, merged, tiny = map(Path, sys.argv[1:])

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3  # megabytes

def peak(do):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    kept = do()
    return status("VmHWM") - before

weight_files.FILE_BYTES = 15_000_000
peak(lambda: load_held(tiny, Holding(torch.bfloat16, 4)))  # libraries are loaded
print(json.dumps({
    "quantised": peak(lambda: load_held(base, Holding(torch.bfloat16, 4))),
    "merged": peak(lambda: save_merged(base, adapter, merged)),
}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux measures the peak of a part of a program")
def test_neither_loading_in_few_bits_nor_merging_holds_the_base(tiny_base: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", **BIG)
    adapter = write_adapter(base, tmp_path / "adapter")
    size = WeightFiles(base).bytes / 1e6
    assert 95 < size < 110
    command = [sys.executable, "-c", MEASURED, *map(str, (base, adapter, tmp_path / "merged", tiny_base))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peaks = json.loads(said.splitlines()[-1])
    # Whatever holds the base needs its size at least. Beside codes, pieces and files in the making, the resident set
    # counts pages of mapped files and of libraries, which differ from run to run: 35 to 82 megabytes were seen.
    assert peaks["quantised"] < size
    assert peaks["merged"] < size
    assert len(WeightFiles(tmp_path / "merged").names) == len(WeightFiles(base).names)
