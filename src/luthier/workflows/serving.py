"""Serving: the models of a home behind one endpoint, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import EngineError, InputError, LuthierError, NotFoundError
from luthier.llm.engine_interface import Engine
from luthier.llm.engine_process import EngineOptions, EngineProcess
from luthier.llm.engine_servers import ADAPTERS_FLAG, EngineServers, Servable
from luthier.records.base_model import BaseModelInfo
from luthier.records.model import Artifact
from luthier.serve.deadline import RequestLimits
from luthier.serve.pool import MAX_LOADED, ModelPool, Resolved, ServedModelInfo
from luthier.settings import Settings
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat
from luthier.workflows.checkpoints import checkpoint_named, is_checkpoint
from luthier.workflows.models import GGUF_FILE, SERVED_FORM, decoder, encoder_folder, model_named, served_form
from luthier.workflows.sharing import models_shared_with, owner_of

STOP_SECONDS = 15.0
HERE = "openvino"
MAX_LOADED_REMOTE = 32  # most are adapters, a few megabytes each


def model_pool(
    store: Store,
    extra: Mapping[str, Path] | None = None,
    *,
    only_extra: bool = False,
    stand_ins: Mapping[str, str] | None = None,
    settings: Settings | None = None,
) -> ModelPool:
    """Return a pool of all models that can be served, loaded on first use.

    Args:
        store: Where the models are.
        extra: Further models: name → folder with ``model.gguf`` and its chat format.
        only_extra: Leave the store's own models out.
        stand_ins: Patterns of names that a client may ask for (``gpt-4o-mini*``) → the base that answers.
        settings: What runs the store's models, and how much memory it may take; None takes engines of this machine.
            The further models always run here.

    Raises:
        InputError: a folder of ``extra`` has not what serving needs.
    """
    folders = dict(extra or {})
    _check_extra(folders)
    servers = EngineServers(settings.engine, settings.engine_api_key) if settings and settings.engine != HERE else None
    servables: dict[Path, Servable] = {}

    def resolve(project: str, name: str) -> Resolved:
        if name in folders:
            return Resolved(name, folders[name])
        if only_extra:
            raise NotFoundError(f"The model {name!r} does not exist.")
        known = model_named(store, project, name, stand_ins)
        if servers is None or servers.takes_gguf:
            folder, make = served_form(store, known, project=project)
            found = Resolved(known, folder, make)
            servable = Servable(known, folder, (known,), gguf=folder / GGUF_FILE)
        else:
            found, servable = _servable(store, known, project, adapters=servers.takes_adapters)
        servables[found.folder] = servable
        return found

    def resolve_encoder(project: str, name: str) -> Resolved:
        if name in folders:
            raise InputError(f"The model {name!r} writes answers; vectors of texts come from an encoder.")
        if only_extra:
            raise NotFoundError(f"The model {name!r} does not exist.")
        known = model_named(store, project, name, stand_ins)
        return Resolved(known, encoder_folder(store, known, project=project))

    async def start(folder: Path, options: EngineOptions) -> Engine:
        if servers is None or folder not in servables:
            return await EngineProcess.start(folder, options)
        return await servers.start(servables[folder])

    def names(project: str) -> list[ServedModelInfo]:
        listed = [ServedModelInfo(name, created=0, owned_by="extra") for name in folders]
        return listed if only_extra else listed + _models_of(store, project)

    usual = MAX_LOADED if servers is None else MAX_LOADED_REMOTE
    return ModelPool(
        resolve,
        names,
        resolve_encoder=resolve_encoder,
        start=start,
        max_loaded=(settings and settings.max_loaded) or usual,
        memory_bytes=settings.engine_memory if settings else None,
        options=EngineOptions(precision=settings.engine_precision) if settings else None,
        limits=RequestLimits(settings.max_requests, settings.request_seconds) if settings else None,
    )


def missing_stand_ins(store: Store, stand_ins: Mapping[str, str]) -> list[str]:
    """Return a line for every pattern of ``LUTHIER_STAND_INS`` whose model is not in the store, with what mends it."""
    here = {base.id for base in store.models.bases()} | {model.name for model in store.models.all()}
    return [
        f"LUTHIER_STAND_INS lets {name!r} answer for {pattern!r}, but {name!r} is not here, so such requests fail. "
        + ("See luthier model list" if name.startswith("ft:") else f"Fetch it: luthier model pull {name}")
        for pattern, name in stand_ins.items()
        if name not in here
    ]


def _check_extra(folders: Mapping[str, Path]) -> None:
    """Refuse folders without weights in GGUF, or without a chat format that can be read."""
    problems = []
    for name, folder in folders.items():
        if not (folder / GGUF_FILE).is_file():
            problems.append(
                f"{name}: {folder} has no {GGUF_FILE}" if folder.is_dir() else f"{name}: no folder {folder}"
            )
            continue
        try:
            ChatFormat.load(folder)
        except LuthierError as error:
            problems.append(f"{name}: {error.message}")
    if problems:
        raise InputError(
            f"A further model needs a folder with {GGUF_FILE} and its chat format (tokenizer.json and so on).",
            problems=problems,
            hint="luthier model export MODEL --form gguf-f16 --to FOLDER makes one",
        )


def _servable(store: Store, name: str, project: str, *, adapters: bool) -> tuple[Resolved, Servable]:
    """Return where a model is, and what a server of safetensors needs to run it.

    Raises:
        NotFoundError: the project has no model of that name.
        InputError: the model writes no answers, or cannot be had without loading adapters.
    """
    if not name.startswith("ft:"):
        base = decoder(store, name)
        folder = store.models.base_folder(base)
        return Resolved(name, folder), Servable(name, folder, _names_of(base))
    owner = owner_of(store, project, name)
    if is_checkpoint(name):
        checkpoint = checkpoint_named(store, owner, name)
        if not adapters:
            raise InputError(f"The checkpoint {name!r} is an adapter, and the server loads none ({ADAPTERS_FLAG}).")
        return _adapted(store, name, checkpoint.base, checkpoint.adapter)
    model = store.models.get(name, project=owner)
    if model.product != "generator":
        raise InputError(f"The model {model.name!r} is a {model.product} and writes no answers: it is not served.")
    if adapters and "adapter" in model.artifacts:
        return _adapted(store, model.name, model.base, model.artifacts["adapter"])
    merged = store.models.artifact_folder(model.artifacts["merged"])
    return Resolved(model.name, merged), Servable(model.name, merged, (model.name,))


def _adapted(store: Store, name: str, base_id: str, artifact: Artifact) -> tuple[Resolved, Servable]:
    base = decoder(store, base_id)
    weights, adapter = store.models.base_folder(base), store.models.artifact_folder(artifact)
    found = Resolved(name, adapter, chat_folder=weights)  # a tuned model has the chat format of its base
    return found, Servable(name, weights, _names_of(base), adapter=adapter)


def _names_of(base: BaseModelInfo) -> tuple[str, ...]:
    return base.id, base.source.removeprefix("hub:")


def _models_of(store: Store, project: str) -> list[ServedModelInfo]:
    """Return the bases, the project's tuned models and checkpoints, those shared with it, and its aliases."""
    tuned = {model.name: model for model in store.models.all(project=project) if SERVED_FORM in model.artifacts}
    return [
        *(ServedModelInfo(base.id, int(base.pulled_at.timestamp()), owned_by="base") for base in store.models.bases()),
        *(
            ServedModelInfo(name, int(model.created_at.timestamp()), owned_by=name.split(":")[2], root=model.base)
            for name, model in tuned.items()
        ),
        *(
            ServedModelInfo(one.model, one.created_at, owned_by=one.model.split(":")[2], root=one.base)
            for one in store.checkpoints.all(project)
        ),
        *(
            ServedModelInfo(one.model, one.created_at, owned_by=one.owner, root=one.model.split(":")[1])
            for one in models_shared_with(store, project)
        ),
        *(
            ServedModelInfo(alias.name, int(alias.created_at), owned_by=project, root=alias.model)
            for alias in store.models.aliases(project)
        ),
    ]


@contextmanager
def server_process(home: Path, models: Mapping[str, Path]) -> Iterator[str]:
    """Run a server for some model folders in a process of its own; give its address, and stop it at the end.

    Raises:
        EngineError: it did not start.
    """
    command = [sys.executable, "-m", "luthier", "serve", "--port", "0", "--announce", "--only-extra"]
    for name, folder in models.items():
        command += ["--extra", f"{name}={folder}"]
    environment = {name: value for name, value in os.environ.items() if name != "LUTHIER_API_KEY"}
    pipe = subprocess.PIPE  # the server ends when its standard input does, however this process ends
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise EngineError(f"The server did not start (exit status {process.wait()}).", hint="see the run's log")
            yield str(json.loads(line)["url"])
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
