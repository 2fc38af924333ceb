"""In how many bits a base was held while an adapter was trained over it.

It belongs to the adapter: what was measured was the adapter over those rounded weights, so they are what it is scored
over, merged into and trained on over. Whole weights differ from them by far more than a merge may.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

Bits = Literal[4, 8]
FILE = "base_bits.json"


def read_base_bits(adapter: Path) -> Bits | None:
    """Return the bits that an adapter's base was held in; None where it was held whole."""
    path = adapter / FILE
    return json.loads(path.read_text("utf-8"))["bits"] if path.is_file() else None


def write_base_bits(adapter: Path, bits: Bits) -> None:
    """Write down the bits that an adapter's base was held in."""
    (adapter / FILE).write_text(json.dumps({"bits": bits}), "utf-8")
