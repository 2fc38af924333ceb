"""The compiled operations give what torch's give, in any layout and with any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.llm.engine.kernels import find_kernels
from luthier.llm.engine.layer_operations import Adapter, LayerOperations
from luthier.llm.engine.native_operations import NativeOperations, log_softmax_in_place, operations_for
from luthier.llm.engine.row_attention import Heads
from luthier.llm.engine.row_layout import RowLayout
from luthier.llm.rows import Group

CPU = torch.device("cpu")
TORCH = LayerOperations()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # bfloat16 keeps 8 bits, torch rounds on the way
LAYOUTS = {
    "one token": [Group(0, (1,))],
    "short and long": [Group(0, (5, 70, 33))],
    "a shared prefix": [Group(27, (37, 30, 17, 17, 1))],
    "two prefixes": [Group(16, (3, 15)), Group(0, (9,)), Group(1, (64, 2))],
    "pieces": [Group(40, (300,)), Group(0, (257,))],
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def native(dtype: torch.dtype) -> NativeOperations:
    found = operations_for(dtype, CPU)
    if not isinstance(found, NativeOperations):
        pytest.skip("no C compiler here")
    return found


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert float((found.float() - exact).norm()) <= TOLERANCE[dtype] * float(exact.norm()) + 1e-6


@pytest.mark.parametrize("width", [16, 48, 576])
def test_norms(native: NativeOperations, dtype: torch.dtype, threads: int, width: int) -> None:
    x, dy, onto = (numbers(37, width, dtype=dtype, seed=seed) for seed in range(3))
    weight = numbers(width, dtype=torch.float32, seed=4) * 0.3 + 0.5
    exact = weight.to(dtype).float()
    assert_close(native.norm(x, weight, 1e-5), TORCH.norm(x.float(), exact, 1e-5), dtype)
    found = native.norm_backward(dy, x, weight, 1e-5, onto)
    assert_close(found, TORCH.norm_backward(dy.float(), x.float(), exact, 1e-5, onto.float()), dtype)


@pytest.mark.parametrize("tokens", [1, 5])
def test_norms_of_heads(native: NativeOperations, dtype: torch.dtype, tokens: int) -> None:
    qkv = numbers(tokens, 6, 32, dtype=dtype)
    heads, weight = qkv[:, :4], numbers(32, dtype=torch.float32, seed=1)  # of one token they lie side by side
    assert_close(native.norm(heads, weight, 1e-5), TORCH.norm(heads.float(), weight.to(dtype).float(), 1e-5), dtype)


def test_a_kernel_is_not_called_with_another_number_of_arguments(native: NativeOperations, dtype: torch.dtype) -> None:
    x = numbers(4, 16, dtype=dtype)
    with pytest.raises(ValueError, match="shorter"):
        native._run("gated", x, x, 4)


def test_the_gate(native: NativeOperations, dtype: torch.dtype, threads: int) -> None:
    gate_up, dy = numbers(37, 160, dtype=dtype) * 4, numbers(37, 80, dtype=dtype, seed=1)
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -90.0])
    exact, exact_dy = gate_up.float(), dy.float().clone()
    assert_close(native.gated(gate_up), TORCH.gated(exact), dtype)
    assert_close(native.gated_backward(dy, gate_up), TORCH.gated_backward(exact_dy, exact), dtype)
    assert_close(dy, exact_dy, dtype)


def test_rotation_there_and_back(native: NativeOperations, dtype: torch.dtype, threads: int) -> None:
    qkv = numbers(29, 10, 64, dtype=dtype)
    angles = numbers(29, 1, 32, dtype=torch.float32, seed=1).repeat(1, 1, 2)
    rope = (angles.cos(), angles.sin())
    before, exact = qkv.clone(), qkv.float().clone()
    native.rotate(qkv[:, :7], rope)
    TORCH.rotate(exact[:, :7], rope)
    assert_close(qkv, exact, dtype)
    assert torch.equal(qkv[:, 7:], before[:, 7:])
    native.rotate(qkv[:, :7], rope, back=True)
    assert_close(qkv, before.float(), dtype)


@pytest.mark.parametrize("heads", [Heads(6, 2, 0.2), Heads(4, 4, 0.3), Heads(9, 3, 0.125)], ids=["6:2", "4:4", "9:3"])
@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("magnitude", [1, 5], ids=["even", "peaked"])
def test_attention(
    native: NativeOperations, dtype: torch.dtype, threads: int, groups: list[Group], heads: Heads, magnitude: int
) -> None:
    layout = RowLayout.make(groups, CPU)
    tokens = len(layout.positions_T)
    qkv = numbers(tokens, heads.query + 2 * heads.key, 32, dtype=dtype) * magnitude
    dout = numbers(tokens, heads.query, 32, dtype=dtype, seed=1)
    out, log_sums = native.attend(qkv, heads, layout)
    exact, _ = TORCH.attend(qkv.float(), heads, layout)
    assert_close(out, exact, dtype)
    found = native.attend_backward(dout, out, log_sums, qkv, heads, layout)
    assert_close(found, TORCH.attend_backward(dout.float(), exact, None, qkv.float(), heads, layout), dtype)
    assert torch.equal(found, native.attend_backward(dout, out, log_sums, qkv, heads, layout)), "a second run differs"


def adapters(outputs: list[int], inputs: int, rank: int, scales: list[float]) -> list[Adapter]:
    found, first = list[Adapter](), 0
    for index, (count, scale) in enumerate(zip(outputs, scales, strict=True)):
        down = torch.nn.Parameter(numbers(rank, inputs, dtype=torch.float32, seed=index) / 8)
        up = torch.nn.Parameter(numbers(count, rank, dtype=torch.float32, seed=9 + index) / 8)
        ranks = slice(index * rank, (index + 1) * rank)
        found.append(Adapter(down, up, scale, slice(first, first + count), ranks))
        first += count
    return found


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 24, 71])
@pytest.mark.parametrize(
    ("outputs", "inputs", "rank", "scales"),
    [
        ([64], 96, 16, [2.0]),
        ([96, 32, 48], 80, 16, [2.0, 2.0, 2.0]),
        ([144, 144], 176, 32, [0.5, 0.5]),
        ([64, 32], 64, 8, [2.0, 2.0]),  # of these ranks, scales and widths torch takes care
        ([64, 32], 64, 16, [2.0, 1.0]),
        ([40, 32], 64, 16, [2.0, 2.0]),
    ],
)
def test_adapters(
    native: NativeOperations,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    threads: int,
    tokens: int,
    outputs: list[int],
    inputs: int,
    rank: int,
    scales: list[float],
) -> None:
    called, run = [], native._run
    monkeypatch.setattr(native, "_run", lambda name, *arguments: (called.append(name), run(name, *arguments)))
    given = adapters(outputs, inputs, rank, scales)
    x, dy = numbers(tokens, inputs, dtype=dtype), numbers(tokens, sum(outputs), dtype=dtype, seed=1)
    y, low = native.adapt(x, given, sum(outputs))
    exact_y, exact_low = TORCH.adapt(x.float(), given, sum(outputs))
    assert_close(y, exact_y, dtype)
    assert_close(low, exact_low, dtype)
    dx, dlow = native.adapt_backward(dy, given)
    exact_dx, exact_dlow = TORCH.adapt_backward(dy.float(), given)
    assert_close(dx, exact_dx, dtype)
    assert_close(dlow, exact_dlow, dtype)
    found = native.adapter_gradients(dy, x, low, dlow, given)
    exact = TORCH.adapter_gradients(dy.float(), x.float(), low.float(), dlow.float(), given)
    for ours, theirs in zip(found, exact, strict=True):
        for gradient, wanted in zip(ours, theirs, strict=True):
            assert gradient.dtype == torch.float32
            assert gradient.stride() == wanted.stride() == (wanted.shape[1], 1)
            assert float((gradient - wanted).norm()) <= TOLERANCE[dtype] * float(wanted.norm()) + 1e-6
    alike = rank % 16 == 0 and len(set(scales)) == 1 and not any(count % 16 for count in outputs)
    assert called == (["adapt", "adapt_backward", "adapter_gradients"] if alike else [])
    again = native.adapter_gradients(dy, x, low, dlow, given)
    assert all(torch.equal(a, b) for one, two in zip(found, again, strict=True) for a, b in zip(one, two, strict=True))


@torch.no_grad()
def test_layers_of_which_some_have_adapters_go_to_torch(native: NativeOperations, dtype: torch.dtype) -> None:
    first, second, third = adapters([32, 48, 16], 64, 16, [2.0] * 3)
    x = numbers(9, 64, dtype=dtype)
    for some in ([first, second], [second, third], [first, third]):
        moved = [replace(one, ranks=slice(16 * i, 16 * i + 16)) for i, one in enumerate(some)]
        y, low = native.adapt(x, moved, 96)
        exact_y, exact_low = TORCH.adapt(x.float(), moved, 96)
        assert_close(y, exact_y, dtype)
        assert_close(low, exact_low, dtype)


INTEGER_TESTS = str(Path(__file__).with_name("test_integers.py"))
VARIANTS = ["-mno-avx512bf16 -mno-avx512vnni", "-mno-avx512f", "-mno-avx2 -fno-openmp"]  # compiled in haste: -O1


@pytest.mark.skipif(find_kernels(torch.float32) is None, reason="no C compiler here")
@pytest.mark.parametrize("variant", VARIANTS)
def test_processors_with_fewer_instructions_get_the_same(variant: str, tmp_path: Path) -> None:
    # Another process: a compiler is asked once. Its wrapper has the last word on the flags.
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "cc")} "$@" -O1 {variant}\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CC": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", __file__, INTEGER_TESTS]
    done = subprocess.run(
        [*command, "-k", "test_adapters or test_attention or 16_bits or kernels_give_what_torch_gives"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
    assert (tmp_path / "cache" / "luthier" / "kernels").is_dir()


def test_log_softmax_and_its_gradient(native: NativeOperations, dtype: torch.dtype, threads: int) -> None:
    logits = numbers(7, 320, dtype=dtype) * 6
    logits[2, 5] = logits[2, 300] = 50.0  # of two that are equal, the first
    targets = torch.tensor([0, 319, 300, 17, 16, 15, 100])
    exact = logits.float().clone().requires_grad_(True)
    expected = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    before = logits.clone()
    found, chosen = native.log_softmax(logits, targets, gradient=False) or (None, None)
    assert torch.equal(logits, before)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(chosen, exact.argmax(-1))
    native.log_softmax(logits, targets, gradient=True)
    assert_close(logits, exact.grad, dtype)


def test_a_number_that_is_none_is_passed_on(native: NativeOperations, dtype: torch.dtype) -> None:
    layout = RowLayout.make([Group(0, (20,))], CPU)
    qkv = numbers(20, 4, 32, dtype=dtype)
    qkv[7, 2, 3] = torch.nan  # of a key: those before it do not see it
    out, _ = native.attend(qkv, Heads(2, 1, 0.2), layout)
    assert out[:7].isfinite().all()
    assert out[7:].isnan().all()
    gate_up = numbers(3, 32, dtype=dtype)
    gate_up[1, 5] = torch.nan
    logits = numbers(3, 32, dtype=dtype)
    logits[1, 30] = torch.nan
    logprobs, _ = native.log_softmax(logits, torch.tensor([1, 2, 3]), gradient=True) or (None, None)
    assert logprobs.isnan().tolist() == [False, True, False]
    assert native.gated(gate_up).isnan().nonzero().tolist() == [[1, 5]]
    assert native.norm(gate_up, torch.ones(32), 1e-5).isnan().all(1).tolist() == [False, True, False]


def test_what_the_kernels_are_not_made_for_goes_to_torch(native: NativeOperations, dtype: torch.dtype) -> None:
    odd = numbers(5, 24, dtype=dtype)
    assert_close(native.norm(odd, torch.ones(24), 1e-5), TORCH.norm(odd.float(), torch.ones(24), 1e-5), dtype)
    turned = numbers(32, 5, dtype=dtype).T
    assert_close(native.gated(turned), TORCH.gated(turned.float()), dtype)
    assert log_softmax_in_place(odd, torch.zeros(5, dtype=torch.int64), gradient=True) is None
    assert log_softmax_in_place(odd.to(torch.float16), torch.zeros(5, dtype=torch.int64), gradient=True) is None


def test_other_types_and_machines_without_a_compiler_go_to_torch(tmp_path: Path) -> None:
    assert type(operations_for(torch.float16, CPU)) is LayerOperations
    assert find_kernels(torch.float16) is None
    ask = "import torch; from luthier.llm.engine.kernels import find_kernels; print(find_kernels(torch.float32))"
    environment: dict[str, Any] = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for compiler in ("false", str(tmp_path / "none")):
        command = [sys.executable, "-c", ask]
        said = subprocess.run(command, env=environment | {"CC": compiler}, capture_output=True, text=True, check=True)
        assert said.stdout == "None\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_kernels(torch.float32) is None, reason="no C compiler here")
def test_kernels_are_compiled_once(tmp_path: Path) -> None:
    ask = "import torch; from luthier.llm.engine.kernels import find_kernels; print(find_kernels(torch.float32)._name)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", ask]
    names = [
        Path(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip())
        for _ in range(2)
    ]
    assert names[0].name == "kernels.so"
    assert not names[0].exists()
    assert names[1] == next(tmp_path.rglob("*.so"))
    size = names[1].stat().st_size
    names[1].write_bytes(b"half written")
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).name == "kernels.so"  # compiled again, with the same flags
    assert [path.stat().st_size for path in tmp_path.rglob("*.so*")] == [size]
