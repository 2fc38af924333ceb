"""A GGUF file with small integers is read as the same model in float16."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from luthier.compress.engine.gguf import write_gguf
from luthier.llm.engine.expanded_gguf import expanded
from luthier.llm.engine.openvino_numerics import is_quantised


@pytest.fixture
def small(tiny_base: Path, tmp_path: Path) -> Path:
    write_gguf(tiny_base, tmp_path / "model.gguf", "q8_0", name="tiny")
    return tmp_path / "model.gguf"


def test_every_weight_is_what_the_integers_say(small: Path) -> None:
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(small).tensors}
    assert gguf.GGMLQuantizationType.Q8_0 in {tensor.tensor_type for tensor in before.values()}
    with expanded(small) as path:
        after = gguf.GGUFReader(path).tensors
        assert [tensor.name for tensor in after] == list(before)
        for tensor in after:
            whole = dequantize(before[tensor.name].data, before[tensor.name].tensor_type)
            assert tensor.tensor_type in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32)
            assert np.array_equal(tensor.data, whole.astype(tensor.data.dtype)), tensor.name
        assert not is_quantised(path)
    assert not path.exists()
    assert is_quantised(small)


def test_all_fields_but_the_type_are_kept(small: Path) -> None:
    before = gguf.GGUFReader(small)
    with expanded(small) as path:
        after = gguf.GGUFReader(path)
        assert list(after.fields) == list(before.fields)
        changed = {name for name, one in before.fields.items() if after.fields[name].contents() != one.contents()}
        assert changed == {"general.file_type"}


def test_files_that_need_nothing_or_too_much_are_read_as_they_are(tiny_base: Path, small: Path) -> None:
    write_gguf(tiny_base, small.with_name("wide.gguf"), "f16")
    with expanded(small.with_name("wide.gguf")) as path:
        assert path == small.with_name("wide.gguf")
    with expanded(small, limit_bytes=1000) as path:
        assert path == small


@pytest.mark.parametrize("cut", [3, 30, 5000])
def test_a_broken_file_is_said_to_be_one(small: Path, cut: int) -> None:
    small.write_bytes(small.read_bytes()[:cut])
    with pytest.raises(ValueError, match="GGUF file"), expanded(small):
        pass
    small.write_bytes(b"GGML" + b"\0" * 100)
    with pytest.raises(ValueError, match="not a GGUF file"), expanded(small):
        pass
