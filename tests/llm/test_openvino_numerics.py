"""In which numbers a served model is computed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from luthier.llm.engine import openvino_numerics
from luthier.llm.engine.openvino_numerics import plugin_properties

PROBE = """
from luthier.llm.engine.openvino_worker import forbid_telemetry
forbid_telemetry()
from luthier.llm.engine import openvino_numerics
for properties in ({}, openvino_numerics.EXACT):
    model = openvino_numerics._product(properties).get_compiled_model()
    print(model.get_property("INFERENCE_PRECISION_HINT").to_string())
print(openvino_numerics.native_is_faster())
print(openvino_numerics.plugin_properties("auto", False, 0).get("INFERENCE_PRECISION_HINT", "native"))
"""


@pytest.mark.parametrize(
    ("precision", "quantised", "native_is_faster", "exact"),
    [
        ("auto", False, True, False),
        ("auto", False, False, True),
        ("auto", True, True, True),
        ("native", False, False, False),
        ("native", True, False, False),
        ("float32", False, True, True),
    ],
)
def test_numbers_are_narrow_only_where_that_is_faster_or_asked_for(
    monkeypatch: pytest.MonkeyPatch, precision: str, quantised: bool, native_is_faster: bool, exact: bool
) -> None:
    monkeypatch.setattr(openvino_numerics, "native_is_faster", lambda: native_is_faster)
    properties = plugin_properties(precision, quantised, 3)
    assert ("INFERENCE_PRECISION_HINT" in properties) == exact
    assert properties["INFERENCE_NUM_THREADS"] == 3


def test_this_machine_is_measured_with_both_kinds_of_numbers() -> None:
    """In a process of its own, as the worker is: openvino looks for its telemetry when it is imported."""
    lines = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()
    _native, exact, is_faster, chosen = lines[-4:]
    assert exact == "f32"
    assert chosen == ("native" if is_faster == "True" else "f32")
