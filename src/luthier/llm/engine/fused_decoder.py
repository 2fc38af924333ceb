"""The decoder of the Llama family (Llama, Qwen2, Qwen3, Mistral) with its gradient written out, for rows.

A layer is one autograd function. It keeps what is costly to make again (the queries, keys and values, what attention
gives, the two halves of the gate) and makes again what is cheap (norms, the gate's product); with ``recompute`` it
keeps its input alone. Linear layers that read the same input are one product (:mod:`luthier.llm.engine.projections`),
and frozen layers below the lowest trained one keep nothing. The numbers are those of transformers' own modules
(``tests/llm/test_fused_decoder.py``).

Names end in their dimensions: T tokens, E model width, F intermediate width, H query heads, K key heads, D head width,
C = H + 2 K; R rank of the adapters of a projection; M those tokens whose last hidden states are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from luthier.llm.base_config import FUSED_TYPES
from luthier.llm.engine.layer_operations import LayerOperations, Rope, inverse_rms
from luthier.llm.engine.native_operations import operations_for
from luthier.llm.engine.projections import Projection, can_project
from luthier.llm.engine.row_attention import Heads
from luthier.llm.engine.row_layout import RowLayout


def can_fuse(decoder: Any) -> bool:
    """Return whether a decoder's layers are those that this module knows, without dropout, DoRA or windows."""
    config = decoder.config
    windows = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    if config.model_type not in FUSED_TYPES or windows or config.hidden_act != "silu":
        return False
    if config.model_type == "mistral" and config.sliding_window is not None:
        return False
    return all(can_project(layer) for block in decoder.layers for layer in _linear_layers(block))


class FusedDecoder:
    """A decoder's layers as fused functions over the same parameters, computing in ``dtype``.

    ``recompute`` keeps only each layer's input.
    """

    def __init__(self, decoder: Any, dtype: torch.dtype, *, recompute: bool = False) -> None:
        self._decoder = decoder
        operations = operations_for(dtype, next(decoder.parameters()).device)
        self._layers = [_Layer(block, operations, recompute=recompute) for block in decoder.layers]

    def forward(self, hidden_TE: torch.Tensor, layout: RowLayout, at_M: torch.Tensor | None = None) -> torch.Tensor:
        """Return the decoder's last hidden states, after its final norm, from the embeddings of a row.

        With ``at`` they are those of some tokens alone, (M, E): the last layer computes nothing else behind attention.
        """
        exact_0 = hidden_TE.new_empty(0, dtype=torch.float32)  # the angles come in the type of what is given
        cos_1TD, sin_1TD = self._decoder.rotary_emb(exact_0, layout.positions_T[None])
        rope = (cos_1TD[0, :, None], sin_1TD[0, :, None])
        for layer in self._layers:
            place = _Place(layout, rope, at_M if layer is self._layers[-1] else None)
            if torch.is_grad_enabled() and (layer.parameters or hidden_TE.requires_grad):
                hidden_TE = _LayerFunction.apply(hidden_TE, layer, place, *layer.parameters)
            else:
                hidden_TE = layer.forward(hidden_TE, place)[0]
        normed_TE: torch.Tensor = self._decoder.norm(hidden_TE)
        return normed_TE.to(hidden_TE.dtype)


@dataclass(frozen=True)
class _Place:
    """Where a layer's tokens stand, and at which of them its outputs are wanted (None: at all)."""

    layout: RowLayout
    rope: Rope
    at_M: torch.Tensor | None

    def pick(self, values_TX: torch.Tensor) -> torch.Tensor:
        """Return the values of the tokens whose outputs are wanted."""
        return values_TX if self.at_M is None else values_TX.index_select(0, self.at_M)

    def spread(self, gradients_MX: torch.Tensor) -> torch.Tensor:
        """Return the gradients of all tokens from those of the wanted ones."""
        if self.at_M is None:
            return gradients_MX
        gradients_TX = gradients_MX.new_zeros(len(self.layout.positions_T), gradients_MX.shape[-1])
        return gradients_TX.index_add_(0, self.at_M, gradients_MX)


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TE: torch.Tensor, layer: _Layer, place: _Place, *_: torch.Tensor) -> torch.Tensor:
        output_TE, kept = layer.forward(hidden_TE, place)
        ctx.save_for_backward(*([hidden_TE] if layer.recompute else kept.tensors()))
        ctx.layer, ctx.place = layer, place
        return output_TE

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer = ctx.layer
        kept = layer.keep(*ctx.saved_tensors, ctx.place) if layer.recompute else _Kept(*ctx.saved_tensors)
        dhidden_TE, trained = layer.backward(gradients[0], kept, ctx.place, input_needed=ctx.needs_input_grad[0])
        return dhidden_TE, None, None, *trained


