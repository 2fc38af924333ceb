"""Models in torch: which machine there is, loading a base model folder, and a base with its adapter.

Training, scoring and merging come through here, so that all of them see the same numbers.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from luthier.errors import InputError
from luthier.llm.engine.prefix_attention import ATTENTION_NAME
from luthier.records.base_model import Machine

Precision = Literal["float32", "bfloat16"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BFLOAT16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
PROBE_SIZE = 1024
PROBE_RUNS = 5
REFUSED_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def device() -> torch.device:
    """Return the best device of this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def measure_machine() -> Machine:
    """Measure what plans depend on: memory, and the rate of matrix products (FLOP per second)."""
    here = device()
    fast = has_fast_bfloat16(here)
    name = torch.cuda.get_device_name() if here.type == "cuda" else _cpu_name()
    memory = torch.cuda.mem_get_info()[1] if here.type == "cuda" else psutil.virtual_memory().total
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=int(memory),
        device=here.type,
        device_name=name,
        has_fast_bfloat16=fast,
        matmul_flops=_matmul_flops(here, torch.bfloat16 if fast else torch.float32),
    )


def has_fast_bfloat16(here: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices faster than float32 ones."""
    if here.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    info = Path("/proc/cpuinfo")
    if here.type != "cpu" or not info.is_file():
        return False
    flags = next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return not BFLOAT16_CPU_FLAGS.isdisjoint(flags.split())


def load_base(folder: Path, precision: Precision, *, dropout: float = 0.0) -> PreTrainedModel:
    """Load a base model folder for training or scoring, with prefix-sharing attention where its family allows.

    Raises:
        InputError: the weights are in a format that can run code (only safetensors are read).
    """
    if not any(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.iterdir() if path.suffix in REFUSED_WEIGHTS)
        raise InputError(
            f"{folder} has no .safetensors weights{' but ' + ', '.join(found) if found else ''}; "
            "formats that can run code when they are loaded are refused.",
            hint="convert it to safetensors first",
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[precision], attn_implementation=ATTENTION_NAME, use_safetensors=True, local_files_only=True
    )
    model.config.use_cache = False
    return model.to(device()).eval()


def load_with_adapter(base_folder: Path, adapter_folder: Path, precision: Precision) -> Any:
    """Load a base and an adapter on it, for scoring. The adapter keeps its own precision."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base_folder, precision), str(adapter_folder), is_trainable=False)
    return model.eval()


def save_merged(base_folder: Path, adapter_folder: Path, destination: Path) -> None:
    """Write base + adapter as one plain model (safetensors), with the base's tokenizer and chat template.

    The products are added in float32 and saved in the precision of the base's own files.
    """
    merged = load_with_adapter(base_folder, adapter_folder, "float32").merge_and_unload()
    saved = AutoModelForCausalLM.from_pretrained(base_folder, local_files_only=True, dtype="auto", device_map="meta")
    merged = merged.to(saved.dtype)
    merged.config._attn_implementation = "sdpa"
    merged.config.use_cache = True
    merged.save_pretrained(destination)
    copy_tokenizer(base_folder, destination)


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy the files of a model folder that make its chat format."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and not (destination / name).exists():
            (destination / name).write_bytes((source / name).read_bytes())


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _matmul_flops(here: torch.device, dtype: torch.dtype) -> float:
    left = torch.randn(PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=here)
    right = torch.randn(PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=here)
    best = 0.0
    for _ in range(PROBE_RUNS):
        started = time.perf_counter()
        float((left @ right)[0, 0])  # reading a value waits for the device
        best = max(best, 2 * PROBE_SIZE**3 / (time.perf_counter() - started))
    return best
