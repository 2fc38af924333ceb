"""The registry: base models in the cache, and tuned models with all that reproduces them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from luthier.errors import NotFoundError, did_you_mean
from luthier.records.base_model import BaseModelInfo
from luthier.records.model import Alias, Artifact, ArtifactKind, TunedModel, folder_name
from luthier.store.artifacts import Artifacts, check_hashes, file_hashes, folder_bytes
from luthier.store.database import Database
from luthier.store.tables import aliases, base_models, models


class ModelStore:
    """Base and tuned models in the database and the artifact folder."""

    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self._database = database
        self._artifacts = artifacts

    def add_base(self, info: BaseModelInfo) -> None:
        """Record a base model whose files are in place; an earlier record of the same id is replaced."""
        row = {"id": info.id, "record": info.model_dump(mode="json")}
        with self._database.write() as connection:
            connection.execute(sa.delete(base_models).where(base_models.c.id == info.id))
            connection.execute(sa.insert(base_models).values(**row))

    def base(self, model_id: str) -> BaseModelInfo:
        """Return a base model that was pulled.

        Raises:
            NotFoundError: it was not.
        """
        known = {info.id: info for info in self.bases()}
        if model_id not in known:
            raise NotFoundError(
                f"The base model {model_id!r} is not here.{did_you_mean(model_id, known)}",
                hint=f"luthier model pull {model_id}",
            )
        return known[model_id]

    def bases(self) -> list[BaseModelInfo]:
        """Return all base models that were pulled."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(base_models.c.record).order_by(base_models.c.id)).scalars().all()
        return [BaseModelInfo.model_validate(row) for row in rows]

    def base_folder(self, info: BaseModelInfo) -> Path:
        """Return the folder of a base model's files."""
        return self._artifacts.path(info.folder)

    def add_artifact(self, name: str, kind: ArtifactKind, fill: Callable[[Path], None]) -> Artifact:
        """Make one form of a model: ``fill`` writes its files. A form that is there already is kept as it is."""
        key = f"models/{folder_name(name)}/{kind}"
        folder = self._artifacts.path(key)
        if not folder.exists():
            with self._artifacts.new(key) as staged:
                fill(staged)
        return Artifact(kind=kind, path=key, bytes=folder_bytes(folder), sha256=file_hashes(folder))

    def artifact_folder(self, artifact: Artifact, *, check: bool = False) -> Path:
        """Return the folder of a form; with ``check`` its files are held against their hashes first.

        Raises:
            IntegrityError: a file is missing or has changed.
        """
        folder = self._artifacts.path(artifact.path)
        if check:
            check_hashes(folder, artifact.sha256)
        return folder

    def add(self, model: TunedModel) -> None:
        """Enter a finished model into the registry; entering the same run's model again replaces it."""
        row = {"name": model.name, "run_id": model.run_id, "created_at": model.created_at.timestamp()}
        row |= {"project": model.project}
        with self._database.write() as connection:
            connection.execute(sa.delete(models).where(models.c.run_id == model.run_id))
            connection.execute(sa.insert(models).values(**row, record=model.model_dump(mode="json")))

    def update(self, model: TunedModel) -> None:
        """Replace a model's record, after a further form of it was exported."""
        change = sa.update(models).where(models.c.name == model.name).values(record=model.model_dump(mode="json"))
        with self._database.write() as connection:
            connection.execute(change)

    def get(self, name: str, *, project: str | None = None) -> TunedModel:
        """Return a tuned model by its ``ft:`` name, or by the id at its end where that is unique.

        ``project`` leaves out the models of others.

        Raises:
            NotFoundError: there is none.
        """
        known = {model.name: model for model in self.all(project=project)}
        if name in known:
            return known[name]
        ending = [model for model in known.values() if model.name.endswith(f":{name}")]
        if len(ending) == 1:
            return ending[0]
        raise NotFoundError(f"There is no tuned model {name!r}.{did_you_mean(name, known)}", hint="luthier model list")

    def all(self, *, project: str | None = None) -> list[TunedModel]:
        """Return all tuned models, or those of a project, the newest first."""
        query = sa.select(models.c.record).order_by(models.c.created_at.desc())
        if project is not None:
            query = query.where(models.c.project == project)
        with self._database.read() as connection:
            return [TunedModel.model_validate(record) for record in connection.execute(query).scalars()]

    def remove(self, name: str, *, project: str) -> TunedModel:
        """Delete a tuned model, its forms and its aliases, and return what it was.

        Raises:
            NotFoundError: the project has none of that name.
        """
        model = self.get(name, project=project)
        with self._database.write() as connection:
            connection.execute(sa.delete(models).where(models.c.name == model.name))
            mine = (aliases.c.project == project) & (aliases.c.model == model.name)
            connection.execute(sa.delete(aliases).where(mine))
        for artifact in model.artifacts.values():
            self._artifacts.remove(artifact.path)
        return model

    def set_alias(self, project: str, alias: str, name: str) -> None:
        """Point an alias at a model, from now on; it may have pointed elsewhere."""
        mine = (aliases.c.project == project) & (aliases.c.name == alias)
        row = {"project": project, "name": alias, "model": name, "created_at": time.time()}
        with self._database.write() as connection:
            connection.execute(sa.delete(aliases).where(mine))
            connection.execute(sa.insert(aliases).values(**row))

    def remove_alias(self, project: str, alias: str) -> None:
        """Delete an alias; the model that it points at stays.

        Raises:
            NotFoundError: the project has none of that name.
        """
        mine = (aliases.c.project == project) & (aliases.c.name == alias)
        with self._database.write() as connection:
            if connection.execute(sa.delete(aliases).where(mine)).rowcount == 0:
                raise NotFoundError(f"There is no alias {alias!r}.", hint="luthier model alias")

    def aliases(self, project: str) -> list[Alias]:
        """Return a project's aliases."""
        query = sa.select(aliases).where(aliases.c.project == project).order_by(aliases.c.name)
        with self._database.read() as connection:
            return [Alias.model_validate(dict(row)) for row in connection.execute(query).mappings()]
