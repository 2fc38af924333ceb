"""Asks a tuned classifier: a plain transformers folder of an encoder or a decoder with a head → labels of texts.

Only what is in the folder counts, so that the numbers are those that anybody gets who loads it with transformers.

Names end in their dimensions: N texts, L tokens of the longest one, E model width, C outputs of the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from luthier.errors import InputError
from luthier.evaluate.predictions import Prediction
from luthier.llm.base_config import context_length, read_config
from luthier.llm.engine.encoder_model import EncoderModel
from luthier.llm.engine.row_model import autocast
from luthier.llm.engine.text_batches import by_length
from luthier.llm.engine.torch_model import DTYPES, Precision, device
from luthier.templates.labelled import LabelledText, load_tokenizer, tokenize_labelled
from luthier.templates.renderer import TokenizedExample


class Classifier:
    """A tuned classifier, or a model that predicts a number.

    Args:
        folder: A transformers folder with safetensors, ``tokenizer.json`` and the labels in its ``config.json``.
        max_tokens: Longer texts lose their end; None: the model's context. Give what it was trained with.
        precision: Of the weights and the products.

    Raises:
        InputError: the folder has no trained head, or one for several labels at once, or no safetensors.
        NotFoundError: it has no ``tokenizer.json``.
    """

    def __init__(self, folder: Path, max_tokens: int | None = None, precision: Precision = "float32") -> None:
        self._tokenizer = load_tokenizer(folder)
        self._model = _load(folder, precision)
        self._dtype = DTYPES[precision]
        context = context_length(read_config(folder))
        limits = [limit for limit in (max_tokens, context) if limit is not None]
        if not limits:
            raise InputError(f"The config.json in {folder} names no context length.", hint="give max_tokens")
        self._max_tokens = min(limits)
        config = self._model.config
        if config.problem_type == "multi_label_classification":
            raise InputError(f"{folder} gives several labels at once; only one label per text is known here.")
        self._is_regression = config.num_labels == 1
        names = {int(index): str(name) for index, name in config.id2label.items()}
        self._labels = () if self._is_regression else tuple(names[index] for index in range(config.num_labels))

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of the head's outputs; none where a number is predicted."""
        return self._labels

    def predict(self, texts: Sequence[str], batch_tokens: int = 4096) -> list[Prediction]:
        """Return what the model says of each text; at most ``batch_tokens`` tokens, padding included, go at once.

        Raises:
            InputError: texts are empty (all are named).
        """
        empty = [f"text {number} is empty" for number, text in enumerate(texts, 1) if not text.strip()]
        if empty:
            raise InputError("Some texts cannot be classified.", problems=empty)
        if not texts:
            return []
        unlabelled = [LabelledText(str(index), text, 0.0) for index, text in enumerate(texts)]
        examples, _ = tokenize_labelled(unlabelled, self._tokenizer, None, self._max_tokens)
        found: dict[int, Prediction] = {}
        with torch.inference_mode():
            for indices, outputs_NC in self._outputs(examples, batch_tokens):
                rows = outputs_NC.tolist() if self._is_regression else outputs_NC.softmax(-1).tolist()
                found |= {
                    i: self._prediction(row, len(examples[i].tokens)) for i, row in zip(indices, rows, strict=True)
                }
        return [found[index] for index in range(len(texts))]

    def _outputs(
        self, examples: Sequence[TokenizedExample], batch_tokens: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        if not hasattr(self._model, "score"):
            batches = EncoderModel(self._model, self._dtype).batches(examples, batch_tokens)
            return ((indices, outputs()) for indices, outputs in batches)
        return self._decoder_outputs(examples, batch_tokens)

    def _decoder_outputs(
        self, examples: Sequence[TokenizedExample], batch_tokens: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield (indices of examples, outputs at their last tokens (N, C) in float32), shortest texts first.

        transformers finds the last token by looking for what is not padding, and errs where a text ends in the padding
        token; the lengths are known here. Attention is causal: padding behind a text changes nothing in it.
        """
        backbone = getattr(self._model, self._model.base_model_prefix)
        for indices in by_length([len(example.tokens) for example in examples], batch_tokens):
            lengths_N = torch.tensor([len(examples[i].tokens) for i in indices], device=self._model.device)
            tokens_NL = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(examples[i].tokens, device=self._model.device) for i in indices], batch_first=True
            )
            real_NL = (torch.arange(tokens_NL.shape[1], device=self._model.device)[None] < lengths_N[:, None]).long()
            with autocast(self._dtype, self._model.device):
                states_NLE = backbone(tokens_NL, attention_mask=real_NL, use_cache=False).last_hidden_state
                last_NE = states_NLE[torch.arange(len(indices), device=self._model.device), lengths_N - 1]
                outputs_NC = self._model.score(last_NE.to(self._model.score.weight.dtype))
            yield indices, outputs_NC.float()

    def _prediction(self, row: list[float], tokens: int) -> Prediction:
        if self._is_regression:
            return Prediction(None, row[0], tokens=tokens)
        best = max(range(len(row)), key=row.__getitem__)
        return Prediction(self._labels[best], row[best], dict(zip(self._labels, row, strict=True)), tokens)


def _load(folder: Path, precision: Precision) -> Any:
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no .safetensors weights; others can run code when they are loaded.")
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=DTYPES[precision], use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise InputError(
            f"{folder} has no trained classification head: {', '.join(missing[:3])} are missing.",
            hint="train one: luthier train DATASET -o method=classification",
        )
    return model.to(device()).eval()
