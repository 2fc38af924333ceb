"""What the sandbox's process does: confine itself, run a grader's code, and answer with one line of JSON.

``main`` takes its walls as JSON in the first argument and the task as JSON on the standard input. Only then, confined,
does it touch anything of the user's. The answer goes to where the standard output was; what the code prints goes to
the standard error.
"""

from __future__ import annotations

import json
import linecache
import math
import os
import sys
import traceback
from typing import Any

from luthier.evaluate.sandbox.confinement import Walls, confine, die_with

NAME = "<grader>"
TRACEBACK_LETTERS = 2_000


def main() -> None:
    """Do one task."""
    setup = json.loads(sys.argv[1])
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        die_with(setup["parent"])
        confine(Walls(**setup["walls"]))
    except OSError as error:
        answer: dict[str, Any] = {"error": "unavailable", "message": str(error)}
    else:
        sys.path[:] = setup["path"]
        answer = _answer(json.loads(sys.stdin.buffer.read()))
    _write(answers, json.dumps(answer).encode())
    os._exit(0)  # nothing that the code has registered for the end


def _write(target: int, content: bytes) -> None:
    while content:
        content = content[os.write(target, content) :]


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"score": …}``, or which kind of ``error`` there was and a ``message``."""
    source: str = task["source"]
    linecache.cache[NAME] = (len(source), None, source.splitlines(keepends=True), NAME)
    namespace: dict[str, Any] = {"__name__": "grader"}
    try:
        exec(compile(source, NAME, "exec"), namespace)  # noqa: S102 - what the sandbox is for
    except BaseException:  # noqa: BLE001 - whatever the code raises is its answer
        return {"error": "source", "message": _traceback()}
    grade = namespace.get("grade")
    if not callable(grade):
        return {"error": "source", "message": "The source does not define grade(sample, item)."}
    if task["check_only"]:
        return {"score": 0.0}
    try:
        return _score(grade(task["sample"], task["item"]))
    except BaseException:  # noqa: BLE001 - whatever the code raises is its answer
        return {"error": "runtime", "message": _traceback()}


def _score(value: Any) -> dict[str, Any]:
    try:
        score = float(value)
    except (TypeError, ValueError):
        return {"error": "result", "message": f"grade returned a {type(value).__name__}, which is not a number."}
    if not math.isfinite(score):
        return {"error": "result", "message": f"grade returned {score}, which is not a finite number."}
    return {"score": score}


def _traceback() -> str:
    """Return the end of the traceback without this file's frames."""
    kind, error, place = sys.exc_info()
    while place is not None and place.tb_frame.f_code.co_filename != NAME:
        place = place.tb_next
    return "".join(traceback.format_exception(kind, error, place))[-TRACEBACK_LETTERS:].strip()
