"""The process that makes a checkpoint ready for serving: merges its adapter into the base, and writes GGUF.

``python -m luthier.workflows.checkpoint_form --home HOME --project PROJECT --id ID``. It is a process of its own
because it needs torch and a whole model in memory, which a server should not hold.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory

from luthier.errors import ConflictError
from luthier.records.fine_tuning import Checkpoint
from luthier.store.artifacts import STAGING
from luthier.store.store import Store
from luthier.workflows.models import SERVED_FORM, make_gguf


def make_served(store: Store, checkpoint: Checkpoint) -> None:
    """Make the served form of a checkpoint; one that is there already is kept.

    Raises:
        IntegrityError: the adapter on disk is not the recorded one.
    """
    base = store.models.base_folder(store.models.base(checkpoint.base))
    adapter = store.models.artifact_folder(checkpoint.adapter, check=True)
    from luthier.llm.engine.merging import save_merged

    with TemporaryDirectory(dir=store.artifacts.root / STAGING) as merged:
        save_merged(base, adapter, Path(merged))
        with contextlib.suppress(ConflictError):  # another server made it meanwhile
            make_gguf(store, checkpoint.model, SERVED_FORM, Path(merged))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m luthier.workflows.checkpoint_form", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--id", required=True)
    arguments = parser.parse_args()
    store = Store(arguments.home)
    make_served(store, store.checkpoints.get(arguments.project, arguments.id))


if __name__ == "__main__":
    main()
