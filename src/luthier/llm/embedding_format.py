"""How an encoder makes one vector of a text: its tokenizer, its longest text, and how the tokens' vectors are pooled.

A model made with sentence-transformers says it in files of its own: ``modules.json``, the pooling module's
``config.json``, and ``sentence_bert_config.json``. A plain encoder says nothing: the mean of its tokens is taken, as
sentence-transformers does. Vectors are of length 1 in any case, as those of OpenAI are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from luthier.errors import InputError
from luthier.llm.base_config import context_length, read_config
from luthier.templates.labelled import load_tokenizer

Pooling = Literal["mean", "cls"]
POOLINGS: dict[str, Pooling] = {  # as older and newer versions of sentence-transformers write them
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "mean": "mean",
    "cls": "cls",
}
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class EmbeddingFormat:
    """How one encoder reads a text. Make it with :meth:`load`.

    ``max_tokens`` counts special tokens too. ``dimensions`` is the length of a vector.
    """

    tokenizer: Tokenizer
    max_tokens: int
    vocabulary: int
    dimensions: int
    pooling: Pooling
    lowercase: bool = False

    @classmethod
    def load(cls, folder: Path) -> EmbeddingFormat:
        """Read the format of an encoder's folder.

        Raises:
            NotFoundError: the folder has no ``tokenizer.json``.
            InputError: it has no usable ``config.json``, or makes vectors in a way that is not known here.
        """
        config = read_config(folder)
        sentence = _read(folder / "sentence_bert_config.json")
        longest = context_length(config) or DEFAULT_MAX_TOKENS
        return cls(
            tokenizer=load_tokenizer(folder),
            max_tokens=min(longest, int(sentence.get("max_seq_length") or longest)),
            vocabulary=int(config["vocab_size"]),
            dimensions=int(config["hidden_size"]),
            pooling=_pooling(folder),
            lowercase=bool(sentence.get("do_lower_case")),
        )

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, with the special tokens that the model was trained with."""
        read = [text.lower() for text in texts] if self.lowercase else list(texts)
        return [list(encoding.ids) for encoding in self.tokenizer.encode_batch(read)]


def _pooling(folder: Path) -> Pooling:
    modules = _read(folder / "modules.json") or []
    paths = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
    if unknown := sorted(paths.keys() - set(KNOWN_MODULES)):
        raise InputError(f"The encoder in {folder.name} has the module {unknown[0]}, which is not known here.")
    config = _read(folder / paths["Pooling"] / "config.json") if paths.get("Pooling") else {}
    modes = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    modes = modes or [mode for mode in [config.get("pooling_mode")] if mode]
    if len(modes) > 1 or not POOLINGS.keys() >= set(modes):
        raise InputError(f"The encoder in {folder.name} pools with {modes}; known are the mean and the first token.")
    return POOLINGS[modes[0]] if modes else "mean"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}).") from error
