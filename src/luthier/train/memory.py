"""How much memory a run needs, from sizes alone, and what would make it fit where it does not. Pure.

What a step holds grows with the tokens of a row; the rest is there at all times. How many numbers a layer keeps of each
token for its backward pass was counted on small models (``tests/train/test_memory.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from luthier.records.base_model import ModelShape
from luthier.records.objectives import product
from luthier.records.training import Resolved, TrainingPlan

PROCESS_BYTES = 900e6  # the interpreter with torch and transformers loaded, no model
DATA_BYTES_PER_TOKEN = 48  # a token, and whether it is learned, in Python's lists
DATA_BYTES_PER_UNIT = 700
ADAPTER_BYTES = 16  # of a trained number: itself, its gradient, two moments
SCALE_BYTES = 0.07  # of a number in few bits: its block's scale, and its group's
LOGITS_AT_ONCE = 8e6 * 4 * 3  # see luthier.llm.engine.target_logprobs
TRANSIENT = 12  # numbers a token, in widths, that a step holds beside what layers keep
# Numbers a token that a layer keeps, in widths: some, and some for each width of the feed-forward layer.
FUSED_WIDE = 2.0
UNFUSED = (16.0, 4.1)
UNFUSED_DROPOUT = (26.0, 6.1)
UNFUSED_DORA = (22.0, 8.0)
DORA_BYTES = 2  # of a weight that DoRA keeps of each weight, beside another one in the run's numbers
FILE_BYTES = 1e9  # see luthier.llm.engine.weight_files
ENGINE_BYTES = 0.5e9  # a server beside its weights
INTEGER_BYTES = 3  # of a number that is held as integers: 16 bits, and 8 for gradients
SUM_BYTES = 4  # of a product's sums of integers, beside the numbers that they become
LEAST_ROW = 64


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that are there at all times, and bytes for each token of a row."""

    fixed: float
    per_token: float

    def at(self, tokens_per_row: int) -> int:
        """Return the bytes that a run with rows of so many tokens needs."""
        return int(self.fixed + self.per_token * tokens_per_row)

    def tokens_within(self, memory_bytes: float) -> int:
        """Return the most tokens of a row that fit; 0 where none do."""
        return max(0, int((memory_bytes - self.fixed) / self.per_token))


def memory_need(resolved: Resolved, shape: ModelShape, data_bytes: int = 0) -> MemoryNeed:
    """Estimate a run's memory: process, data set, base, what is trained with its optimizer, activations, logits."""
    number = 2 if resolved.numbers == "bfloat16" else 4
    layer = _kept(resolved, shape)
    layers = resolved.last_layers if resolved.mode == "last_layers" else shape.layers  # frozen ones below keep nothing
    kept = layers + layer if resolved.recompute else layers * layer
    per_token = shape.width * number * (kept + TRANSIENT)
    if resolved.precision == "int8":
        per_token += SUM_BYTES * (shape.mlp_matrices - 1) * shape.intermediate  # of the widest product
    return MemoryNeed(PROCESS_BYTES + data_bytes + _weights(resolved, shape, number) + LOGITS_AT_ONCE, per_token)


def data_bytes(units: int, tokens: int) -> int:
    """Return what units take that are held in memory."""
    return units * DATA_BYTES_PER_UNIT + tokens * DATA_BYTES_PER_TOKEN


def main_memory_need(resolved: Resolved, shape: ModelShape, data: int, *, proven: bool, on_gpu: bool) -> int:
    """Estimate the main memory that a run needs beside its steps: for loading, export, and (``proven``) parity.

    Parity runs the exported model as it is served, and scores with the merged one.
    """
    export = min(FILE_BYTES, shape.parameters * shape.bytes_per_number) + 4 * shape.vocabulary * shape.width
    held = 4.0 if not resolved.has_adapter else 2.0 if resolved.numbers == "bfloat16" else 4.0
    in_parts = resolved.mode in ("qlora", "last_layers")
    loading = shape.parameters * held if on_gpu and not in_parts else 0.0
    numbers = shape.bytes_per_number if shape.fused else 4
    proof = max(shape.parameters * numbers + LOGITS_AT_ONCE, shape.parameters * 2 + ENGINE_BYTES) if proven else 0.0
    return int(PROCESS_BYTES + data + max(export, loading, proof))


def _kept(resolved: Resolved, shape: ModelShape) -> float:
    """Return how many numbers a layer keeps of a token for its backward pass, in widths of the model."""
    if shape.fused and resolved.mode != "dora" and not resolved.lora_dropout:
        queries, keys = shape.query_width / shape.width, shape.key_width / shape.width
        # Its input, queries, keys and values (and those before their norms), what attention gives, the sum behind it,
        # and what each adapter makes of its input first.
        base, wide = 2 + 2 * queries + 2 * keys + (queries + keys) * shape.head_norms, FUSED_WIDE
        base += (4 + shape.mlp_matrices) * resolved.lora_rank / shape.width if resolved.has_adapter else 0.0
    elif resolved.mode == "dora":
        base, wide = UNFUSED_DORA
    else:
        base, wide = UNFUSED_DROPOUT if resolved.lora_dropout else UNFUSED
    return base + wide * shape.intermediate / shape.width * (shape.mlp_matrices - 1) / 2


