"""Base models and tuned models: pull, list, describe, export."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal

from luthier.errors import (
    CapacityError,
    ConflictError,
    InputError,
    LuthierError,
    MissingDependencyError,
    NotFoundError,
    did_you_mean,
)
from luthier.llm.base_config import context_length, kind_of, read_config, read_shape
from luthier.llm.catalogue import CATALOGUE, find, restriction_of
from luthier.llm.fetch import OnBytes, fetch
from luthier.records.base_model import NO_CHAT_FORMAT, BaseModelInfo, CatalogueEntry, ModelShape
from luthier.records.model import Artifact, TunedModel, folder_name
from luthier.records.record import content_hash
from luthier.store.artifacts import file_hashes, folder_bytes
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat
from luthier.templates.labelled import load_tokenizer
from luthier.workflows.checkpoints import (
    STATE_FOLDER,
    checkpoint_bytes,
    checkpoint_folder,
    checkpoint_named,
    is_checkpoint,
    remove_checkpoint,
    remove_checkpoints,
    served_place,
)
from luthier.workflows.sharing import owner_of

GgufForm = Literal["gguf-q8_0", "gguf-f16"]
ExportFormat = Literal["adapter", "merged", "gguf-q8_0", "gguf-f16"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = ("adapter", "merged", "gguf-q8_0", "gguf-f16")
SERVED_FORM: GgufForm = "gguf-f16"  # the more faithful one; docs/decisions/0003-engine-numerics.md
QUANTIZATIONS: dict[GgufForm, Literal["q8_0", "f16"]] = {"gguf-q8_0": "q8_0", "gguf-f16": "f16"}
GGUF_FILE = "model.gguf"
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@/-]{0,63}")
OnStage = Callable[[str], None]


def catalogue() -> list[CatalogueEntry]:
    """Return the base models that are known by a short name."""
    return list(CATALOGUE.values())


def pull(store: Store, name: str, on_bytes: OnBytes | None = None, on_stage: OnStage | None = None) -> BaseModelInfo:
    """Fetch a base model, check it, convert it once, and cache it; a second call returns at once.

    Args:
        store: Where it is kept.
        name: A name of the catalogue, a hub id, or a local folder.
        on_bytes: Hears of bytes done and in all.
        on_stage: Hears what is being done.

    Raises:
        NotFoundError: the name means nothing, or cannot be reached.
        ConflictError: another source has the same name.
        IntegrityError: the bytes are not those that the catalogue names; nothing is cached.
        InputError: the weights' format can run code, the chat format of a decoder is unusable, or the model is neither
            a decoder nor an encoder that can be trained here.
    """
    entry = find(name)
    known = {info.id: info for info in store.models.bases()}
    if entry.id in known and known[entry.id].source != entry.source:
        raise ConflictError(
            f"The name {entry.id!r} belongs to a base model from {known[entry.id].source}, not {entry.source}.",
            hint="give the folder another name",
        )
    if entry.id in known and store.models.base_folder(known[entry.id]).is_dir():
        return known[entry.id]
    say = on_stage or (lambda _: None)
    key = f"bases/{folder_name(entry.id)}/model"
    store.artifacts.remove(key)  # what an earlier pull left without a record
    with store.artifacts.new(key) as folder:
        say(f"Fetching {entry.source}")
        fetch(entry, folder, on_bytes)
        _convert(folder, say)
        if kind_of(read_config(folder)) == "encoder":
            load_tokenizer(folder)
        else:
            ChatFormat.load(folder)
    folder = store.artifacts.path(key)
    info = _describe(entry, key, folder)
    if info.kind == "decoder":
        say("Making the GGUF form for serving")
        _base_gguf(store, info)
    store.models.add_base(info)
    return info


def shape(folder: Path, parameters: int) -> ModelShape:
    """Read the sizes of a model from its folder."""
    return read_shape(folder, parameters)


def decoder(store: Store, name: str) -> BaseModelInfo:
    """Return a base model that can write.

    Raises:
        NotFoundError: it was not pulled.
        InputError: it is an encoder.
    """
    info = store.models.base(name)
    if info.kind == "encoder":
        raise InputError(
            f"The base model {name!r} is an encoder ({info.architecture}): it reads texts, for classification and "
            "embeddings, and cannot write answers.",
            hint="for answers take a decoder: luthier model catalogue",
        )
    return info


def encoder_folder(store: Store, name: str, *, project: str | None = None) -> Path:
    """Return the folder of a base model that reads: its weights and its tokenizer.

    Raises:
        NotFoundError: there is no model of that name.
        InputError: the model is no encoder, or one with a head of its own.
    """
    if name.startswith("ft:"):
        owner = owner_of(store, project, name) if project is not None else None
        is_part = is_checkpoint(name) and checkpoint_named(store, owner, name)
        what = "a checkpoint" if is_part else f"a {store.models.get(name, project=owner).product}"
        raise InputError(f"The model {name!r} is {what}: vectors of texts come from an encoder that is a base model.")
    info = store.models.base(name)
    if info.kind != "encoder":
        raise InputError(
            f"The base model {name!r} is a decoder ({info.architecture}): it writes answers; vectors come "
            "from an encoder.",
            hint="for vectors take an encoder: luthier model pull minilm-l6",
        )
    return store.models.base_folder(info)


def model_named(store: Store, project: str, name: str, stand_ins: Mapping[str, str] | None = None) -> str:
    """Return the base or tuned model that a name means: itself, what an alias points at, or a stand-in.

    Args:
        store: Where the models are.
        project: Whose aliases count.
        name: What a client asks for.
        stand_ins: Patterns such as ``gpt-4o-mini*`` → a base model; the first that fits counts.

    Raises:
        NotFoundError: it means no base model that is here, and is no name of a tuned one.
    """
    bases = {base.id for base in store.models.bases()}
    if name in bases:
        return name
    pointed = {alias.name: alias.model for alias in store.models.aliases(project)}
    if name in pointed:
        return pointed[name]
    stand_in = next((base for pattern, base in (stand_ins or {}).items() if fnmatchcase(name, pattern)), None)
    found = stand_in or name
    if found in bases or found.startswith("ft:"):
        return found
    if stand_in is not None:
        why = f"LUTHIER_STAND_INS lets {stand_in!r} answer for {name!r}, and {stand_in!r} is not here."
        raise NotFoundError(why, hint=f"luthier model pull {stand_in}")
    if name in CATALOGUE:
        raise NotFoundError(f"The base model {name!r} is not here.", hint=f"luthier model pull {name}")
    raise NotFoundError(
        f"The model {name!r} does not exist.{did_you_mean(name, [*bases, *pointed])}",
        hint="GET /v1/models lists those that do; LUTHIER_STAND_INS lets a base answer for another name",
    )


def set_alias(store: Store, project: str, alias: str, name: str) -> None:
    """Point an alias such as ``support@production`` at a base model or a tuned one of the project.

    Raises:
        NotFoundError: there is no such model.
        InputError: the alias is not such a name, or it would hide a model.
    """
    if not ALIAS.fullmatch(alias):
        raise InputError(f"The alias {alias!r} is not 1 to 64 of the letters A-Z a-z 0-9 . _ - @ /")
    bases = {base.id for base in store.models.bases()}
    if alias in bases:
        raise InputError(f"The alias {alias!r} is the name of a base model.")
    store.models.set_alias(project, alias, name if name in bases else store.models.get(name, project=project).name)


def model_bytes(store: Store, model: TunedModel) -> int:
    """Return what a tuned model takes on disk with all its forms and checkpoints, in bytes: what deleting it frees."""
    checkpoints = store.checkpoints.all(model.project, parent=model.run_id)
    forms = sum(artifact.bytes for artifact in model.artifacts.values())
    state = folder_bytes(store.run_folder(model.run_id) / STATE_FOLDER)
    return forms + state + sum(checkpoint_bytes(store, checkpoint) for checkpoint in checkpoints)


def delete_model(store: Store, project: str, name: str) -> None:
    """Delete a tuned model of a project with all its forms and checkpoints, or one checkpoint, or an alias.

    With a model goes the state that its run kept for going on: it holds the model's weights.

    Raises:
        NotFoundError: the project has none of that name.
        ConflictError: a run that may go on starts from its adapter.
    """
    if name in {alias.name for alias in store.models.aliases(project)}:
        store.models.remove_alias(project, name)
    elif is_checkpoint(name):
        remove_checkpoint(store, checkpoint_named(store, project, name))
    else:
        model = store.models.get(name, project=project)
        _refuse_if_needed(store, model)
        store.models.remove(model.name, project=project)
        for permission in list(store.permissions.all(project, parent=model.name)):
            store.permissions.remove(project, permission.id)
        remove_checkpoints(store, project, model.run_id)
        shutil.rmtree(store.run_folder(model.run_id) / STATE_FOLDER, ignore_errors=True)


def _refuse_if_needed(store: Store, model: TunedModel) -> None:
    needing = [run.id for run in store.runs.all(limit=None) if run.may_go_on and run.config.get("base") == model.name]
    if needing:
        raise ConflictError(
            f"Runs that may go on start from the adapter of {model.name}.",
            problems=needing,
            hint="luthier run cancel RUN",
        )


def served_folder(store: Store, name: str, *, project: str | None = None) -> Path:
    """Return the folder from which a base or tuned model or a checkpoint is served: a GGUF file with its chat format.

    ``project`` leaves out the tuned models of others that are not shared with it.

    Raises:
        EngineError: a checkpoint that is asked for the first time cannot be made ready.
        NotFoundError: there is no model of that name.
        InputError: the model has no GGUF form.
    """
    folder, make = served_form(store, name, project=project)
    if make is not None:
        make()
    return folder


def served_form(store: Store, name: str, *, project: str | None = None) -> tuple[Path, Callable[[], object] | None]:
    """Return the folder of :func:`served_folder`, and what makes it where a checkpoint's is not there yet.

    Raises:
        NotFoundError: there is no model of that name.
        InputError: the model has no GGUF form.
    """
    if name.startswith("ft:"):
        owner = owner_of(store, project, name) if project is not None else None
        if is_checkpoint(name):
            checkpoint = checkpoint_named(store, owner, name)
            folder = served_place(store, checkpoint)
            return folder, None if folder.is_dir() else partial(checkpoint_folder, store, checkpoint)
        model = store.models.get(name, project=owner)
        if SERVED_FORM not in model.artifacts:
            raise InputError(f"The model {model.name!r} is a {model.product} and writes no answers: it is not served.")
        return store.models.artifact_folder(model.artifacts[SERVED_FORM]), None
    info = decoder(store, name)
    folder = _base_gguf_folder(store, info)
    if not (folder / GGUF_FILE).is_file():
        raise InputError(
            f"The base model {name!r} ({info.architecture}) has no GGUF form, so it cannot be served here."
        )
    return folder, None


def export(store: Store, name: str, form: ExportFormat, destination: Path) -> Artifact:
    """Copy one form of a tuned model to an empty or new folder; a GGUF form that is not served is made now.

    Raises:
        NotFoundError: there is no such model.
        ConflictError: the destination holds something already.
        IntegrityError: the stored files are not the recorded ones.
    """
    model = store.models.get(name)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConflictError(f"{destination} exists and is not an empty folder.", hint="choose another --to")
    if form not in model.artifacts:
        model = _add_form(store, model, form)
    artifact = model.artifacts[form]
    folder = store.models.artifact_folder(artifact, check=True)
    try:
        shutil.copytree(folder, destination, dirs_exist_ok=True)
    except OSError as error:
        raise CapacityError(f"{destination} could not be written: {error}") from error
    return artifact


def make_gguf(store: Store, name: str, form: GgufForm, merged: Path) -> Artifact:
    """Make a GGUF form of a tuned model from its merged folder."""
    from luthier.compress.engine.gguf import write_gguf

    def fill(folder: Path) -> None:
        write_gguf(merged, folder / GGUF_FILE, QUANTIZATIONS[form], name)
        _copy_chat_format(merged, folder)

    return store.models.add_artifact(name, form, fill)


def _add_form(store: Store, model: TunedModel, form: ExportFormat) -> TunedModel:
    if form == "adapter" or form == "merged" or model.product != "generator":
        raise InputError(
            f"{model.name} has no form {form!r}; it has {', '.join(model.artifacts)}.",
            hint=f"luthier model export {model.name} --form merged --to FOLDER",
        )
    merged = store.models.artifact_folder(model.artifacts["merged"])
    artifact = make_gguf(store, model.name, form, merged)
    updated = model.model_copy(update={"artifacts": {**model.artifacts, form: artifact}})
    store.models.update(updated)
    return updated


def _convert(folder: Path, say: OnStage) -> None:
    gguf_files = sorted(folder.glob("*.gguf"))
    if any(folder.glob("*.safetensors")) or not gguf_files:
        return
    say(f"Converting {gguf_files[0].name} to safetensors (once)")
    try:
        from luthier.llm.engine.convert import convert_gguf
    except ImportError as error:
        raise MissingDependencyError("Converting a model needs torch.", hint="pip install 'luthier[local]'") from error
    convert_gguf(gguf_files[0])


def _describe(entry: CatalogueEntry, key: str, folder: Path) -> BaseModelInfo:
    config = read_config(folder)
    kind = kind_of(config)
    licence = entry.licence if entry.licence != "unknown" else _licence_of_card(folder)
    hashes = {name: sha for name, sha in file_hashes(folder).items() if name.endswith((".safetensors", ".json"))}
    return BaseModelInfo(
        id=entry.id,
        source=entry.source,
        licence=licence,
        restriction=entry.restriction or restriction_of(licence),
        architecture=(config.get("architectures") or ["unknown"])[0],
        kind=kind,
        parameters=entry.parameters or _count_parameters(folder),
        context_length=context_length(config) or entry.context_length,
        chat_format=entry.chat_format if kind == "decoder" else NO_CHAT_FORMAT,
        sha256=content_hash(hashes),
        folder=key,
        pulled_at=datetime.now(UTC),
    )


def _licence_of_card(folder: Path) -> str:
    card = folder / "README.md"
    match = (
        re.search(r"^license:\s*([\w.-]+)", card.read_text("utf-8")[:4000], re.MULTILINE) if card.is_file() else None
    )
    return match.group(1) if match else "unknown"


def _count_parameters(folder: Path) -> int:
    """Count the numbers in all weight files, by the files' headers alone."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                total += size
    return total


def _base_gguf_folder(store: Store, info: BaseModelInfo) -> Path:
    return store.artifacts.path(f"bases/{folder_name(info.id)}/{SERVED_FORM}")


def _base_gguf(store: Store, info: BaseModelInfo) -> None:
    """Make a base model's GGUF form; a model that has none stays usable for training and export."""
    from luthier.compress.engine.gguf import write_gguf

    if _base_gguf_folder(store, info).exists():
        store.artifacts.remove(f"bases/{folder_name(info.id)}/{SERVED_FORM}")
    source = store.artifacts.path(info.folder)
    try:
        with store.artifacts.new(f"bases/{folder_name(info.id)}/{SERVED_FORM}") as folder:
            write_gguf(source, folder / GGUF_FILE, QUANTIZATIONS[SERVED_FORM], info.id)
            _copy_chat_format(source, folder)
    except CapacityError:
        raise
    except LuthierError:
        return


def _copy_chat_format(source: Path, destination: Path) -> None:
    from luthier.llm.engine.torch_model import copy_tokenizer

    copy_tokenizer(source, destination)
