"""The store: everything that outlives a process, below one home folder."""

from __future__ import annotations

from pathlib import Path

from luthier.records.file import StoredFile
from luthier.records.fine_tuning import Checkpoint, CheckpointPermission, SharedModel
from luthier.records.response import StoredResponse
from luthier.records.stored_completion import StoredCompletion
from luthier.records.upload import Upload, UploadPart
from luthier.store.artifacts import Artifacts
from luthier.store.collection import Collection
from luthier.store.database import Database
from luthier.store.datasets import DatasetStore
from luthier.store.evals import EvalStore
from luthier.store.evaluations import EvaluationStore
from luthier.store.keys import KeyStore
from luthier.store.models import ModelStore
from luthier.store.outbox import Outbox
from luthier.store.runs import RunStore
from luthier.store.secret_key import SecretKey
from luthier.store.templates import TemplateStore


class Store:
    """The database and the artifacts of one home.

    Args:
        home: The folder that holds ``luthier.db`` and ``artifacts/``; made when missing.
    """

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.database = Database(f"sqlite:///{home / 'luthier.db'}")
        self.artifacts = Artifacts(home / "artifacts")
        self.datasets = DatasetStore(self.database, self.artifacts)
        self.templates = TemplateStore(self.database)
        self.models = ModelStore(self.database, self.artifacts)
        self.runs = RunStore(self.database)
        self.evaluations = EvaluationStore(self.database)
        self.evals = EvalStore(self.database)
        self.keys = KeyStore(self.database)
        self.secret_key = SecretKey(home / "secret.key")
        self.outbox = Outbox(self.database)
        self.files = Collection(self.database, "file", StoredFile)
        self.uploads = Collection(self.database, "upload", Upload)
        self.upload_parts = Collection(self.database, "upload part", UploadPart)
        self.checkpoints = Collection(self.database, "checkpoint", Checkpoint)
        self.permissions = Collection(self.database, "permission", CheckpointPermission)
        self.shared_models = Collection(self.database, "shared model", SharedModel)
        self.completions = Collection(self.database, "stored completion", StoredCompletion)
        self.responses = Collection(self.database, "response", StoredResponse)

    def run_folder(self, run_id: str) -> Path:
        """Return the folder of a run's own files (log, checkpoints, TensorBoard events); made when missing."""
        folder = self.home / "runs" / run_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def close(self) -> None:
        """Close the database."""
        self.database.close()
