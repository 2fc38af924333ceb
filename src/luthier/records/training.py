"""How to train: what a person chooses, what a plan derives with its reasons, and what came of it."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from luthier.records.base_model import ModelShape
from luthier.records.columns import Columns
from luthier.records.objectives import (
    PAIRED,
    DpoOptions,
    KtoOptions,
    Method,
    OrpoOptions,
    RewardOptions,
    SupervisedOptions,
)
from luthier.records.record import Record

Mode = Literal["lora", "rslora", "dora", "qlora", "full", "last_layers"]
Precision = Literal["float32", "bfloat16", "int8"]
Schedule = Literal["cosine", "linear", "constant"]
Auto = Literal["auto"]
AUTO: Auto = "auto"
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

METHODS: frozenset[Method] = frozenset(get_args(Method))
MODES: frozenset[Mode] = frozenset(get_args(Mode))
ADAPTERS: frozenset[Mode] = MODES - {"full", "last_layers"}
# What an option is for, where that is not every method or mode.
METHODS_OF: dict[str, frozenset[Method]] = {
    **{name: frozenset({name}) for name in ("dpo", "orpo", "kto", "reward")},
    "supervised": frozenset({"supervised", "raw_text"}),
    "equal_answers": PAIRED,
    "too_long": METHODS
    - {"raw_text", "classification", "regression"},  # these cut documents into pieces, and texts off
    "missing_end_of_turn": METHODS - {"raw_text", "classification", "regression"},
}
MODES_OF: dict[str, frozenset[Mode]] = {
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "lora_layers"), ADAPTERS),
    "base_bits": frozenset({"qlora"}),
    "last_layers": frozenset({"last_layers"}),
}
INTEGER_MODES: frozenset[Mode] = ADAPTERS - {"qlora"}  # those in which the base's products may be made in int8


class WandbOptions(Record):
    """Where in Weights & Biases a run is logged, where the environment (``WANDB_PROJECT`` …) is not to decide."""

    project: str | None = Field(None, description="W&B project")
    name: str | None = Field(None, description="the run's name in W&B; its id where not given")
    entity: str | None = Field(None, description="W&B team or user")
    tags: tuple[str, ...] = Field((), description="tags of the run in W&B")


def has_effect(option: str, method: Method, mode: Mode) -> bool:
    """Return whether an option changes anything with a method and a mode."""
    return method in METHODS_OF.get(option, METHODS) and mode in MODES_OF.get(option, MODES)


class TrainingConfig(Record):
    """The options of training; each ``"auto"`` is derived by the plan, with its reason.

    ``learning_rate_multiplier`` scales the derived learning rate (OpenAI's meaning), or the ``learning_rate`` that is
    given. ``max_tokens`` is the longest example in tokens (auto: the model's context length,
    at most 4,096; for raw text 1,024). ``columns`` names the fields that hold labels, weights, groups, thumbs …
    """

    method: Method = Field("supervised", description="what is learned: answers, raw text, preferences, thumbs, labels")
    mode: Mode = Field("lora", description="which numbers are trained: an adapter, all of them, or the last layers")
    supervised: SupervisedOptions = SupervisedOptions()
    dpo: DpoOptions = DpoOptions()
    orpo: OrpoOptions = OrpoOptions()
    kto: KtoOptions = KtoOptions()
    reward: RewardOptions = RewardOptions()
    columns: Columns = Columns()
    resample: dict[str, float] | Literal["none", "balanced"] = Field(
        "none", description="factor per value of columns.group: 2 twice as often, 0.5 half of them; or balanced"
    )
    epochs: Positive | Auto = Field(AUTO, description="passes over the training examples")
    batch_size: Count | Auto = Field(AUTO, description="examples per optimizer step")
    learning_rate: Positive | Auto = Field(AUTO, description="peak learning rate")
    learning_rate_multiplier: float = Field(1.0, gt=0, description="scales the learning rate")
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor on the learning rate per layer from the top")
    warmup_share: Share | Auto = Field(AUTO, description="share of the steps with a rising learning rate")
    schedule: Schedule = Field("cosine", description="learning rate after warm-up")
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="AdamW, or with its moments in 8 bits")
    lora_rank: Count | Auto = Field(AUTO, description="rank of the low-rank adapter")
    lora_alpha: Positive | Auto = Field(
        AUTO, description="scale of the adapter: alpha / rank, in mode rslora alpha / √rank"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter")
    lora_layers: tuple[str, ...] = Field((), description="names of the layers with adapters; none: all linear")
    base_bits: Literal[4, 8] = Field(4, description="bits of the frozen base in mode qlora")
    last_layers: Count | Auto = Field(AUTO, description="layers trained in mode last_layers")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_gradient_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    max_tokens: Annotated[int, Field(ge=2)] | Auto = Field(AUTO, description="longest example, in tokens")
    too_long: Literal["refuse", "drop", "truncate"] = Field("refuse", description="what to do with longer examples")
    empty_mask: Literal["refuse", "drop"] = Field("refuse", description="what to do with examples without loss")
    equal_answers: Literal["refuse", "drop"] = Field("refuse", description="what to do with pairs of equal answers")
    missing_end_of_turn: Literal["refuse", "drop", "append"] = Field(
        "refuse", description="what to do with answers that do not end in a stop token"
    )
    tokens_per_row: Annotated[int, Field(ge=2)] | Auto = Field(
        AUTO, description="tokens that go through the model at once"
    )
    recompute: bool | Auto = Field(AUTO, description="gradient checkpointing: keep only each layer's input")
    validations: Count | Auto = Field(AUTO, description="how often validation loss is measured")
    early_stopping: int = Field(0, ge=0, description="validations without a gain before it stops; 0: never")
    samples: int = Field(3, ge=0, le=20, description="validation prompts answered at each validation")
    sample_tokens: int = Field(24, ge=1, le=512, description="longest sample answer, in tokens")
    checkpoints: Count | Auto = Field(AUTO, description="how often the state is saved")
    precision: Precision | Auto = Field(AUTO, description="numbers in which the frozen base is multiplied")
    trackers: tuple[Literal["wandb", "mlflow"], ...] = Field((), description="log there too, beside TensorBoard")
    wandb: WandbOptions = WandbOptions()
    seed: int = Field(0, ge=0, lt=2**31, description="order of the examples and the adapter's start")

    @model_validator(mode="after")
    def _refuse_options_without_effect(self) -> Self:
        fields = type(self).model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].default}
        idle = [
            f"{name} (method={self.method})"
            for name in sorted(changed)
            if self.method not in METHODS_OF.get(name, METHODS)
        ]
        idle += [f"{name} (mode={self.mode})" for name in sorted(changed) if self.mode not in MODES_OF.get(name, MODES)]
        idle += ["wandb (trackers)"] if "wandb" in changed and "wandb" not in self.trackers else []
        if idle:
            raise ValueError(f"these options would have no effect: {', '.join(idle)}")
        if self.precision == "int8" and self.mode not in INTEGER_MODES:
            modes = ", ".join(sorted(INTEGER_MODES))
            raise ValueError(f"precision=int8 multiplies a frozen base: it goes with mode {modes}, not {self.mode}")
        return self


class AdapterShape(Record):
    """What is fixed where training goes on from an adapter. ``base`` is the model that it says it was made on."""

    mode: Literal["lora", "rslora", "dora"] = "lora"
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = 0.0
    base: str | None = None


class Resolved(Record):
    """The numbers that a run uses, after every ``auto`` was derived."""

    method: Method = "supervised"
    mode: Mode = "lora"
    epochs: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    layer_decay: float = 1.0
    warmup_steps: int = Field(ge=0)
    schedule: Schedule
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    lora_rank: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float
    lora_layers: tuple[str, ...] = ()
    base_bits: Literal[4, 8] = 4
    last_layers: int = 0
    weight_decay: float
    max_gradient_norm: float
    max_tokens: int
    tokens_per_row: int
    recompute: bool = False
    validate_every: int = Field(ge=1)
    early_stopping: int = 0
    checkpoint_every: int = Field(ge=1)
    precision: Precision
    seed: int
    supervised: SupervisedOptions = SupervisedOptions()
    dpo: DpoOptions = DpoOptions()
    orpo: OrpoOptions = OrpoOptions()
    kto: KtoOptions = KtoOptions()
    reward: RewardOptions = RewardOptions()

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, and not the model's own weights."""
        return self.mode in ADAPTERS

    @property
    def numbers(self) -> Literal["float32", "bfloat16"]:
        """The numbers of all that flows through the model: only the products of its base are made in int8."""
        return "bfloat16" if self.precision == "bfloat16" else "float32"


class Derived(Record):
    """One derived value and why it is that."""

    name: str
    value: str
    reason: str


class Measured(Record):
    """What a step at the longest length took on this machine, in a process of its own.

    ``tokens`` went through the model in ``seconds``; ``peak_bytes`` is the most memory that the process held.
    """

    tokens: int
    seconds: float
    peak_bytes: int


class TrainingPlan(Record):
    """What a run will do, before it does it.

    Bytes and seconds are estimates, or follow from ``measured`` steps where there are; ``reasons`` says how they came.
    ``memory_bytes`` is what its steps need on the device that computes, ``main_memory_bytes`` what loading, export and
    parity need of main memory (which is the device's own where ``machine_main_memory_bytes`` is None); ``data_bytes``
    of it is the data set. ``forward_tokens`` go through the model in all without being learned: validations, the
    reference, sample answers, the test.
    """

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
    main_memory_bytes: int = 0
    machine_main_memory_bytes: int | None = None
    data_bytes: int = 0
    forward_tokens: int = 0
    shape: ModelShape | None = None
    seconds: float
    measured: Measured | None = None
    reasons: tuple[Derived, ...]


class StepMetrics(Record):
    """The state of training after one optimizer step. Rates are per second of wall time, in un-shared tokens.

    The metrics depend on the method: ``token_accuracy``; ``reward_accuracy``, ``reward_margin`` …; ``accuracy``. A
    loss or norm that is not a finite number is None: the step changed nothing.
    """

    step: int
    steps: int
    epoch: float
    train_loss: float | None
    train_metrics: dict[str, float] = Field(default_factory=dict)
    valid_loss: float | None = None
    valid_metrics: dict[str, float] = Field(default_factory=dict)
    learning_rate: float
    gradient_norm: float | None
    tokens_per_second: float
    seconds_left: float


class TrainingResult(Record):
    """What training came to; the best step is the one with the lowest validation loss.

    ``valid_metrics`` and ``test_metrics`` are those of the best step's weights; the test side was looked at once.
    ``left_out_steps`` had a loss or gradient that was not a finite number, and changed nothing.
    """

    steps: int
    best_step: int
    train_loss: float
    valid_loss: float | None
    best_valid_loss: float | None
    valid_metrics: dict[str, float] = Field(default_factory=dict)
    test_metrics: dict[str, float] = Field(default_factory=dict)
    stopped_early: str | None = None
    left_out_steps: int = 0
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
