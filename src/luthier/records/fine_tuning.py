"""Fine-tuning jobs as OpenAI's clients ask for them, and what is kept of them beside the run: checkpoints, sharing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from luthier.records.model import Artifact
from luthier.records.record import Record
from luthier.records.stored import Metadata, Stored

MethodName = Literal["supervised", "dpo", "reinforcement"]
MAX_INTEGRATIONS = 5


class _Asked(BaseModel):
    """A part of a request: unknown fields are tolerated, numbers in quotes are not."""

    model_config = ConfigDict(extra="allow", strict=True)


class Hyperparameters(_Asked):
    """Each is a number, or ``auto``: then the plan derives it."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50)] | None = None
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] | None = None
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=1000)] | None = None


class DpoHyperparameters(Hyperparameters):
    """``beta`` is the strength of the pull towards the starting model."""

    beta: Literal["auto"] | Annotated[float, Field(gt=0, le=2)] | None = None


class SupervisedMethod(_Asked):
    """Learning answers."""

    hyperparameters: Hyperparameters | None = None


class DpoMethod(_Asked):
    """Learning preferences."""

    hyperparameters: DpoHyperparameters | None = None


class JobMethod(_Asked):
    """What is learned, with the options of that method."""

    type: MethodName
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None


class WandbIntegration(_Asked):
    """Where in Weights & Biases a run is logged."""

    project: str = Field(min_length=1, max_length=128)
    name: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class Integration(_Asked):
    """A service that the run is logged to."""

    type: Literal["wandb"]
    wandb: WandbIntegration


class JobRequest(_Asked):
    """A request for a fine-tuning job. ``hyperparameters`` is the older place of those in ``method``."""

    model: str = Field(min_length=1)
    training_file: str = Field(min_length=1)
    validation_file: str | None = None
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, lt=2**31)
    metadata: Metadata | None = None
    hyperparameters: Hyperparameters | None = None
    method: JobMethod | None = None
    integrations: list[Integration] | None = Field(None, max_length=MAX_INTEGRATIONS)


class PermissionRequest(_Asked):
    """The projects that a checkpoint is to be shared with."""

    project_ids: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]] = Field(
        min_length=1, max_length=100
    )


class Checkpoint(Stored):
    """The weights at the end of an epoch, as an adapter; ``model`` is the name under which they can be asked.

    ``parent`` is the run's id. ``metrics`` are those of its step, by OpenAI's names.
    """

    parent: str
    model: str
    base: str
    step: int
    metrics: dict[str, float]
    adapter: Artifact


class CheckpointPermission(Stored):
    """A project's permission to ask a model or checkpoint (``model``) of the project that this belongs to."""

    parent: str
    model: str
    project_id: str


class SharedModel(Stored):
    """The other side of a :class:`CheckpointPermission`: it belongs to the project that may ask ``model``.

    It counts as long as the permission of the project ``owner`` is there.
    """

    model: str
    owner: str
    permission: str


class TrainingFiles(Record):
    """What a run learns from where that is not a dataset: the ids of uploaded files of its project."""

    training: str
    validation: str | None = None
