"""A GGUF base model → a plain model folder (safetensors, tokenizer.json, chat template), done once and cached."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from luthier.errors import InputError

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# How llama.cpp's named splitting rules read in the tokenizers package, where transformers does not restore them.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
RESTORED_BY_TRANSFORMERS = {"default", "gpt-2", "llama-bpe", "qwen2"}


def convert_gguf(path: Path) -> None:
    """Convert the GGUF file at ``path`` into a plain model folder beside it, and delete the file.

    Quantised weights become float32, bit for bit what the file says.

    Raises:
        InputError: the tokenizer's way of splitting text is not known, so tokens would come out wrong.
    """
    folder = path.parent
    splitting = _field(path, "tokenizer.ggml.pre") or "default"
    if splitting not in PRE_TOKENIZERS and splitting not in RESTORED_BY_TRANSFORMERS:
        raise InputError(f"{path.name} splits text by the rule {splitting!r}, which is not known here.")
    with redirect_stderr(io.StringIO()):  # its progress bar
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    with torch.device("meta"):  # a loaded GGUF model refuses to be saved; a plain one takes its tensors over
        plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _tidy(folder / "config.json", "_model_name_or_path")
    _tidy(folder / "tokenizer_config.json", "is_local", "local_files_only", "model_max_length")
    if splitting in PRE_TOKENIZERS:
        mended = Tokenizer.from_file(str(folder / "tokenizer.json"))
        mended.pre_tokenizer = PRE_TOKENIZERS[splitting]()
        mended.save(str(folder / "tokenizer.json"))
    path.unlink()


def _field(path: Path, key: str) -> str | None:
    field = gguf.GGUFReader(path).get_field(key)
    return None if field is None else str(field.contents())


def _tidy(path: Path, *keys: str) -> None:
    """Drop what transformers writes about where and how it loaded a model."""
    settings = json.loads(path.read_text("utf-8"))
    kept = {key: value for key, value in settings.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False), "utf-8")
