"""A GGUF file whose weights are small integers → the same weights in float16, which the engine multiplies faster.

openvino unpacks integers again for every product: with 32 requests at once, expanded weights make 1.7 times as many
tokens a second (docs/measurements.md). They take more memory, so large files are left alone.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import BufferedWriter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT
from gguf.quants import dequantize

EXPANDED_BYTES = 2**30
UNQUANTISED = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16})
STRING, ARRAY = 8, 9
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF's types of fixed size


@dataclass(frozen=True)
class Tensor:
    """An entry of a file's list of tensors. ``dimensions`` begins with the one that varies fastest."""

    name: bytes
    dimensions: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.dimensions))

    @property
    def bytes(self) -> int:
        """How long it is in its file."""
        block, size = GGML_QUANT_SIZES[self.type]
        return self.elements // block * size

    @property
    def expanded(self) -> Tensor:
        """The entry of the same tensor in float16, if it is quantised."""
        return self if self.type in UNQUANTISED else replace(self, type=GGMLQuantizationType.F16)


class GgufFile:
    """The layout of a GGUF file: its header with the fields, its tensors, and where their data begins.

    Raises:
        ValueError: it is not GGUF of version 2 or 3, or ends too early.
    """

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._position = 0
        self._fields: dict[bytes, int] = {}
        magic, version, tensors, fields = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("not a GGUF file of version 2 or 3")
        for _ in range(fields):
            self._skip_field()
        self.header = content[: self._position]
        self.tensors = [self._tensor() for _ in range(tensors)]
        self.alignment = self._number(b"general.alignment") or GGUF_DEFAULT_ALIGNMENT
        self._data = self._position + -self._position % self.alignment

    @property
    def expanded_header(self) -> bytes:
        """The header of the same file in float16."""
        position = self._fields.get(b"general.file_type")
        header = bytearray(self.header)
        if position is not None:
            struct.pack_into("<I", header, position, LlamaFileType.MOSTLY_F16)
        return bytes(header)

    def expanded_data(self, tensor: Tensor) -> bytes:
        """Return a tensor's data, in float16 if it is quantised."""
        start = self._data + tensor.offset
        if tensor.type in UNQUANTISED:
            return self._content[start : start + tensor.bytes]
        packed = np.frombuffer(self._content, np.uint8, tensor.bytes, start)
        rows = packed.reshape(tensor.elements // tensor.dimensions[0], -1)
        return dequantize(rows, tensor.type).astype(np.float16).tobytes()

    def _number(self, name: bytes) -> int | None:
        position = self._fields.get(name)
        return None if position is None else int(struct.unpack_from("<I", self._content, position)[0])

    def _skip_field(self) -> None:
        name = self._string()
        (kind,) = self._unpack("<I")
        self._fields[name] = self._position
        if kind == ARRAY:
            kind, length = self._unpack("<IQ")
        else:
            length = 1
        if kind == STRING:
            for _ in range(length):
                (size,) = self._unpack("<Q")
                self._position += size
        else:
            self._position += VALUE_BYTES[kind] * length

    def _tensor(self) -> Tensor:
        name = self._string()
        (count,) = self._unpack("<I")
        dimensions = self._unpack(f"<{count}Q")
        kind, offset = self._unpack("<IQ")
        return Tensor(name, dimensions, GGMLQuantizationType(kind), offset)

    def _string(self) -> bytes:
        (size,) = self._unpack("<Q")
        self._position += size
        return self._content[self._position - size : self._position]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from(form, self._content, self._position)
        except struct.error as error:
            raise ValueError("the GGUF file ends within its header") from error
        self._position += struct.calcsize(form)
        return values


@contextmanager
def expanded(path: Path, limit_bytes: int = EXPANDED_BYTES) -> Iterator[Path]:
    """Give the path of a file with the same weights in float16, which is gone afterwards.

    It is ``path`` itself where no weights are integers, and where they would need more than ``limit_bytes``.

    Raises:
        ValueError: the file is not GGUF, or is broken.
    """
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        source = GgufFile(stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        whole = sum(tensor.expanded.bytes for tensor in source.tensors)
        if whole > limit_bytes or all(tensor.type in UNQUANTISED for tensor in source.tensors):
            yield path
            return
        folder = stack.enter_context(TemporaryDirectory(prefix="luthier-expanded-"))
        target = Path(folder) / path.name
        with target.open("wb") as out:
            _write(source, out)
        yield target


def _write(source: GgufFile, out: BufferedWriter) -> None:
    out.write(source.expanded_header)
    offset = 0
    for tensor in (one.expanded for one in source.tensors):
        sizes = struct.pack(f"<I{len(tensor.dimensions)}Q", len(tensor.dimensions), *tensor.dimensions)
        out.write(struct.pack("<Q", len(tensor.name)) + tensor.name + sizes)
        out.write(struct.pack("<IQ", tensor.type, offset))
        offset += tensor.bytes + -tensor.bytes % source.alignment
    out.write(b"\0" * (-out.tell() % source.alignment))
    for tensor in source.tensors:
        out.write(source.expanded_data(tensor))
        out.write(b"\0" * (-out.tell() % source.alignment))
