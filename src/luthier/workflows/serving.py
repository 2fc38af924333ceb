"""Serving: the models of a home behind one endpoint, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import EngineError
from luthier.serve.pool import ModelPool, ServedModelInfo
from luthier.store.store import Store
from luthier.workflows.models import SERVED_FORM, model_named, served_folder
from luthier.workflows.sharing import models_shared_with

STOP_SECONDS = 15.0


def model_pool(
    store: Store,
    extra: Mapping[str, Path] | None = None,
    *,
    only_extra: bool = False,
    stand_ins: Mapping[str, str] | None = None,
) -> ModelPool:
    """Return a pool of all models that can be served, loaded on first use.

    Args:
        store: Where the models are.
        extra: Further models: name → folder with ``model.gguf`` and its chat format.
        only_extra: Leave the store's own models out.
        stand_ins: Patterns of names that a client may ask for (``gpt-4o-mini*``) → the base that answers.
    """
    folders = dict(extra or {})

    def resolve(project: str, name: str) -> Path:
        if name in folders or only_extra:
            return folders[name]
        return served_folder(store, model_named(store, project, name, stand_ins), project=project)

    def names(project: str) -> list[ServedModelInfo]:
        listed = [ServedModelInfo(name, created=0, owned_by="extra") for name in folders]
        return listed if only_extra else listed + _models_of(store, project)

    return ModelPool(resolve, names)


def _models_of(store: Store, project: str) -> list[ServedModelInfo]:
    """Return the bases, the project's tuned models and checkpoints, those shared with it, and its aliases."""
    bases = [base for base in store.models.bases() if base.kind == "decoder"]
    tuned = {model.name: model for model in store.models.all(project=project) if SERVED_FORM in model.artifacts}
    return [
        *(ServedModelInfo(base.id, int(base.pulled_at.timestamp()), owned_by="base") for base in bases),
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
