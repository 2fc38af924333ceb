"""A model that takes rows: hidden states once, the vocabulary only where there is a target.

Training, scoring and parity come through here, so that all of them see the same numbers.

Names end in their dimensions: T tokens of the row, M targets, E model width, N examples, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from luthier.errors import InputError
from luthier.llm.base_config import ROW_FAMILIES, UNBOUNDED, same_positions_up_to
from luthier.llm.engine.fused_decoder import FusedDecoder, can_fuse
from luthier.llm.engine.row_attention import ATTENTION_NAME
from luthier.llm.engine.row_layout import RowLayout
from luthier.llm.engine.target_logprobs import Head, Targets, target_logprobs
from luthier.llm.engine.text_batches import by_length, padded
from luthier.llm.rows import Row, pack, places
from luthier.templates.renderer import TokenizedExample

CHECKED_LENGTHS = (7, 4)
CHECK_TOLERANCE, ROUGH_TOLERANCE = 1e-3, 0.05  # of products that differ by their order, in float32 and rounded

Noise = Callable[[torch.Tensor, Row], torch.Tensor]
"""Changes the embeddings (T, E) of a row while training."""


class RowModel:
    """A decoder with its head (of a vocabulary, or a score), with or without an adapter, asked in rows.

    The layers run fused where the family is known (:mod:`luthier.llm.engine.fused_decoder`), else as transformers
    has them, and compute in ``dtype`` (None: that of the weights). ``recompute`` keeps only each layer's input for the
    backward pass: less memory, a third more work. With ``integers`` the products of its head are made in integers, as
    those of layers are that it was loaded with (:mod:`luthier.llm.engine.integers`).

    Where a model was not loaded to take rows (``takes_rows``; see :func:`luthier.llm.base_config.rows_up_to`), the
    examples of a row go through it as padded batches of similar length: the numbers are the same.

    Raises:
        InputError: the model pads, or makes its logits, in a way that is not known here.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        fused: bool = True,
        integers: bool = False,
    ) -> None:
        self.model = model
        self._inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder = self._inner.base_model
        self._embeddings = self._inner.get_input_embeddings()
        self.dtype: torch.dtype = dtype or self._embeddings.weight.dtype
        self.device: torch.device = self._embeddings.weight.device
        config = self._inner.config
        self.takes_rows: bool = config._attn_implementation == ATTENTION_NAME
        fused = fused and self.takes_rows and can_fuse(self._decoder)
        self._fused = FusedDecoder(self._decoder, self.dtype, recompute=recompute) if fused else None
        if recompute and self._fused is None:
            enable_recompute(self._inner)
        self._one_by_one = same_positions_up_to(config.to_dict()) < UNBOUNDED
        self._head: Head | None = None
        if config.model_type not in ROW_FAMILIES:
            self._check(CHECK_TOLERANCE if self.dtype == torch.float32 else ROUGH_TOLERANCE)
        if integers and self._inner.get_output_embeddings() is not None:
            self._head = Head.of(self._inner).in_integers()

    @property
    def is_fused(self) -> bool:
        """Whether the layers run as fused functions."""
        return self._fused is not None

    def hidden(self, row: Row, at: Sequence[int], noise: Noise | None = None) -> torch.Tensor:
        """Return the last hidden states, after the final norm, of the tokens ``at`` some places of a row, (M, E)."""
        at_M = torch.tensor(at, device=self.device)
        if self._fused is None:
            return self._hidden_unfused(row, noise).to(self.dtype).index_select(0, at_M)
        return self._fused.forward(self._embedded(row, noise), RowLayout.make(row.groups, self.device), at_M)

    def _hidden_unfused(self, row: Row, noise: Noise | None) -> torch.Tensor:
        """Return the last hidden states of all tokens, (T, E)."""
        if not self.takes_rows:
            return self._hidden_apart(row, noise)
        layout = RowLayout.make(row.groups, self.device)
        embedded_TE = self._embedded(row, noise)
        positions_1T = layout.positions_T[None]
        with autocast(self.dtype, self.device):
            states = self._decoder(
                inputs_embeds=embedded_TE[None], position_ids=positions_1T, use_cache=False, layout=layout
            )
        hidden_TE: torch.Tensor = states[0][0]
        return hidden_TE

    def targets(self, row: Row, label_smoothing: float = 0.0, noise: Noise | None = None) -> Targets:
        """Return the log-probabilities of a row's targets, (M,), with gradient, and the tokens chosen instead."""
        sources, targets = zip(*row.targets, strict=True)
        hidden_ME = self.hidden(row, sources, noise)
        targets_M = torch.tensor(targets, device=self.device)
        return target_logprobs(hidden_ME, self._head or Head.of(self._inner), targets_M, label_smoothing)

    def batches(
        self, examples: Sequence[TokenizedExample], tokens_per_row: int
    ) -> list[tuple[list[int], Callable[[], torch.Tensor]]]:
        """Return (indices of examples, a function that gives the score head's outputs at their last tokens).

        Outputs are (N, outputs), in float32.
        """
        return [(list(row.examples), partial(self.row_outputs, row)) for row in self.pack(examples, tokens_per_row)]

    def row_outputs(self, row: Row) -> torch.Tensor:
        """Return the outputs of the score head at each example's last token, (N, outputs), in float32."""
        hidden_NE = self.hidden(row, row.ends)
        score = self._inner.score
        return score(hidden_NE.to(next(score.parameters()).dtype)).float()

    def pack(self, examples: Sequence[TokenizedExample], tokens_per_row: int) -> list[Row]:
        """Return examples in rows that suit the model."""
        return pack(examples, tokens_per_row, share=self.takes_rows)

    def _embedded(self, row: Row, noise: Noise | None) -> torch.Tensor:
        embedded_TE: torch.Tensor = self._embeddings(torch.tensor(row.tokens, device=self.device)).to(self.dtype)
        return embedded_TE if noise is None else noise(embedded_TE, row)

    def _hidden_apart(self, row: Row, noise: Noise | None) -> torch.Tensor:
        """Return the hidden states of a row whose examples go through the model as padded batches."""
        spans = places(row)
        found: list[torch.Tensor] = []
        order: list[int] = []
        at_once = 0 if self._one_by_one else len(row.tokens)
        for indices in by_length([len(span) for span in spans], at_once):
            places_NL, real_NL = (values.to(self.device) for values in padded([spans[index] for index in indices]))
            if noise is None:  # tokens say more than their embeddings to a few families
                given = {"input_ids": torch.tensor(row.tokens, device=self.device)[places_NL]}
            else:
                given = {"inputs_embeds": self._embedded(row, noise)[places_NL]}
            with autocast(self.dtype, self.device):
                states_NLE = self._decoder(**given, attention_mask=real_NL, use_cache=False)[0]
            found.append(states_NLE[real_NL.bool()])
            order += [place for index in indices for place in spans[index]]
        # The tokens of a prefix are there once for every example that has it; any of them will do.
        source = {place: index for index, place in enumerate(order)}
        sources_T = torch.tensor([source[place] for place in range(len(row.tokens))], device=self.device)
        return torch.cat(found).index_select(0, sources_T)

    def _check(self, tolerance: float) -> None:
        """Compare a family that nobody has tried with itself: a few tokens as they are asked here, and as it likes.

        Raises:
            InputError: it disagrees with itself.
        """
        texts = [list(range(length)) for length in CHECKED_LENGTHS]
        whole = [TokenizedExample("", text, [True] * len(text)) for text in texts]
        (row,) = pack(whole, sum(CHECKED_LENGTHS), share=False)
        writes = self._inner.get_output_embeddings() is not None
        with torch.no_grad():
            found = self.targets(row).logprobs_M if writes else self.hidden(row, range(len(row.tokens)))
            expected = torch.cat([self._by_itself(texts[index], writes=writes) for index in row.examples])
        if float((found - expected).norm()) > tolerance * float(expected.norm()):
            raise InputError(
                f"A model of the family {self._inner.config.model_type} pads texts, or makes its logits, in a way that "
                "is not known here, so it cannot be trained.",
                hint="take a base of another family, such as smollm2-135m",
            )

    def _by_itself(self, text: list[int], *, writes: bool) -> torch.Tensor:
        tokens_1T = torch.tensor([text], device=self.device)
        with autocast(self.dtype, self.device):
            if not writes:
                hidden_TE: torch.Tensor = self._decoder(input_ids=tokens_1T, use_cache=False)[0][0]
                return hidden_TE.to(self.dtype)
            logits_TV = self._inner(input_ids=tokens_1T, use_cache=False).logits[0]
        return logits_TV[:-1].float().log_softmax(-1).gather(1, tokens_1T[0, 1:, None])[:, 0]


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which matrix products run in ``dtype`` while adapters stay in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def enable_recompute(model: Any) -> None:
    """Let a transformers model keep only each layer's input for the backward pass, while it trains.

    Raises:
        InputError: the family cannot do that.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise InputError(
            f"A {model.config.model_type} cannot compute its layers again (recompute).", hint="-o recompute=false"
        ) from error


class ScoredTarget:
    """The outcome at one target token."""

    __slots__ = ("chosen", "logprob", "token")

    def __init__(self, token: int, chosen: int, logprob: float) -> None:
        self.token = token
        self.chosen = chosen
        self.logprob = logprob


def score_examples(
    model: RowModel, examples: Sequence[TokenizedExample], tokens_per_row: int = 1024
) -> Iterator[tuple[int, list[ScoredTarget]]]:
    """Yield (index of the example, its targets scored) for every example, in the order of the rows.

    For each target token: its natural log-probability, and the token that the model itself would choose there.
    """
    for row in model.pack(examples, tokens_per_row):
        with torch.no_grad():
            found = model.targets(row)
        scored: list[list[ScoredTarget]] = [[] for _ in row.examples]
        outcomes = zip(row.owners, row.targets, found.chosen_M.tolist(), found.logprobs_M.tolist(), strict=True)
        for owner, (_, token), choice, logprob in outcomes:
            scored[owner].append(ScoredTarget(token, choice, logprob))
        yield from zip(row.examples, scored, strict=True)
