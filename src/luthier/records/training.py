"""How to train: what a person chooses, what a plan derives with its reasons, and what came of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from luthier.records.record import Record

Auto = Literal["auto"]
AUTO: Auto = "auto"


class TrainingConfig(Record):
    """The options of supervised LoRA training; each ``"auto"`` is derived by the plan, with its reason.

    ``learning_rate_multiplier`` scales the derived learning rate (OpenAI's meaning); a ``learning_rate`` that is
    given is used as it is. ``max_tokens`` is the longest example in tokens (auto: the model's context length,
    at most 4,096).
    """

    method: Literal["supervised"] = "supervised"
    epochs: float | Auto = Field(AUTO, description="passes over the training examples")
    batch_size: int | Auto = Field(AUTO, description="examples per optimizer step")
    learning_rate: float | Auto = Field(AUTO, description="peak learning rate of the adapter")
    learning_rate_multiplier: float = Field(1.0, gt=0, description="scales the derived learning rate")
    warmup_share: float | Auto = Field(AUTO, description="share of the steps with a rising learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after warm-up")
    lora_rank: int | Auto = Field(AUTO, description="rank of the low-rank adapter")
    lora_alpha: float | Auto = Field(AUTO, description="scale of the adapter: alpha / rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay on the adapter")
    max_gradient_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    max_tokens: int | Auto = Field(AUTO, description="longest example, in tokens")
    too_long: Literal["refuse", "drop", "truncate"] = Field("refuse", description="what to do with longer examples")
    empty_mask: Literal["refuse", "drop"] = Field("refuse", description="what to do with examples without loss")
    missing_end_of_turn: Literal["refuse", "drop", "append"] = Field(
        "refuse", description="what to do with answers that do not end in a stop token"
    )
    tokens_per_row: int | Auto = Field(AUTO, description="tokens that go through the model at once")
    validations: int | Auto = Field(AUTO, description="how often validation loss is measured")
    checkpoints: int | Auto = Field(AUTO, description="how often the state is saved")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="numbers of the frozen base")
    seed: int = Field(0, ge=0, lt=2**31, description="order of the examples and the adapter's start")


class Resolved(Record):
    """The numbers that a run uses, after every ``auto`` was derived."""

    epochs: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    schedule: Literal["cosine", "linear", "constant"]
    lora_rank: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float
    weight_decay: float
    max_gradient_norm: float
    max_tokens: int
    tokens_per_row: int
    validate_every: int = Field(ge=1)
    checkpoint_every: int = Field(ge=1)
    precision: Literal["float32", "bfloat16"]
    seed: int


class Derived(Record):
    """One derived value and why it is that."""

    name: str
    value: str
    reason: str


class TrainingPlan(Record):
    """What a run will do, before it does it. Bytes and seconds are estimates; ``reasons`` says how they came."""

    examples: int
    validation_examples: int
    tokens_per_epoch: int
    loss_tokens_per_epoch: int
    computed_tokens_per_epoch: int
    longest_example: int
    shared_prefix: int
    dropped: dict[str, int] = Field(default_factory=dict)
    truncated: int = 0
    steps: int
    resolved: Resolved
    memory_bytes: int
    machine_memory_bytes: int
    seconds: float
    reasons: tuple[Derived, ...]


class StepMetrics(Record):
    """The state of training after one optimizer step. Rates are per second of wall time, in un-shared tokens."""

    step: int
    steps: int
    epoch: float
    train_loss: float
    train_token_accuracy: float
    valid_loss: float | None = None
    valid_token_accuracy: float | None = None
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    seconds_left: float


class TrainingResult(Record):
    """What training came to; the best step is the one with the lowest validation loss."""

    steps: int
    best_step: int
    train_loss: float
    valid_loss: float | None
    best_valid_loss: float | None
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