@dataclass(frozen=True)
class _Kept:
    """What the backward pass of a layer needs. ``raw_qk`` is None where the heads are not normed.

    ``log_sums`` are what attention keeps of its softmax, None where it keeps nothing. ``low`` are what each
    projection's adapter makes of its input first, None without one.
    """

    hidden_TE: torch.Tensor
    qkv_TCD: torch.Tensor
    attended_TE: torch.Tensor
    log_sums_TH: torch.Tensor | None
    middle_ME: torch.Tensor
    gate_up_M2F: torch.Tensor
    raw_qk_TCD: torch.Tensor | None
    qkv_low_TR: torch.Tensor | None
    out_low_MR: torch.Tensor | None
    gate_up_low_MR: torch.Tensor | None
    down_low_MR: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor | None]:
        return [getattr(self, one.name) for one in fields(self)]


class _Layer:
    """One decoder layer: attention and the gated multi-layer perceptron, each behind a norm and a residual sum."""

    def __init__(self, block: Any, operations: LayerOperations, *, recompute: bool) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.recompute = recompute
        self._do = operations
        self._norm = _Norm(block.input_layernorm, operations)
        self._middle_norm = _Norm(block.post_attention_layernorm, operations)
        self._qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], operations)
        self._out = Projection([attention.o_proj], operations)
        self._gate_up = Projection([mlp.gate_proj, mlp.up_proj], operations)
        self._down = Projection([mlp.down_proj], operations)
        width = attention.head_dim
        self._heads = Heads(
            attention.q_proj.out_features // width, attention.k_proj.out_features // width, attention.scaling
        )
        self._width = width
        self._head_norms = [_Norm(norm, operations) for norm in _head_norms(attention)]
        first: list[_Norm | Projection] = [self._norm, self._qkv, *self._head_norms, self._out]
        parts = [*first, self._middle_norm, self._gate_up, self._down]
        self.parameters = [parameter for part in parts for parameter in part.parameters]

    def forward(self, hidden_TE: torch.Tensor, place: _Place) -> tuple[torch.Tensor, _Kept]:
        """Return the layer's output, and what its backward pass needs."""
        kept = self._before_down(hidden_TE, place)
        output_ME, low_MR = self._down.forward(self._do.gated(kept.gate_up_M2F), onto_TO=kept.middle_ME)
        return output_ME, replace(kept, down_low_MR=low_MR)

    def keep(self, hidden_TE: torch.Tensor, place: _Place) -> _Kept:
        """Return what the backward pass needs, without the layer's output."""
        kept = self._before_down(hidden_TE, place)
        return replace(kept, down_low_MR=self._down.low(self._do.gated(kept.gate_up_M2F)))

    def _before_down(self, hidden_TE: torch.Tensor, place: _Place) -> _Kept:
        qkv_TX, qkv_low_TR = self._qkv.forward(self._norm.forward(hidden_TE))
        qkv_TCD = qkv_TX.view(len(hidden_TE), -1, self._width)
        qk_TCD = qkv_TCD[:, : self._heads.query + self._heads.key]
        raw_qk_TCD = qk_TCD.clone() if self._head_norms else None
        self._norm_heads(qk_TCD)
        self._do.rotate(qk_TCD, place.rope)
        attended_THD, log_sums_TH = self._do.attend(qkv_TCD, self._heads, place.layout)
        attended_TE = attended_THD.flatten(1)
        middle_ME, out_low_MR = self._out.forward(place.pick(attended_TE), onto_TO=place.pick(hidden_TE))
        gate_up_M2F, gate_up_low_MR = self._gate_up.forward(self._middle_norm.forward(middle_ME))
        kept = (hidden_TE, qkv_TCD, attended_TE, log_sums_TH, middle_ME, gate_up_M2F, raw_qk_TCD)
        return _Kept(*kept, qkv_low_TR, out_low_MR, gate_up_low_MR, None)

    def backward(
        self, doutput_ME: torch.Tensor, kept: _Kept, place: _Place, *, input_needed: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return the gradients of the layer's input and of ``parameters``."""
        dmiddle_ME, mlp_gradients = self._mlp_backward(doutput_ME, kept)
        attended_ME = place.pick(kept.attended_TE)
        dattended_ME, dout_low_MR = self._out.backward(dmiddle_ME)
        out_gradients = self._out.gradients(dmiddle_ME, attended_ME, kept.out_low_MR, dout_low_MR)
        assert dattended_ME is not None  # noqa: S101  asked for
        shape = (len(kept.hidden_TE), self._heads.query, self._width)
        attended = (place.spread(dattended_ME).view(shape), kept.attended_TE.view(shape), kept.log_sums_TH)
        dqkv_TCD = self._do.attend_backward(*attended, kept.qkv_TCD, self._heads, place.layout)
        dqk_TCD = dqkv_TCD[:, : self._heads.query + self._heads.key]
        self._do.rotate(dqk_TCD, place.rope, back=True)
        head_gradients = self._norm_heads_backward(dqk_TCD, kept.raw_qk_TCD)
        dqkv_TX = dqkv_TCD.flatten(1)
        needed = input_needed or bool(self._norm.parameters)
        dnormed_TE, dqkv_low_TR = self._qkv.backward(dqkv_TX, input_needed=needed)
        normed_TE = self._norm.forward(kept.hidden_TE)
        qkv_gradients = self._qkv.gradients(dqkv_TX, normed_TE, kept.qkv_low_TR, dqkv_low_TR)
        dhidden_TE, norm_gradients = None, list[torch.Tensor]()
        if dnormed_TE is not None:
            dhidden_TE, norm_gradients = self._norm.backward(dnormed_TE, kept.hidden_TE, place.spread(dmiddle_ME))
        return dhidden_TE, [*norm_gradients, *qkv_gradients, *head_gradients, *out_gradients, *mlp_gradients]

    def _mlp_backward(self, doutput_ME: torch.Tensor, kept: _Kept) -> tuple[torch.Tensor, list[torch.Tensor]]:
        product_MF, ddown_low_MR = self._down.backward(doutput_ME)  # its gradient, as yet
        assert product_MF is not None  # noqa: S101  asked for
        dgate_up_M2F = self._do.gated_backward(product_MF, kept.gate_up_M2F)
        down_gradients = self._down.gradients(doutput_ME, product_MF, kept.down_low_MR, ddown_low_MR)
        dnormed_ME, dgate_up_low_MR = self._gate_up.backward(dgate_up_M2F)
        assert dnormed_ME is not None  # noqa: S101  asked for
        normed_ME = self._middle_norm.forward(kept.middle_ME)
        gradients = self._gate_up.gradients(dgate_up_M2F, normed_ME, kept.gate_up_low_MR, dgate_up_low_MR)
        dmiddle_ME, norm_gradients = self._middle_norm.backward(dnormed_ME, kept.middle_ME, doutput_ME)
        return dmiddle_ME, [*norm_gradients, *gradients, *down_gradients]

    def _norm_heads(self, qk_TCD: torch.Tensor) -> None:
        for norm, part_TXD in zip(self._head_norms, self._queries_and_keys(qk_TCD), strict=False):
            part_TXD.copy_(norm.forward(part_TXD))

    def _norm_heads_backward(self, dqk_TCD: torch.Tensor, raw_TCD: torch.Tensor | None) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        if raw_TCD is not None:
            parts = zip(self._queries_and_keys(dqk_TCD), self._queries_and_keys(raw_TCD), strict=True)
            for norm, (dpart_TXD, raw_TXD) in zip(self._head_norms, parts, strict=True):
                dinput_TXD, gradients = norm.backward(dpart_TXD, raw_TXD)
                dpart_TXD.copy_(dinput_TXD)
                found += gradients
        return found

    def _queries_and_keys(self, qk_TCD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return qk_TCD[:, : self._heads.query], qk_TCD[:, self._heads.query :]


class _Norm:
    """An RMS norm over the last dimension, and its weight."""

    def __init__(self, module: Any, operations: LayerOperations) -> None:
        self._weight_E = module.weight
        self._epsilon = module.variance_epsilon
        self._do = operations
        self.parameters = [module.weight] if module.weight.requires_grad else []

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        """Return w x / rms(x)."""
        return self._do.norm(x_TE, self._weight_E, self._epsilon)

    def backward(
        self, dy_TE: torch.Tensor, x_TE: torch.Tensor, onto_TE: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the gradients of the input, added to ``onto``, and of the weight where it is trained."""
        gradients = []
        if self.parameters:
            scaled_TE = torch.mul(x_TE, inverse_rms(x_TE, self._epsilon))
            gradients = [(dy_TE * scaled_TE).flatten(0, -2).sum(0).to(self._weight_E.dtype)]
        return self._do.norm_backward(dy_TE, x_TE, self._weight_E, self._epsilon, onto_TE), gradients


def _head_norms(attention: Any) -> list[Any]:
    return [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]


def _linear_layers(block: Any) -> Iterator[torch.nn.Module]:
    attention, mlp = block.self_attn, block.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
