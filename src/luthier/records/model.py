"""Tuned models: the record that reproduces one, and the proof that its forms agree."""

from __future__ import annotations

import re
import unicodedata
from datetime import datetime
from typing import Any, Literal

from luthier.errors import InputError
from luthier.records.access import DEFAULT_PROJECT
from luthier.records.objectives import Product
from luthier.records.record import Record
from luthier.records.template import TemplateVersion
from luthier.records.training import Resolved, TrainingResult

ArtifactKind = Literal["adapter", "merged", "gguf-q8_0", "gguf-f16"]
SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Artifact(Record):
    """A form of a model on disk: ``path`` within the artifact folder, its bytes, and the hash of each file."""

    kind: ArtifactKind
    path: str
    bytes: int
    sha256: dict[str, str]


class Alias(Record):
    """A name such as ``support@production`` that points at one model of a project at a time (times in Unix seconds)."""

    project: str
    name: str
    model: str
    created_at: float


class FormParity(Record):
    """How one form of a model agrees with the adapter on the same prompts.

    ``token_agreement`` is the share of answer tokens, of the form's own greedy answers, that the adapter chooses at
    temperature 0 too, given the same text before; ``identical_answers`` the share of prompts whose whole answers are
    then equal; ``mean_logprob_difference`` the mean absolute difference of the answer tokens' natural
    log-probabilities.
    """

    form: Literal["merged", "gguf", "served"]
    token_agreement: float
    identical_answers: float
    mean_logprob_difference: float | None


class Parity(Record):
    """The proof that what is served is what was trained."""

    prompts: int
    answer_tokens: int
    limit: float
    forms: tuple[FormParity, ...]

    @property
    def passed(self) -> bool:
        """Whether every form agrees at least as much as the limit asks."""
        return all(form.token_agreement >= self.limit for form in self.forms)


class TunedModel(Record):
    """A tuned model in the registry: all that is needed to make it again, and what it is worth.

    ``product`` says what it does: write, score an answer, or label a text with one of ``labels``.
    ``parent`` is the tuned model, or the folder from elsewhere, from whose adapter training went on.
    """

    name: str
    project: str = DEFAULT_PROJECT
    base: str
    base_sha256: str
    run_id: str
    dataset: str
    dataset_hash: str
    template: TemplateVersion | None
    hyperparameters: Resolved
    options: dict[str, Any]
    seed: int
    code_version: str
    training: TrainingResult
    parity: Parity | None
    artifacts: dict[str, Artifact]
    parent: str | None = None
    product: Product = "generator"
    labels: tuple[str, ...] = ()
    licence: str
    created_at: datetime

    @property
    def template_hash(self) -> str | None:
        """The content hash of the template that made the examples."""
        return self.template.template.content_hash if self.template else None


def check_suffix(suffix: str) -> None:
    """Refuse what cannot stand in a model's name.

    Raises:
        InputError: the suffix is not 1 to 64 letters, digits, ``.``, ``_`` or ``-``, the first a letter or digit.
    """
    if not SUFFIX.fullmatch(suffix):
        raise InputError(
            f"The suffix {suffix!r} is not 1 to 64 of the letters A-Z a-z 0-9 . _ -, the first a letter or digit."
        )


def tuned_name(base: str, organisation: str, suffix: str, run_id: str) -> str:
    """Return ``ft:<base>:<org>:<suffix>:<id>``, OpenAI's form of a tuned model's name.

    Raises:
        InputError: there is a suffix, and it breaks its rule.
    """
    if suffix:
        check_suffix(suffix)
    return f"ft:{base.replace(':', '-')}:{organisation}:{suffix}:{run_id.rsplit('-', 1)[-1]}"


def folder_name(name: str) -> str:
    """Return a name that every file system takes: letters, digits, ``.``, ``_`` and ``-``."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-.") or "unnamed"
