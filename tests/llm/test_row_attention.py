"""The two ways that torch has for attention within a row: pieces of it, and one kernel, which a GPU takes."""

from __future__ import annotations

import pytest
import torch

from luthier.llm.engine import row_attention
from luthier.llm.engine.row_attention import PIECE, Heads, attend, attend_backward
from luthier.llm.engine.row_layout import RowLayout
from luthier.llm.rows import Group

GROUPS = {
    "one": [Group(0, (37,))],
    "longer than a piece": [Group(0, (PIECE + 41,))],
    "of several lengths": [Group(0, (40, 37, 33, 9))],
    "with a prefix": [Group(11, (7, 6, 1))],
    "with a long prefix": [Group(PIECE + 3, (PIECE + 5, 8))],
    "with and without": [Group(5, (9, 8, 3)), Group(0, (12,)), Group(3, (4,))],
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("heads", [Heads(4, 2, 0.3), Heads(3, 3, 0.2), Heads(4, 1, 1.0)], ids=str)
def test_one_kernel_sees_what_pieces_see_and_gives_their_gradients(
    monkeypatch: pytest.MonkeyPatch, groups: list[Group], heads: Heads
) -> None:
    layout = RowLayout.make(groups, torch.device("cpu"))
    tokens, generator = len(layout.positions_T), torch.Generator().manual_seed(0)
    qkv_TCD = torch.randn(tokens, heads.query + 2 * heads.key, 16, generator=generator, dtype=torch.float64)
    dout_THD = torch.randn(tokens, heads.query, 16, generator=generator, dtype=torch.float64)
    out_THD = attend(qkv_TCD, heads, layout)
    dqkv_TCD = attend_backward(dout_THD, out_THD, qkv_TCD, heads, layout)
    monkeypatch.setattr(row_attention, "has_fused", lambda _: True)
    fused_THD = attend(qkv_TCD, heads, layout)
    torch.testing.assert_close(fused_THD, out_THD)
    torch.testing.assert_close(attend_backward(dout_THD, fused_THD, qkv_TCD, heads, layout), dqkv_TCD)
