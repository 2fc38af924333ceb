"""In which numbers OpenVINO's CPU plugin computes a model; docs/decisions/0003-engine-numerics.md has the measurements.

Import :mod:`openvino` only after :func:`luthier.llm.engine.openvino_worker.forbid_telemetry`; so it is imported late.
"""

from __future__ import annotations

import mmap
import struct
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

UNQUANTISED_FILE_TYPES = {0, 1, 32}  # GGUF's general.file_type: float32, float16, bfloat16
CLEARLY = 0.9  # of float32's time: what is alike is computed exactly, whatever a measurement's noise
PROBE_ROWS = 32  # answers at once: a lone answer waits for memory, and narrow numbers are faster for it anywhere
PROBE_WIDTH = 512
PROBE_RUNS = 30
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
ROUNDED_GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"  # values that are rounded to 8 bits together; none with 0
UNTOUCHED = {ROUNDED_GROUP: "0"}
ROUNDED = {ROUNDED_GROUP: "32"}  # as llama.cpp does


def plugin_properties(precision: str, quantised: bool, threads: int) -> dict[str, Any]:
    """Return the CPU plugin's properties.

    ``precision`` is one of :data:`luthier.records.base_model.EnginePrecision`. ``threads`` 0 lets the plugin choose.
    """
    properties: dict[str, Any] = {"KV_CACHE_PRECISION": "f16"} | (ROUNDED if precision == "int8" else UNTOUCHED)
    if threads:
        properties["INFERENCE_NUM_THREADS"] = threads
    wants_exact = precision == "float32" or (precision == "auto" and quantised)
    if wants_exact or (precision != "native" and not native_is_faster()):
        properties |= EXACT
    return properties


@lru_cache
def native_is_faster() -> bool:
    """Time a product of the plugin in the processor's own numbers and in float32, in turns, once a process (0.1 s).

    Processors whose matrix unit is hidden from a virtual machine multiply bfloat16 at half of float32's rate.
    """
    products = [_product({}), _product(EXACT)]
    best = [float("inf")] * len(products)
    rows = np.ones((PROBE_ROWS, PROBE_WIDTH), dtype=np.float32)
    for _ in range(PROBE_RUNS):
        for index, product in enumerate(products):
            started = time.perf_counter()
            product.infer({0: rows})
            best[index] = min(best[index], time.perf_counter() - started)
    return best[0] < CLEARLY * best[1]


def is_quantised(path: Path) -> bool:
    """Say whether a GGUF file's weights are integers, by its ``general.file_type``."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        key = b"general.file_type"
        position = content.find(key)
        if position < 0:
            return False
        _value_type, file_type = struct.unpack_from("<II", content, position + len(key))
        return file_type not in UNQUANTISED_FILE_TYPES


def _product(properties: dict[str, str]) -> Any:
    """Compile a product with float16 weights, as those of a served model."""
    import openvino
    from openvino import opset13 as operations

    rows = operations.parameter([-1, PROBE_WIDTH], np.float32)
    weights = operations.constant(np.ones((PROBE_WIDTH, PROBE_WIDTH), dtype=np.float16))
    found = operations.matmul(rows, operations.convert(weights, "f32"), False, True)
    model = openvino.Model([found], [rows])
    alone = UNTOUCHED | {"INFERENCE_NUM_THREADS": "1"}  # so that some runs find a processor free
    return openvino.Core().compile_model(model, "CPU", alone | properties).create_infer_request()
