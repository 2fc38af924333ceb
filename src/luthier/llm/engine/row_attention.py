"""Attention within a row, forward and backward, written out.

Each block of a row (:mod:`luthier.llm.engine.row_layout`) is a few batched matrix products. Long sequences go in pieces
of :data:`PIECE` queries, each against the keys before its end: half of the square is never computed, and no more than
one piece's scores are held. The backward pass makes the scores again (Dao et al. 2022, arXiv 2205.14135, section 3.1),
so memory grows with the tokens, not with their square. On a GPU torch has a kernel for all of it.

Names end in their dimensions: T tokens of the row, N sequences of a block, L the longest of them, Q queries of a
piece, S keys that it sees (prefix first), H query heads, K key heads, G = H / K, D head width, C = H + 2 K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from luthier.errors import InputError
from luthier.llm.engine.row_layout import Block, RowLayout

ATTENTION_NAME = "luthier_rows"
CHANGE_THE_SCORES = ("softcap", "s_aux", "position_bias")  # of transformers' attention interface
PIECE = 256
MASKED = -30_000.0  # far below any score, and finite in bfloat16 and float16 alike


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer, and the factor on its scores."""

    query: int
    key: int
    scale: float

    @property
    def grouped(self) -> int:
        """Query heads that share a key head."""
        return self.query // self.key


def attend(qkv_TCD: torch.Tensor, heads: Heads, layout: RowLayout) -> torch.Tensor:
    """Return softmax(q k' scale) v as (T, H, D).

    ``qkv_TCD`` holds the query heads, then the key heads, then the value heads of each token.
    """
    out_THD = torch.empty_like(qkv_TCD[:, : heads.query])
    see = _see_fused if has_fused(qkv_TCD.device) else _see_in_pieces
    for block in layout.blocks:
        _scatter(out_THD, see(*_gather(qkv_TCD, heads, block), block, heads), heads, block)
    return out_THD


def attend_backward(
    dout_THD: torch.Tensor,
    out_THD: torch.Tensor,
    qkv_TCD: torch.Tensor,
    heads: Heads,
    layout: RowLayout,
) -> torch.Tensor:
    """Return the gradient of ``qkv_TCD`` from that of the output."""
    dqkv_TCD = torch.zeros_like(qkv_TCD)
    see_backward = _see_fused_backward if has_fused(qkv_TCD.device) else _see_in_pieces_backward
    for block in layout.blocks:
        # What stands for padding in the batch is a real token elsewhere: it must give no gradient here.
        dattended_BGLD = _gather_heads(dout_THD, heads, block, zero_padding=True)
        attended_BGLD = _gather_heads(out_THD, heads, block)
        gathered = _gather(qkv_TCD, heads, block)
        dquery_BGLD, dkey_BSD, dvalue_BSD = see_backward(dattended_BGLD, attended_BGLD, *gathered, block, heads)
        _scatter(dqkv_TCD[:, : heads.query], dquery_BGLD, heads, block)
        _scatter_keys(dqkv_TCD, dkey_BSD, dvalue_BSD, heads, block)
    return dqkv_TCD


def has_fused(device: torch.device) -> bool:
    """Return whether torch's own fused attention is fast there, forward and backward; on a processor it is not."""
    return device.type == "cuda"


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _see_in_pieces(
    query_BGLD: torch.Tensor, key_BSD: torch.Tensor, value_BSD: torch.Tensor, block: Block, heads: Heads
) -> torch.Tensor:
    attended_BGLD = torch.empty_like(query_BGLD)
    for piece in _pieces(block):
        weights_BGQS = _weights(query_BGLD, key_BSD, piece, heads)
        attended_BGLD[:, :, piece.queries] = _grouped_bmm(weights_BGQS, value_BSD[:, : piece.keys])
    return attended_BGLD


def _see_in_pieces_backward(
    dattended_BGLD: torch.Tensor,
    attended_BGLD: torch.Tensor,
    query_BGLD: torch.Tensor,
    key_BSD: torch.Tensor,
    value_BSD: torch.Tensor,
    block: Block,
    heads: Heads,
) -> Gradients:
    delta_BGL1 = (dattended_BGLD * attended_BGLD).sum(-1, keepdim=True)
    dquery_BGLD = torch.empty_like(query_BGLD)
    dkey_BSD, dvalue_BSD = torch.zeros_like(key_BSD), torch.zeros_like(value_BSD)
    for piece in _pieces(block):
        weights_BGQS = _weights(query_BGLD, key_BSD, piece, heads)
        dattended_BGQD = dattended_BGLD[:, :, piece.queries]
        _accumulate(dvalue_BSD[:, : piece.keys], weights_BGQS, dattended_BGQD)
        dweights_BGQS = _grouped_bmm(dattended_BGQD, value_BSD[:, : piece.keys].transpose(1, 2))
        dscores_BGQS = dweights_BGQS.sub_(delta_BGL1[:, :, piece.queries]).mul_(weights_BGQS)
        dquery_BGLD[:, :, piece.queries] = _grouped_bmm(dscores_BGQS, key_BSD[:, : piece.keys]).mul_(heads.scale)
        _accumulate(dkey_BSD[:, : piece.keys], dscores_BGQS, query_BGLD[:, :, piece.queries], heads.scale)
    return dquery_BGLD, dkey_BSD, dvalue_BSD


