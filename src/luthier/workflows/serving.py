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
from luthier.workflows.models import SERVED_FORM, served_folder

STOP_SECONDS = 15.0


def model_pool(store: Store, extra: Mapping[str, Path] | None = None, *, only_extra: bool = False) -> ModelPool:
    """Return a pool of all models that can be served, loaded on first use.

    Args:
        store: Where the models are.
        extra: Further models: name → folder with ``model.gguf`` and its chat format.
        only_extra: Leave the store's own models out.
    """
    folders = dict(extra or {})

    def resolve(name: str) -> Path:
        if name in folders or only_extra:
            return folders[name]
        return served_folder(store, name)

    def names() -> list[ServedModelInfo]:
        listed = [ServedModelInfo(name, created=0, owned_by="extra") for name in folders]
        if only_extra:
            return listed
        for base in store.models.bases():
            if base.kind == "encoder":
                continue
            created = int(base.pulled_at.timestamp())
            listed.append(ServedModelInfo(base.id, created, owned_by="base"))
        for model in store.models.all():
            if SERVED_FORM not in model.artifacts:
                continue
            created = int(model.created_at.timestamp())
            listed.append(ServedModelInfo(model.name, created, owned_by=model.name.split(":")[2], root=model.base))
        return listed

    return ModelPool(resolve, names)


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
