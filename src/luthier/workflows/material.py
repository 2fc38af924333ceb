"""What a training run learns from: everything that its request names, looked up, rendered and checked, per method."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from luthier.errors import CapacityError, InputError, NothingToLearnError
from luthier.evaluate.contest import sample
from luthier.ingest.sampling import resample
from luthier.llm.base_config import read_adapter
from luthier.llm.machine_memory import machine_memory
from luthier.records.base_model import BaseModelInfo, Machine
from luthier.records.dataset import DatasetVersion
from luthier.records.example import Conversation, Example, Message, SplitName
from luthier.records.fine_tuning import TrainingFiles
from luthier.records.model import TunedModel, check_suffix
from luthier.records.objectives import PAIRED, product
from luthier.records.record import Record
from luthier.records.template import TemplateVersion
from luthier.records.training import AdapterShape, Derived, TrainingConfig, TrainingPlan
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat
from luthier.templates.labelled import TextRenderer, iter_labelled, iter_labelled_texts, label_names, load_tokenizer
from luthier.templates.raw_text import iter_documents
from luthier.templates.renderer import (
    RenderPolicy,
    RenderReport,
    TemplateRenderer,
    Unit,
    iter_pairs,
    iter_thumbs,
    iter_tokenized,
)
from luthier.templates.spool import SpooledExamples, SpooledPairs
from luthier.train.hyperparameters import max_tokens
from luthier.train.plan import Material, plan_training
from luthier.workflows.datasets import Side, side
from luthier.workflows.models import served_folder, shape

RAW_PROMPT_CHARACTERS = 200
LARGE_BYTES = 200_000_000  # of the data set's file
HELD_FOR_A_BYTE = 12  # of it: measured, about 50 for a token of four letters
ASKED_EXAMPLES = 1_000  # of which the prompts of parity and of sample answers are drawn


class TrainRequest(Record):
    """What to train: a base on a divided dataset through a template, or on uploaded files.

    Of ``files`` the run makes a dataset with a training and perhaps a validation side, but no test side.
    ``base`` is a base model, or a tuned one (``ft:…``) from whose adapter training goes on; ``adapter`` is a folder
    with an adapter from elsewhere (PEFT's files) to go on from. ``parity_prompts`` held-out prompts prove that adapter,
    merged, GGUF and served model agree on at least ``parity_limit`` of the answer tokens; 0 leaves the proof out.
    """

    base: str
    adapter: Path | None = None
    dataset: str | None = None
    files: TrainingFiles | None = None
    template: str | None = None
    suffix: str = ""
    options: TrainingConfig = TrainingConfig()
    parity_prompts: int = Field(64, ge=0)
    parity_limit: float = Field(0.97, gt=0, le=1)

    @model_validator(mode="after")
    def _learn_from_one_source(self) -> Self:
        if (self.dataset is None) == (self.files is None):
            raise ValueError("name a dataset, or files, to learn from")
        if self.adapter is not None and self.base.startswith("ft:"):
            raise ValueError("an adapter belongs to a base model, and a tuned model has its own")
        return self


@dataclass(frozen=True)
class Prepared:
    """Everything that a request names, looked up and rendered.

    ``held_out`` are the conversations that parity uses, ``sampled`` those of the sample answers; both are empty for
    models that do not write. ``left_out`` says what of the validation and test sides cannot be measured.
    """

    request: TrainRequest
    base: BaseModelInfo
    base_folder: Path
    start_adapter: Path | None
    start_shape: AdapterShape | None
    dataset: DatasetVersion
    template: TemplateVersion | None
    chat_format: ChatFormat | None
    material: Material
    test: Sequence[Unit]
    labels: tuple[str, ...]
    held_out: list[Conversation]
    sampled: list[Conversation]
    left_out: Sequence[Derived] = ()

    def plan(self, machine: Machine) -> TrainingPlan:
        """Plan the run on a machine, without making a step."""
        options, chat = self.request.options, self.chat_format
        asked = sample(self.sampled, options.samples, options.seed) if chat else []
        known = replace(
            self.material,
            test=self.test,
            sample_prompts=[len(chat.prompt_tokens(one.prompt)) for one in asked] if chat else (),
            sample_tokens=options.sample_tokens,
            epoch_weights=self.request.files is not None,
            proven=self.request.parity_prompts > 0 and product(options.method) == "generator",
        )
        sizes = shape(self.base_folder, self.base.parameters)
        made = plan_training(known, options, sizes, machine, self.start_shape)
        notes = list(self.left_out)
        said = self.start_shape.base if self.start_shape and self.request.adapter else None
        if said not in (None, self.base.id):
            reason = f"it says that it was made on {said}, which is taken to be {self.base.id}"
            notes.append(Derived(name="adapter", value=str(self.start_adapter), reason=reason))
        return made.model_copy(update={"reasons": (*made.reasons, *notes)})


def prepare(store: Store, request: TrainRequest, answer_tokens: int, scratch: Path) -> Prepared:
    """Look up and render what a request names; ``answer_tokens`` must fit behind a held-out prompt.

    The tokens of a data set that does not fit into memory are kept in the folder ``scratch``.

    Raises:
        CapacityError: the sides that are measured must be held in memory, and cannot be.
        NotFoundError: the base, dataset or template is not there.
        InputError: the suffix breaks its rule, or the examples do not fit the method or cannot be learned as they are.
    """
    options = request.options
    if request.suffix:
        check_suffix(request.suffix)
    base, start_adapter, labels = _start(store, request)
    start_shape = read_adapter(start_adapter) if start_adapter else None
    folder = store.models.base_folder(base)
    writes = product(options.method) == "generator"
    if writes:
        served_folder(store, base.id)  # a base that cannot be served is refused now, not after the training
    if request.dataset is None:
        raise InputError("The run's files are not a dataset yet.", hint="submit the run; its worker makes one")
    dataset = store.datasets.get(request.dataset)
    template = store.templates.get(request.template) if request.template else None
    reader = _Reader(options, folder, base, dataset, template, labels=labels)
    data_bytes, free_bytes = store.datasets.bytes(dataset), machine_memory().free_bytes
    tested = not request.files and options.method != "supervised"
    _check_held(dataset, ("validation", "test") if tested else ("validation",), data_bytes, free_bytes)
    train_side, growth = _resampled(Side(store, dataset, "train"), options)
    if data_bytes * growth > min(LARGE_BYTES, free_bytes / HELD_FOR_A_BYTE):
        examples, report = reader.spool(train_side, scratch)
    else:
        examples, report = reader.read(train_side)
    validation_side = side(store, dataset, "validation")
    validation = reader.read_held_out("validation", validation_side)
    test_side: list[Example] = []
    if request.files:
        asked = list(islice(store.datasets.examples(dataset, "train"), ASKED_EXAMPLES))  # only their prompts matter
    elif options.method == "supervised":  # the test side is for evaluations, which ask the model
        asked = _drawn(store.datasets.examples(dataset, "test"), options.seed) or side(store, dataset, "test")
    else:
        test_side = side(store, dataset, "test")
        asked = _drawn(test_side, options.seed)
    return Prepared(
        request=request,
        base=base,
        base_folder=folder,
        start_adapter=start_adapter,
        start_shape=start_shape,
        dataset=dataset,
        template=template,
        chat_format=reader.chat_format,
        material=Material(examples, validation, report),
        test=reader.read_held_out("test", test_side),
        labels=reader.labels,
        held_out=reader.answerable(asked, answer_tokens) if writes else [],
        sampled=reader.answerable(_drawn(validation_side, options.seed), options.sample_tokens) if writes else [],
        left_out=reader.left_out,
    )


def _drawn(examples: Iterable[Example], seed: int) -> list[Example]:
    """Return at most :data:`ASKED_EXAMPLES` examples, drawn at random; no others are held."""
    rows, generator = iter(examples), random.Random(seed)  # noqa: S311 - not a secret
    kept = list(islice(rows, ASKED_EXAMPLES))
    for index, example in enumerate(rows, len(kept)):
        place = generator.randrange(index + 1)  # Vitter 1985, algorithm R
        if place < len(kept):
            kept[place] = example
    return kept


class _Reader:
    """Turns the examples of one side into units, by method.

    A classifier's labels are those given, or else those of the first side that is read. ``left_out`` says what of the
    sides that are measured was left out.
    """

    def __init__(
        self,
        options: TrainingConfig,
        folder: Path,
        base: BaseModelInfo,
        dataset: DatasetVersion,
        template: TemplateVersion | None,
        *,
        labels: tuple[str, ...],
    ) -> None:
        self.labels = labels
        self.left_out: list[Derived] = []
        self.chat_format = ChatFormat.load(folder) if base.kind == "decoder" else None
        self._options = options
        self._folder = folder
        self._fields = dataset.fields
        self._template = template.template if template else None
        self._policy = RenderPolicy(
            max_tokens=max_tokens(options, shape(folder, base.parameters)),
            too_long=options.too_long,
            empty_mask=options.empty_mask,
            missing_end_of_turn=options.missing_end_of_turn,
            equal_answers=options.equal_answers,
        )

    def read_held_out(self, name: str, examples: Sequence[Example]) -> Sequence[Unit]:
        """Return the examples of a side that is measured; what cannot be is left out, and told in ``left_out``."""
        if not examples:
            return []
        try:
            units, report = self.read(examples, held_out=True)
        except NothingToLearnError:
            self.left_out.append(Derived(name=f"{name} side", value="none", reason="nothing of it can be measured"))
            return []
        if dropped := sum(report.dropped.values()):
            reason = f"{dropped:,} of {len(examples):,} cannot be measured and are left out"
            self.left_out.append(Derived(name=f"{name} side", value=f"{report.rendered:,}", reason=reason))
        return units

    def read(self, examples: Iterable[Example], *, held_out: bool = False) -> tuple[Sequence[Unit], RenderReport]:
        """Return examples, which may be read twice, as units of the method."""
        report = RenderReport()
        return list(self._units(examples, report, held_out=held_out)), report

    def spool(self, examples: Iterable[Example], folder: Path) -> tuple[Sequence[Unit], RenderReport]:
        """Return what :meth:`read` does of a data set that does not fit into memory; the units lie on disk."""
        report = RenderReport()
        kind: Any = SpooledPairs if self._options.method in PAIRED else SpooledExamples
        return kind.write(folder, self._units(examples, report)), report

    def _units(self, examples: Iterable[Example], report: RenderReport, *, held_out: bool = False) -> Iterator[Unit]:
        """Return units one by one, and count in ``report``; memory does not grow with their number."""
        method, columns = self._options.method, self._options.columns
        if method in ("classification", "regression"):
            return self._labelled(examples, report)
        assert self.chat_format is not None  # noqa: S101  encoders only label
        if method == "raw_text":
            texts = self._texts()
            documents = ((example.id, texts.text(example)) for example in examples)
            return iter_documents(documents, self.chat_format, length=self._policy.max_tokens, report=report)
        conversations = TemplateRenderer(self._template, self._fields).iter_conversations(examples, columns)
        if method in PAIRED:
            return iter_pairs(conversations, self.chat_format, self._policy, report)
        if method == "kto":
            return iter_thumbs(conversations, self.chat_format, self._policy, report, both=not held_out)
        return iter_tokenized(conversations, self.chat_format, self._policy, report)

    def answerable(self, examples: Sequence[Example], answer_tokens: int) -> list[Conversation]:
        """Return the conversations whose prompts leave room for an answer."""
        assert self.chat_format is not None  # noqa: S101  only models that write are asked
        room = self.chat_format.context_length - answer_tokens
        found = self._beginnings(examples) if self._options.method == "raw_text" else self._conversations(examples)
        return [one for one in found if len(self.chat_format.prompt_tokens(one.prompt, one.tools)) <= room]

    def _conversations(self, examples: Sequence[Example]) -> list[Conversation]:
        return TemplateRenderer(self._template, self._fields).conversations(examples, self._options.columns)

    def _beginnings(self, examples: Sequence[Example]) -> list[Conversation]:
        """Return documents as a prompt of their beginning and an answer of what follows."""
        texts = self._texts()
        found = []
        for example in examples:
            text = texts.text(example)
            cut = min(RAW_PROMPT_CHARACTERS, len(text) // 2)
            turns = (Message(role="user", content=text[:cut]), Message(role="assistant", content=text[cut:]))
            found.append(Conversation(example_id=example.id, messages=turns))
        return found

    def _labelled(self, examples: Iterable[Example], report: RenderReport) -> Iterator[Unit]:
        options, renderer = self._options, self._texts()
        classes = options.method == "classification"
        if classes and not self.labels:
            self.labels = label_names(examples, options.columns)
        texts = iter_labelled_texts(examples, renderer, options.columns)
        labels, tokenizer = self.labels if classes else None, load_tokenizer(self._folder)
        return iter_labelled(texts, tokenizer, labels, self._policy.max_tokens, report, empty=options.empty_mask)

    def _texts(self) -> TextRenderer:
        return TextRenderer(self._template, self._options.columns, self._fields)


def _check_held(dataset: DatasetVersion, sides: Iterable[SplitName], data_bytes: int, free_bytes: int) -> None:
    """Refuse sides that are measured whose lists would take more memory than there is, before anything is read.

    Raises:
        CapacityError: they would.
    """
    counts = dataset.split.counts if dataset.split else {}
    held = data_bytes * sum(counts.get(name, 0) for name in sides) / max(1, dataset.examples)
    need = held * HELD_FOR_A_BYTE
    if need > free_bytes:
        raise CapacityError(
            f"The sides of {dataset.reference} that are measured ({', '.join(sides)}) have about {held / 1e9:.1f} GB. "
            f"Their tokens are held in memory: about {need / 1e9:.0f} GB, and {free_bytes / 1e9:.0f} GB are free.",
            hint="a few thousand examples tell as much: give a smaller validation file, or divide the dataset with "
            f"luthier dataset split {dataset.name} --validation 0.01 --test 0.01",
        )


def _start(store: Store, request: TrainRequest) -> tuple[BaseModelInfo, Path | None, tuple[str, ...]]:
    """Return the base, and the adapter to go on from with its labels, where a tuned model or an adapter is named.

    Raises:
        NotFoundError: there is no such model.
        InputError: it does not fit the method or the options.
    """
    if not request.base.startswith("ft:"):
        base = store.models.base(request.base)
        _check_kind(base, request.options)
        if request.adapter is not None:
            _check_given(str(request.adapter), request.options)
        return base, request.adapter, ()
    tuned = store.models.get(request.base)
    if "adapter" not in tuned.artifacts:
        raise InputError(
            f"{tuned.name} was trained whole and has no adapter to go on from.",
            hint="pull its merged form as a base: "
            "luthier model export NAME --form merged --to FOLDER, then luthier model pull FOLDER",
        )
    base = store.models.base(tuned.base)
    _check_kind(base, request.options)
    _check_going_on(tuned, base, request.options)
    _check_given(tuned.name, request.options)
    return base, store.models.artifact_folder(tuned.artifacts["adapter"]), tuned.labels


def _check_kind(base: BaseModelInfo, options: TrainingConfig) -> None:
    if base.kind == "encoder" and options.method not in ("classification", "regression"):
        raise InputError(
            f"{base.id} is an encoder: it reads texts but cannot write them, so it cannot learn by {options.method}.",
            hint="use method classification or regression, or a decoder such as smollm2-135m",
        )


def _check_going_on(start: TunedModel, base: BaseModelInfo, options: TrainingConfig) -> None:
    """Refuse a method and a base that do not fit the tuned model that training is to go on from."""
    before = start.hyperparameters.method
    if product(before) != product(options.method) or (product(before) != "generator" and before != options.method):
        raise InputError(
            f"{start.name} was trained by {before}, so its adapter cannot go on by {options.method}.",
            hint=f"use method {before}, or start from the base model {base.id}",
        )
    if start.base_sha256 != base.sha256:
        raise InputError(
            f"{start.name} was trained on a base called {base.id} with other weights ({start.base_sha256[:12]}) than "
            f"the one that is here now ({base.sha256[:12]}).",
            hint="pull the base that it was trained on",
        )


def _check_given(adapter: str, options: TrainingConfig) -> None:
    """Refuse options that an adapter which is there already has decided."""
    fields = TrainingConfig.model_fields
    given = [name for name in fields if name.startswith("lora_") and getattr(options, name) != fields[name].default]
    if options.mode not in ("lora", "qlora") or given:
        chosen = [f"mode={options.mode}", *given]
        raise InputError(
            f"Training goes on from the adapter of {adapter}, so its kind, rank and scale are given: "
            f"{', '.join(chosen)}.",
            hint="leave these options out, or start from the base model; for mode full, export the merged form and "
            "pull that folder as a base",
        )


def _resampled(examples: Iterable[Example], options: TrainingConfig) -> tuple[Iterable[Example], float]:
    """Return examples as they are to be shown, and how many times as many they are then."""
    if options.resample == "none":
        return examples, 1.0
    if options.columns.group is None:
        raise InputError(
            "To resample, the column that names each example's group must be known.", hint="set columns.group=FIELD"
        )
    taken, groups = resample(examples, options.columns.group, options.resample, options.seed)
    return taken, sum(group.after for group in groups) / sum(group.before for group in groups)