def _see_fused(
    query_BGLD: torch.Tensor, key_BSD: torch.Tensor, value_BSD: torch.Tensor, block: Block, heads: Heads
) -> torch.Tensor:
    """See as :func:`_see_in_pieces`, by the one kernel that torch has for it."""
    groups, length = query_BGLD.shape[1:3]
    # Not all of torch's kernels take fewer key heads than query heads; all take a view of one as many.
    key_BGSD, value_BGSD = (part[:, None].expand(-1, groups, -1, -1) for part in (key_BSD, value_BSD))
    causal: Any = causal_lower_right(length, block.prefix_length + length)
    return torch.nn.functional.scaled_dot_product_attention(
        query_BGLD, key_BGSD, value_BGSD, attn_mask=causal, scale=heads.scale
    )


def _see_fused_backward(
    dattended_BGLD: torch.Tensor,
    _: torch.Tensor,
    query_BGLD: torch.Tensor,
    key_BSD: torch.Tensor,
    value_BSD: torch.Tensor,
    block: Block,
    heads: Heads,
) -> Gradients:
    """Make the way forward again: what its kernel keeps has another form in every kernel."""
    inputs = [part.detach().requires_grad_() for part in (query_BGLD, key_BSD, value_BSD)]
    with torch.enable_grad():
        attended_BGLD = _see_fused(inputs[0], inputs[1], inputs[2], block, heads)
    dquery_BGLD, dkey_BSD, dvalue_BSD = torch.autograd.grad(attended_BGLD, inputs, dattended_BGLD)
    return dquery_BGLD, dkey_BSD, dvalue_BSD


@dataclass(frozen=True)
class _Piece:
    """Queries ``queries`` of every sequence of a block; they see the first ``keys`` keys, those under the bias not."""

    queries: slice
    keys: int
    bias_QS: torch.Tensor


def _pieces(block: Block) -> Iterator[_Piece]:
    length, device = block.gather_NL.shape[1], block.gather_NL.device
    for first in range(0, length, PIECE):
        queries = slice(first, min(first + PIECE, length))
        size = queries.stop - first
        # Only the square in which the piece meets itself is cut by causality.
        hidden_QQ = torch.full((size, size), MASKED, device=device).triu(1)
        yield _Piece(queries, block.prefix_length + queries.stop, hidden_QQ)


def _weights(query_BGLD: torch.Tensor, key_BSD: torch.Tensor, piece: _Piece, heads: Heads) -> torch.Tensor:
    scores_BGQS = _grouped_bmm(query_BGLD[:, :, piece.queries], key_BSD[:, : piece.keys].transpose(1, 2))
    scores_BGQS.mul_(heads.scale)
    scores_BGQS[..., piece.keys - len(piece.bias_QS) :] += piece.bias_QS
    return torch.softmax(scores_BGQS, dim=-1)


def _grouped_bmm(left_BGQX: torch.Tensor, right_BXY: torch.Tensor) -> torch.Tensor:
    """Return the batched product of every group with the one matrix that it shares."""
    batch, groups, length, inner = left_BGQX.shape
    product = torch.bmm(left_BGQX.reshape(batch, groups * length, inner), right_BXY)
    return product.view(batch, groups, length, -1)


def _accumulate(into_BSD: torch.Tensor, left_BGQS: torch.Tensor, right_BGQD: torch.Tensor, alpha: float = 1.0) -> None:
    """Add left' right, summed over the groups, to ``into``."""
    left = left_BGQS.flatten(1, 2).transpose(1, 2)
    into_BSD.baddbmm_(left, right_BGQD.reshape(len(into_BSD), -1, into_BSD.shape[-1]), alpha=alpha)