def _weights(resolved: Resolved, shape: ModelShape, number: int) -> float:
    if not resolved.has_adapter:
        moments = 2 if resolved.optimizer == "adamw_8bit" else 8
        if resolved.mode == "full":
            return shape.parameters * (8 + moments)
        trained = shape.linear_parameters * resolved.last_layers / shape.layers + shape.head_parameters
        return (shape.parameters - trained) * number + trained * (8 + moments)
    linear = shape.linear_parameters
    held: float = (shape.parameters - linear) * number
    held += shape.adapter_parameters(resolved.lora_rank) * ADAPTER_BYTES
    if resolved.mode == "dora":
        # Weights with what is added to them, for the norms of their rows: measured to stay with layers recomputed, too.
        held += linear * (number + DORA_BYTES)
    if resolved.precision == "int8":
        head = shape.vocabulary * shape.width if product(resolved.method) == "generator" else 0
        return held + INTEGER_BYTES * (linear + head)  # the embeddings of a head stay whole beside it
    if resolved.mode != "qlora":
        return held + linear * number
    # Gate and up are made whole together where they are multiplied, by way of float32.
    whole = 2 * shape.width * shape.intermediate * (number + 4)
    return held + linear * (resolved.base_bits / 8 + SCALE_BYTES) + whole


@dataclass(frozen=True)
class Change:
    """A change of options, in words, and what a run is with it."""

    text: str
    resolved: Resolved


def ways_to_fit(plan: TrainingPlan, shape: ModelShape) -> list[str]:
    """Return what would make a plan's run fit, each in words; nothing where no option does.

    What was measured says how far the estimate is off; it is taken to be off as far with other options.
    """
    room = plan.machine_memory_bytes / _off(plan, shape)
    found: list[str] = []
    for change in _changes(plan.resolved):
        need = memory_need(change.resolved, shape, _data(plan))
        tokens = min(need.tokens_within(room), change.resolved.tokens_per_row)
        if tokens >= min(LEAST_ROW, plan.resolved.tokens_per_row):
            shorter = _shorter(plan, tokens) if tokens < plan.resolved.tokens_per_row else ""
            found.append(" and ".join(part for part in (change.text, shorter) if part))
    return found


def least_need(plan: TrainingPlan, shape: ModelShape) -> int:
    """Return the bytes that the same run needs at least, whatever its options."""
    needs = (memory_need(change.resolved, shape, _data(plan)) for change in _changes(plan.resolved))
    return int(min(need.at(LEAST_ROW) for need in needs) * _off(plan, shape))


def largest_base(plan: TrainingPlan, shape: ModelShape) -> int:
    """Return about how many parameters a base may have that a plan's machine can train in some mode.

    It is taken to be as wide, with fewer layers and a smaller vocabulary: all that it needs falls in a straight line.
    """
    halves = {name: getattr(shape, name) / 2 for name in ("layers", "vocabulary", "parameters")}
    off = _off(plan, shape) / _off(plan, shape.model_copy(update=halves))
    need, of_half = least_need(plan, shape), least_need(plan, shape.model_copy(update=halves)) * off
    share = 1 - (need - plan.machine_memory_bytes) / (2 * (need - of_half))
    return max(0, int(shape.parameters * share))


def _off(plan: TrainingPlan, shape: ModelShape) -> float:
    """Return how many times the estimate a plan was found to need, at least 1."""
    estimate = memory_need(plan.resolved, shape, _data(plan)).at(plan.resolved.tokens_per_row)
    return max(1.0, plan.memory_bytes / estimate)


def _data(plan: TrainingPlan) -> int:
    """Return the bytes of the data set that lie where steps are computed."""
    return plan.data_bytes if plan.machine_main_memory_bytes is None else 0


def _changes(resolved: Resolved) -> Iterator[Change]:
    """Yield what can be changed, the least first; each with layers recomputed, which costs time alone."""

    def changed(text: str, **update: object) -> Change:
        words = text if resolved.recompute else " and ".join(part for part in (text, "set recompute=true") if part)
        return Change(words, resolved.model_copy(update={"recompute": True, **update}))

    yield Change("", resolved)
    if not resolved.recompute:
        yield changed("")
    if resolved.mode == "qlora" and resolved.base_bits == 8:
        yield changed("set base_bits=4", base_bits=4)
    if not resolved.has_adapter and resolved.optimizer == "adamw":
        yield changed("set optimizer=adamw_8bit", optimizer="adamw_8bit")
    if not resolved.has_adapter:
        yield changed("use mode=lora", mode="lora")
    if resolved.precision != "bfloat16":
        yield changed("set precision=bfloat16", precision="bfloat16")
    if resolved.mode != "qlora":
        if resolved.precision == "int8":
            yield changed("use mode=qlora and precision=float32", mode="qlora", base_bits=4, precision="float32")
        else:
            yield changed("use mode=qlora", mode="qlora", base_bits=4)


def _shorter(plan: TrainingPlan, tokens: int) -> str:
    if tokens >= plan.longest_example:
        return f"set tokens_per_row={tokens}"
    cut = {"raw_text": ": documents are cut into pieces", "classification": ": texts are cut off"}
    cut["regression"] = cut["classification"]
    rest = cut.get(plan.resolved.method, " and too_long=truncate or drop")
    return f"set max_tokens={tokens} and tokens_per_row={tokens}{rest} (the longest example has {plan.longest_example})"
