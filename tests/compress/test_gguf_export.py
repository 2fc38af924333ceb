"""A GGUF file holds the model that it was made from, and other programs read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.compress.engine.gguf import write_gguf
from luthier.errors import InputError


@pytest.mark.parametrize(("form", "tolerance"), [("f16", 1e-3), ("q8_0", 2e-2)])
def test_a_gguf_file_gives_the_models_weights_back(
    tiny_base: Path, tmp_path: Path, form: str, tolerance: float
) -> None:
    write_gguf(tiny_base, tmp_path / "model.gguf", form)  # type: ignore[arg-type]
    original = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    assert set(loaded) == set(original)
    for name, tensor in original.items():
        gap = (loaded[name].float() - tensor).abs().max() / tensor.abs().max()
        assert float(gap) < tolerance, name


def test_a_gguf_file_has_the_tokenizer_and_the_chat_template(tiny_base: Path, tmp_path: Path) -> None:
    write_gguf(tiny_base, tmp_path / "model.gguf", "f16", name="tiny")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokenizer = json.loads((tiny_base / "tokenizer.json").read_text())
    pieces = reader.get_field("tokenizer.ggml.tokens").contents()
    assert {piece: pieces.index(piece) for piece in tokenizer["model"]["vocab"]} == tokenizer["model"]["vocab"]
    assert reader.get_field("tokenizer.chat_template").contents() == (tiny_base / "chat_template.jinja").read_text()
    assert pieces[reader.get_field("tokenizer.ggml.eos_token_id").contents()] == "<|im_end|>"


def test_llama_cpp_reads_the_file_and_gives_the_same_logprobs_order(tiny_base: Path, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    write_gguf(tiny_base, tmp_path / "model.gguf", "f16")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(tmp_path / "model.gguf")
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    server = xllamacpp.Server(parameters)
    prompt = [5, 6, 7, 8, 30, 31]
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 5, "temperature": 0.0}
    reply = server.handle_completions(request)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_base)(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = np.argsort(-logits.numpy())[:3].tolist()
    found = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert [entry["id"] for entry in found][:3] == expected


def test_an_unknown_architecture_is_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["MysteryForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="MysteryForCausalLM"):
        write_gguf(folder, tmp_path / "model.gguf", "f16")