def _gather(qkv_TCD: torch.Tensor, heads: Heads, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the queries (B, G, L, D), keys and values (B, S, D) of a block; B = N K."""
    count = len(block.gather_NL)
    own_NL2KD = _tokens(qkv_TCD[:, heads.query :], block)
    prefix_P2KD = qkv_TCD[block.prefix, heads.query :]
    both_NS2KD = torch.cat([prefix_P2KD.expand(count, *prefix_P2KD.shape), own_NL2KD], dim=1)
    key_BSD, value_BSD = (
        part.transpose(1, 2).reshape(count * heads.key, -1, part.shape[-1])
        for part in both_NS2KD.split(heads.key, dim=2)
    )
    return _gather_heads(qkv_TCD[:, : heads.query], heads, block), key_BSD, value_BSD


def _tokens(values_TXD: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the tokens of a block's sequences, (N, L, X, D)."""
    count, length = block.gather_NL.shape
    if count == 1:
        first = int(block.rows_R[0])
        return values_TXD[None, first : first + length]
    return values_TXD.index_select(0, block.gather_NL.flatten()).view(count, length, *values_TXD.shape[1:])


def _gather_heads(values_THD: torch.Tensor, heads: Heads, block: Block, *, zero_padding: bool = False) -> torch.Tensor:
    """Return the values of query heads in the order of their key heads, (B, G, L, D)."""
    tokens_NLHD = _tokens(values_THD, block)
    if zero_padding and block.is_padded:
        tokens_NLHD = tokens_NLHD * block.real_NL[..., None, None]
    count, length, _, width = tokens_NLHD.shape
    return tokens_NLHD.transpose(1, 2).reshape(count * heads.key, heads.grouped, length, width)


def _scatter(into_THD: torch.Tensor, values_BGLD: torch.Tensor, heads: Heads, block: Block) -> None:
    """Write a block's values of query heads to their tokens; padding is left out."""
    count, length = block.gather_NL.shape
    values_XHD = values_BGLD.reshape(count, heads.query, length, -1).transpose(1, 2).flatten(0, 1)
    _write(into_THD, values_XHD, block)


def _scatter_keys(
    into_TCD: torch.Tensor, dkey_BSD: torch.Tensor, dvalue_BSD: torch.Tensor, heads: Heads, block: Block
) -> None:
    """Write the gradients of keys and values to their tokens; a shared prefix gets the sum over its sequences."""
    count, prefix = len(block.gather_NL), block.prefix_length
    both_N2KSD = torch.cat([part.reshape(count, heads.key, *part.shape[1:]) for part in (dkey_BSD, dvalue_BSD)], dim=1)
    both_NS2KD = both_N2KSD.transpose(1, 2)
    into = into_TCD[:, heads.query :]
    if prefix:
        into[block.prefix] += both_NS2KD[:, :prefix].sum(0)
    own = both_NS2KD[:, prefix:].flatten(0, 1)
    rows = own if count == 1 else own.index_select(0, block.rests_R)
    if count == 1:
        first = int(block.rows_R[0])
        into[first : first + len(rows)] += rows
    else:
        into.index_add_(0, block.rows_R, rows)


def _write(into_THD: torch.Tensor, values_XHD: torch.Tensor, block: Block) -> None:
    if len(block.gather_NL) == 1:
        first = int(block.rows_R[0])
        into_THD[first : first + len(values_XHD)] = values_XHD
    else:
        into_THD.index_copy_(0, block.rows_R, values_XHD.index_select(0, block.rests_R))


class _Attention(torch.autograd.Function):
    """:func:`attend` for autograd."""

    @staticmethod
    def forward(ctx: Any, qkv_TCD: torch.Tensor, heads: Heads, layout: RowLayout) -> torch.Tensor:
        out_THD = attend(qkv_TCD, heads, layout)
        ctx.save_for_backward(qkv_TCD, out_THD)
        ctx.heads, ctx.layout = heads, layout
        return out_THD

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        qkv_TCD, out_THD = ctx.saved_tensors
        return attend_backward(gradients[0], out_THD, qkv_TCD, ctx.heads, ctx.layout), None, None


def row_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: RowLayout | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within one row, as transformers' attention interface wants it: returns (1, T, H, D).

    Without a ``layout`` the rows are plain causal sequences.

    Raises:
        InputError: the model attends in another way (capped scores, sinks, a window that an example does not fit).
    """
    for name in CHANGE_THE_SCORES:
        if others.get(name) is not None:
            raise InputError(f"This model's attention has {name}, which is not known here; it cannot be trained.")
    length = query_1HTD.shape[2] if layout is None else int(layout.positions_T.max()) + 1
    if sliding_window is not None and length > sliding_window:
        raise InputError(
            f"This model sees {sliding_window} tokens back, and an example has {length}.",
            hint=f"-o max_tokens={sliding_window}",
        )
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        attended = torch.nn.functional.scaled_dot_product_attention(
            query_1HTD, key_1KTD, value_1KTD, is_causal=True, scale=scale, enable_gqa=True
        )
        return attended.transpose(1, 2).contiguous(), None
    heads = Heads(query_1HTD.shape[1], key_1KTD.shape[1], scale)
    qkv_TCD = torch.cat([query_1HTD[0], key_1KTD[0], value_1KTD[0]]).transpose(0, 1)
    return _Attention.apply(qkv_TCD, heads, layout)[None], None


AttentionInterface.register(ATTENTION_NAME, row_attention)
