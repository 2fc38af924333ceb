"""Models in torch: which machine there is, loading a base model folder, and a base with its adapter.

Training, scoring and merging (:mod:`luthier.llm.engine.merging`) come through here, so that all of them see the same
numbers.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from luthier.errors import InputError
from luthier.llm.base_bits import read_base_bits
from luthier.llm.base_config import ENCODER_TYPES, UNBOUNDED, context_length, rows_up_to
from luthier.llm.engine.gradual import Holding, fill, hold, is_explained, outline
from luthier.llm.engine.held_linear import holdable
from luthier.llm.engine.layer_operations import INT8_MAX
from luthier.llm.engine.native_operations import operations_for
from luthier.llm.engine.processor import cpu_flags, cpu_line
from luthier.llm.engine.row_attention import ATTENTION_NAME
from luthier.llm.engine.weight_files import WeightFiles
from luthier.llm.machine_memory import machine_memory
from luthier.records.base_model import FAST_BFLOAT16, Machine

Precision = Literal["float32", "bfloat16"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BFLOAT16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
HEADS = frozenset({"score", "classifier", "pre_classifier", "pooler", "head"})
_Probe = tuple[int, int, int]  # size of the matrices, products in a row, runs of which the best counts
PROBES: dict[str, _Probe] = {"cpu": (1024, 1, 5), "mps": (2048, 4, 5), "cuda": (8192, 8, 5)}
RATIO_PROBE: _Probe = (320, 1, 60)
SCORING_BYTES = 2_000_000_000  # what scoring takes beside the weights
REFUSED_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

transformers_logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
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
    speed = _bfloat16_speed(here)
    name = torch.cuda.get_device_name() if here.type == "cuda" else cpu_line("model name") or "CPU"
    main = machine_memory().free_bytes + psutil.Process().memory_info().rss  # what this process holds is its own
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=int(torch.cuda.mem_get_info()[0]) if here.type == "cuda" else main,
        main_memory_bytes=main if here.type == "cuda" else None,
        device=here.type,
        device_name=name,
        has_fast_bfloat16=fast,
        bfloat16_speed=speed,
        int8_speed=_int8_speed(here),
        matmul_flops=_matmul_flops(here, PROBES[here.type], torch.bfloat16 if fast else torch.float32)[0],
    )


def has_fast_bfloat16(here: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices about as fast as float32 ones, or faster.

    A processor is asked and then timed, once a process: server processors whose matrix unit is hidden from a virtual
    machine have the instructions still, at half of float32's rate.
    """
    if here.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return (_bfloat16_speed(here) or 0.0) >= FAST_BFLOAT16


