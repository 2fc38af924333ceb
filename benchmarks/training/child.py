"""One measured process: `python -m training.child SPEC.json`; the spec names the job and where its result goes."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    started = time.perf_counter()
    spec = json.loads(Path(sys.argv[1]).read_text())
    result = JOBS[spec["job"]](spec)
    result["seconds_whole"] = time.perf_counter() - started
    Path(spec["result"]).write_text(json.dumps(result))


def _prepare(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from luthier.llm.engine.torch_model import measure_machine
    from training.ours import has_fast_integers
    from training.workloads import prepare

    prepare(spec["workload"], Path(spec["home"]), spec["steps"], spec["size"], Path(spec["prepared"]))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    machine = measure_machine()
    said = {"threads": torch.get_num_threads(), "versions": versions, "has_fast_integers": has_fast_integers(machine)}
    return {**machine.model_dump(mode="json"), **said}


def _train(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    logging.disable(logging.WARNING)
    prepared = json.loads(Path(spec["prepared"]).read_text())
    folder = Path(spec["folder"])
    if spec["side"].startswith("ours"):
        from training.ours import run

        result = run(prepared, spec["steps"], spec["seed"], folder, by_default=spec["side"] == "ours_default")
    else:
        from training import trl_side

        result = trl_side.run(prepared, spec["steps"], spec["seed"], folder, spec["side"].removeprefix("trl_"))
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    result["peak_memory_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak
    return result


def _judge(spec: dict[str, Any]) -> dict[str, Any]:
    from training.neutral import held_out_losses

    return {"losses": held_out_losses(json.loads(Path(spec["prepared"]).read_text()), spec["adapters"])}


JOBS = {"prepare": _prepare, "train": _train, "judge": _judge}

if __name__ == "__main__":
    main()
