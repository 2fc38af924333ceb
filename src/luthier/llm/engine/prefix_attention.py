"""Rows of examples that share a prefix, and the attention that computes the prefix once.

Examples made by one template begin with the same tokens (the system prompt, the opening of the user's turn). A row
holds that prefix once, and behind it the rest of each example:

    prefix | rest of example 1 | rest of example 2 | …

Every token sees the prefix and what stands before it in its own example; positions restart after the prefix. The
result for each token is that of the example by itself (``tests/llm/test_prefix_attention.py``). All layers other than
attention work on the row without a padded token; attention gathers the rests into a padded batch, which makes its cost
grow with the sum of the squared example lengths instead of the squared row length, and needs one small mask.

Names end in their dimensions: T tokens of the row, P of the prefix, N examples, L the longest rest, H query heads,
K key heads, G = H / K, D head width, S = P + L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

ATTENTION_NAME = "luthier_prefix"
MASKED = -30_000.0  # far below any score, and finite in bfloat16 and float16 alike


@dataclass(frozen=True)
class RowLayout:
    """Where the examples of a row lie; made once per row and used by every layer."""

    prefix: int
    gather_NL: torch.Tensor  # index into the row of each token of each rest; padding points at token 0
    rests_R: torch.Tensor  # index into the flattened N x L of each real token, in row order
    prefix_bias_PP: torch.Tensor
    rest_bias_LS: torch.Tensor

    @classmethod
    def make(cls, prefix: int, rest_lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> RowLayout:
        """Lay out a row of ``prefix`` shared tokens and rests of the given lengths."""
        lengths_N = torch.tensor(rest_lengths, device=device)
        starts_N = prefix + torch.cumsum(lengths_N, 0) - lengths_N
        offsets_L = torch.arange(max(rest_lengths), device=device)
        real_NL = offsets_L[None] < lengths_N[:, None]
        gather_NL = torch.where(real_NL, starts_N[:, None] + offsets_L[None], 0)
        causal_LL = torch.ones(len(offsets_L), len(offsets_L), dtype=torch.bool, device=device).tril()
        seen_LP = torch.ones(len(offsets_L), prefix, dtype=torch.bool, device=device)
        return cls(
            prefix=prefix,
            gather_NL=gather_NL,
            rests_R=real_NL.flatten().nonzero()[:, 0],
            prefix_bias_PP=_bias(torch.ones(prefix, prefix, dtype=torch.bool, device=device).tril(), dtype),
            rest_bias_LS=_bias(torch.cat([seen_LP, causal_LL], dim=1), dtype),
        )

    def positions(self) -> torch.Tensor:
        """Return the position of every token of the row: the prefix, then each rest behind it. Shape (T,)."""
        offsets_NL = torch.arange(self.gather_NL.shape[1], device=self.gather_NL.device).expand_as(self.gather_NL)
        prefix_P = torch.arange(self.prefix, device=self.gather_NL.device)
        return torch.cat([prefix_P, self.prefix + offsets_NL.flatten()[self.rests_R]])


def _bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, MASKED)


def _attend(
    query_NHLD: torch.Tensor, key_NKSD: torch.Tensor, value_NKSD: torch.Tensor, bias_LS: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return softmax(q k' scale + bias) v with grouped heads; the scores are two batched matrix products."""
    count, heads, length, width = query_NHLD.shape
    groups, size = key_NKSD.shape[1], key_NKSD.shape[2]
    query = (query_NHLD * scale).reshape(count * groups, heads // groups * length, width)
    key = key_NKSD.reshape(count * groups, size, width)
    scores = torch.bmm(query, key.transpose(1, 2)).view(count * groups, heads // groups, length, size) + bias_LS
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value_NKSD.dtype)
    value = value_NKSD.reshape(count * groups, size, width)
    return torch.bmm(weights.view(count * groups, heads // groups * length, size), value).view(query_NHLD.shape)


def prefix_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: RowLayout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within one row, as transformers' attention interface wants it: returns (1, T, H, D).

    Without a ``layout`` the rows are plain causal sequences.
    """
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        attended = torch.nn.functional.scaled_dot_product_attention(
            query_1HTD, key_1KTD, value_1KTD, is_causal=True, scale=scale, enable_gqa=True
        )
        return attended.transpose(1, 2).contiguous(), None
    prefix, (count, length) = layout.prefix, layout.gather_NL.shape

    def rests(rows_1XTD: torch.Tensor) -> torch.Tensor:
        heads, _, width = rows_1XTD.shape[1:]
        gathered = rows_1XTD[0].index_select(1, layout.gather_NL.flatten())
        return gathered.view(heads, count, length, width).transpose(0, 1)

    def with_prefix(rows_1KTD: torch.Tensor) -> torch.Tensor:
        shared = rows_1KTD[:, :, :prefix].expand(count, -1, -1, -1)
        return torch.cat([shared, rests(rows_1KTD)], dim=2)

    rest_NHLD = _attend(rests(query_1HTD), with_prefix(key_1KTD), with_prefix(value_1KTD), layout.rest_bias_LS, scale)
    rest_RHD = rest_NHLD.transpose(1, 2).flatten(0, 1).index_select(0, layout.rests_R)
    if prefix == 0:
        return rest_RHD[None], None
    prefix_1HPD = _attend(
        query_1HTD[:, :, :prefix], key_1KTD[:, :, :prefix], value_1KTD[:, :, :prefix], layout.prefix_bias_PP, scale
    )
    return torch.cat([prefix_1HPD[0].transpose(0, 1), rest_RHD])[None], None


AttentionInterface.register(ATTENTION_NAME, prefix_attention)
