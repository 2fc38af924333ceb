from __future__ import annotations

from luthier.llm.engine.prefix_gate import BLOCK_TOKENS, PrefixGate, prefix_blocks

SHARED = list(range(3 * BLOCK_TOKENS))


def test_blocks_are_equal_as_far_as_the_prefix_is_shared() -> None:
    one, other = prefix_blocks([*SHARED, *[7] * 64]), prefix_blocks([*SHARED, *[8] * 64])
    assert one[:3] == other[:3]
    assert one[3] != other[3]
    assert prefix_blocks([1, *SHARED])[2] != one[2]


def test_a_prompt_waits_while_another_computes_their_shared_prefix() -> None:
    gate, blocks = PrefixGate(), prefix_blocks(SHARED)
    assert gate.may_start(blocks)
    gate.start(1, blocks)
    assert not gate.may_start(blocks)
    gate.computed(1)
    assert gate.may_start(blocks)


def test_prompts_without_a_shared_block_never_wait() -> None:
    gate = PrefixGate()
    gate.start(1, prefix_blocks(SHARED))
    assert gate.may_start(prefix_blocks([9] * 200))
    assert gate.may_start(prefix_blocks(SHARED[: BLOCK_TOKENS - 1]))


def test_a_cancelled_prompt_lets_the_next_one_compute_the_prefix() -> None:
    gate, blocks = PrefixGate(), prefix_blocks(SHARED)
    gate.start(1, blocks)
    gate.abandon(1)
    assert gate.may_start(blocks)
    gate.start(2, blocks)
    assert not gate.may_start(blocks)


def test_a_longer_shared_prefix_is_staged_after_the_shorter_one() -> None:
    gate = PrefixGate()
    longer = prefix_blocks([*SHARED, *[5] * BLOCK_TOKENS])
    gate.start(1, prefix_blocks(SHARED))
    gate.computed(1)
    assert gate.may_start(longer)
    gate.start(2, longer)
    assert not gate.may_start(longer)
    assert gate.may_start(prefix_blocks([*SHARED, *[6] * BLOCK_TOKENS]))
