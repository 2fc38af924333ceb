"""The engine alone: ``python -m serving.bare FOLDER ours|plugin`` runs openvino-genai's pipeline without any server.

Its weights and numbers are those of :mod:`luthier.llm.engine.openvino_worker`, or those that openvino chooses for the
file; the scheduler is the same. Lines on standard input name a spec and where the result goes, as :mod:`serving.load`
has them, but with ``tokens`` in the place of messages.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from luthier.llm.engine.openvino_worker import forbid_telemetry, generation_config, load_pipeline, open_pipeline
from luthier.llm.engine_process import EngineOptions
from luthier.records.completion import Sampling


def main() -> None:
    forbid_telemetry()
    path, options = Path(sys.argv[1]) / "model.gguf", EngineOptions()
    if sys.argv[2] == "ours":
        pipeline, _ = open_pipeline(path, options.cache_gigabytes, options.precision, options.threads)
    else:
        pipeline = load_pipeline(path, options.cache_gigabytes, {})
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        spec = json.loads(Path(order["spec"]).read_text())
        answers = load(pipeline, spec["clients"], spec["bodies"])
        Path(order["result"]).write_text(json.dumps({"answers": answers, "client_processor_seconds": 0.0}))
        print(json.dumps({"done": True}), flush=True)


def load(pipeline: Any, clients: int, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Have so many requests in the pipeline at all times, until all are done; return their times."""
    import numpy as np
    import openvino

    ready = [
        (
            openvino.Tensor(np.array([body["tokens"]], dtype=np.int64)),
            generation_config(_sampling(body["max_tokens"]), body["stop_tokens"]),
        )
        for body in bodies
    ]
    answers: list[dict[str, Any]] = []
    running: dict[int, tuple[Any, dict[str, Any]]] = {}
    added = 0
    while running or added < len(bodies):
        while len(running) < clients and added < len(bodies):
            answer = {"sent": time.perf_counter(), "pieces": [], "usage": None}
            running[added] = (pipeline.add_request(added, *ready[added]), answer)
            added += 1
        pipeline.step()
        now = time.perf_counter()
        for number, (handle, answer) in list(running.items()):
            if handle.can_read():
                new = sum(len(output.generated_ids) for output in handle.read().values())
                answer["pieces"] += [now] * new
            if handle.get_status().name != "RUNNING":
                del running[number]
                usage = {"prompt_tokens": len(bodies[number]["tokens"]), "completion_tokens": len(answer["pieces"])}
                answers.append(answer | {"ended": now, "usage": usage})
    return answers


def _sampling(max_tokens: int) -> dict[str, Any]:
    return Sampling(max_tokens=max_tokens, temperature=0, logprobs=None).model_dump(exclude={"stop"})


if __name__ == "__main__":
    main()