def load_base(
    folder: Path,
    precision: Precision | None,
    *,
    kind: Any = AutoModelForCausalLM,
    longest: int | None = None,
    on: torch.device | None = None,
    **options: Any,
) -> Any:
    """Load a base model folder for training or scoring, with attention within rows where it can have it.

    ``precision`` is that of the weights (None: as their files have them), ``kind`` the transformers class of its head,
    ``options`` what that head needs to know, ``on`` a device other than the best one. No example has more than
    ``longest`` tokens (None: the model's context).

    Raises:
        InputError: the weights are in a format that can run code (only safetensors are read), or transformers has no
            such head for the family.
    """
    _refuse_code(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _refuse_head(kind, config)
    model = kind.from_pretrained(
        folder,
        dtype=DTYPES[precision] if precision else "auto",
        attn_implementation=_attention(config, longest),
        use_safetensors=True,
        local_files_only=True,
        **options,
    )
    model.config.use_cache = False
    return model.to(on or device()).eval()


def load_held(
    folder: Path,
    holding: Holding,
    *,
    kind: Any = AutoModelForCausalLM,
    choose: Callable[[Any], None] = lambda model: model.requires_grad_(False),
    longest: int | None = None,
    on: torch.device | None = None,
    **options: Any,
) -> Any:
    """Load a base as :func:`load_base`, each tensor in the numbers that it is held in, and never in others.

    ``choose`` marks what is trained on the model before it has its numbers. A base whose files have other names than
    its parameters (an encoder, as a rule) is loaded whole into main memory first.

    Raises:
        InputError: as :func:`load_base`; or there are no layers to hold in few bits.
    """
    _refuse_code(folder)
    config = options.pop("config", None) or AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    _refuse_head(kind, config)
    here, files = on or device(), WeightFiles(folder)
    model = outline(kind, config, dtype=holding.dtype, attn_implementation=_attention(config, longest))
    if holding.is_in_few_bits and not any(holdable(model)):
        hint = "use mode lora" if holding.bits else "precision=auto"
        raise InputError(f"A {config.model_type} has no linear layers to hold in few bits.", hint=hint)
    if is_explained(model, files, frozenset(_head_names(model))):
        choose(model)
        fill(model, files, holding, here)
    else:
        model = load_base(folder, "float32", kind=kind, longest=longest, on=torch.device("cpu"), config=config)
        choose(model)
        hold(model, holding)
        model = model.to(here)
    model.config.use_cache = False
    model.base_bits = holding.bits  # what is trained over it belongs to the rounded weights
    return model


def _refuse_code(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.iterdir() if path.suffix in REFUSED_WEIGHTS)
        raise InputError(
            f"{folder} has no .safetensors weights{' but ' + ', '.join(found) if found else ''}; "
            "formats that can run code when they are loaded are refused.",
            hint="convert it to safetensors first",
        )


def _refuse_head(kind: Any, config: Any) -> None:
    if type(config) not in kind._model_mapping:
        raise InputError(
            f"A {config.model_type} cannot be trained here: transformers has no {kind.__name__} for it.",
            hint="take a base of another family, such as smollm2-135m",
        )


def _attention(config: Any, longest: int | None) -> str | None:
    """Return the attention that a model is loaded with: ours, for rows, where it can have it, else its own choice."""
    values = config.to_dict()
    takes_rows = (longest or context_length(values) or UNBOUNDED) <= rows_up_to(values)
    return ATTENTION_NAME if takes_rows else None


def is_encoder(folder: Path) -> bool:
    """Return whether a base reads text in both directions, so that it can label but not write."""
    return AutoConfig.from_pretrained(folder, local_files_only=True).model_type in ENCODER_TYPES


def heads(model: Any) -> list[tuple[str, torch.nn.Module]]:
    """Return what stands behind the layers of a classifier or scorer, by name; nothing for a model that writes.

    A base that was made for another purpose lacks some of it, which then starts at random.
    """
    owners = (model, getattr(model, model.base_model_prefix))
    return [(name, child) for owner in owners for name, child in owner.named_children() if name in HEADS]


def _head_names(model: Any) -> list[str]:
    parts = {id(parameter) for _, head in heads(model) for parameter in head.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in parts]


def load_with_adapter(
    base_folder: Path, adapter_folder: Path, precision: Precision | None, *, on: torch.device | None = None
) -> Any:
    """Load a base and an adapter on it, for scoring. The adapter and the head keep their own precision.

    An adapter of a classifier or scorer brings its classes in a ``config.json`` of its own. The base is held in the
    bits that the adapter was trained over.
    """
    from peft import PeftModel

    bits = read_base_bits(adapter_folder)
    options: dict[str, Any] = {}
    if (adapter_folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(adapter_folder, local_files_only=True)
        options = {"kind": AutoModelForSequenceClassification, "config": config}
    if bits:
        dtype = DTYPES[precision] if precision else WeightFiles(base_folder).dtype
        base = load_held(base_folder, Holding(dtype, bits), on=on, **options)
    else:
        base = load_base(base_folder, precision, on=on, **options)
    for _, head in heads(base):
        head.float()
    return PeftModel.from_pretrained(base, str(adapter_folder), is_trainable=False).eval()


def roomy_device(folder: Path) -> torch.device:
    """Return the best device that has room to score with the model in a folder: the GPU, or the processor."""
    best = device()
    if best.type != "cuda":
        return best
    torch.cuda.empty_cache()
    enough = WeightFiles(folder).bytes * 1.2 + SCORING_BYTES <= torch.cuda.mem_get_info()[0]
    return best if enough else torch.device("cpu")


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


@lru_cache
def _bfloat16_speed(here: torch.device) -> float | None:
    """Return how many times as fast bfloat16 products of a processor are as float32 ones (None: it has none).

    By one thread and in short runs, of which some find the processor free whatever else runs on the machine.
    """
    if here.type != "cpu" or BFLOAT16_CPU_FLAGS.isdisjoint(cpu_flags().split()):
        return None
    with _one_thread():
        rates = _matmul_flops(here, RATIO_PROBE, torch.float32, torch.bfloat16)
    return rates[1] / rates[0]


@lru_cache
def has_exact_integers(here: torch.device) -> bool:
    """Return whether products of 8-bit integers can be made there, exactly.

    Instructions of older processors add pairs of products in 16 bits, which the largest numbers overflow.
    """
    if here.type != "cpu":
        return False
    size = RATIO_PROBE[0]
    largest = torch.full((size, size), INT8_MAX, dtype=torch.int8)
    exact = torch.full((size, size), -size * INT8_MAX**2, dtype=torch.int32)
    return torch.equal(torch._int_mm(largest, -largest), exact)


@lru_cache
def _int8_speed(here: torch.device) -> float | None:
    """Return how many times as fast products in integers are as float32 ones (None: they cannot be had).

    Of two products with each weight, one is made forward in 16 bits and one back in 8.
    """
    if not has_exact_integers(here):
        return None
    with _one_thread():
        exact, *rates = _matmul_flops(here, RATIO_PROBE, torch.float32, torch.int16, torch.int8)
    return len(rates) / sum(exact / rate for rate in rates)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _matmul_flops(here: torch.device, probe: _Probe, *dtypes: torch.dtype) -> list[float]:
    """Return the best rate of several runs for each type of number, in turns, so that what else runs slows all.

    A product must take longer than to start it: a GPU gets large ones.
    """
    size, products, runs = probe
    pairs = [[torch.randn(size, size, device=here).to(dtype) for _ in range(2)] for dtype in dtypes]
    best = [0.0] * len(dtypes)
    for _ in range(1 + runs):  # what comes first also pays for buffers and clocks
        for index, (left, right) in enumerate(pairs):
            started = time.perf_counter()
            for _ in range(products):
                found = _product(left, right)
            float(found[0, 0])  # reading a value waits for the device
            best[index] = max(best[index], 2 * products * size**3 / (time.perf_counter() - started))
    return best


def _product(left_TI: torch.Tensor, right_OI: torch.Tensor) -> torch.Tensor:
    if left_TI.dtype == torch.int16:
        found_TO = left_TI.new_empty(len(left_TI), len(right_OI), dtype=torch.int32)
        operations_for(torch.float32, left_TI.device).multiply_int16(found_TO, left_TI, right_OI)
        return found_TO
    return left_TI @ right_OI.t() if left_TI.dtype.is_floating_point else torch._int_mm(left_TI, right_OI.t())
