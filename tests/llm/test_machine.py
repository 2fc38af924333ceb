"""What is measured of the machine before a plan is made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from luthier.llm.engine import torch_model


@pytest.fixture(autouse=True)
def _measure_again() -> Iterator[None]:
    torch_model._bfloat16_speed.cache_clear()
    torch_model._int8_speed.cache_clear()
    torch_model.has_exact_integers.cache_clear()
    yield
    torch_model._bfloat16_speed.cache_clear()
    torch_model._int8_speed.cache_clear()
    torch_model.has_exact_integers.cache_clear()


def _pretend(monkeypatch: pytest.MonkeyPatch, flags: str, float32: float, bfloat16: float) -> None:
    rates = {torch.float32: float32, torch.bfloat16: bfloat16, torch.int16: 2 * float32, torch.int8: 4 * float32}
    monkeypatch.setattr(torch_model, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch_model, "cpu_flags", lambda: flags)
    monkeypatch.setattr(torch_model, "_matmul_flops", lambda here, probe, *dtypes: [rates[dtype] for dtype in dtypes])


@pytest.mark.parametrize(
    ("flags", "float32", "bfloat16", "fast"),
    [
        ("fpu avx512_bf16", 200e9, 900e9, True),
        ("fpu avx512_bf16", 330e9, 170e9, False),  # an Intel Xeon of 2024 with its matrix unit hidden
        ("fpu avx512f", 330e9, 900e9, False),
    ],
)
def test_bfloat16_is_fast_where_the_processor_has_it_and_is_seen_to_be(
    monkeypatch: pytest.MonkeyPatch, flags: str, float32: float, bfloat16: float, fast: bool
) -> None:
    _pretend(monkeypatch, flags, float32, bfloat16)
    machine = torch_model.measure_machine()
    assert machine.has_fast_bfloat16 == fast
    assert machine.matmul_flops == (bfloat16 if fast else float32)
    assert machine.int8_speed == pytest.approx(2 / (1 / 2 + 1 / 4))


def test_a_processor_whose_integers_overflow_does_not_multiply_them(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch._int_mm
    in_16_bits = 2**15 - 1  # what two products are added in where there is no instruction for four
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: exact(left, right).clamp(-in_16_bits, in_16_bits))
    assert torch_model.measure_machine().int8_speed is None


def test_this_machine_is_measured() -> None:
    machine = torch_model.measure_machine()
    assert machine.matmul_flops > 1e9  # a rate in FLOP per second, whatever the machine
    assert machine.device_name
    if machine.device == "cpu":
        assert machine.int8_speed is None or machine.int8_speed > 0
