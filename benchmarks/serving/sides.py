"""The three sides, each running in processes of its own: Luthier's server, the bare engine, llama.cpp's server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from luthier.records.base_model import EnginePrecision
from luthier.records.example import Message
from luthier.templates.chat_format import ChatFormat
from luthier.workflows.serving import server_process

HERE = Path(__file__).parent.parent
MODEL = "smollm2-135m"
Answers = dict[str, Any]


class Side(Protocol):
    """Something that answers questions."""

    def run(self, clients: int, requests: list[dict[str, Any]]) -> Answers:
        """Have so many clients ask; return what was seen."""
        ...

    @property
    def processes(self) -> dict[str, psutil.Process]:
        """Its processes by what they are."""
        ...


@dataclass
class Served:
    """A server that speaks OpenAI's API, and the folder for what the client is told."""

    url: str
    folder: Path
    pid: int
    engine: str = "engine"

    def run(self, clients: int, requests: list[dict[str, Any]]) -> Answers:
        """Have so many clients ask; return what was seen."""
        bodies = [_body(request) for request in requests]
        spec, result = self.folder / "spec.json", self.folder / "result.json"
        spec.write_text(json.dumps({"url": self.url, "clients": clients, "bodies": bodies}))
        command = [sys.executable, "-m", "serving.load", str(spec), str(result)]
        subprocess.run(command, check=True, env=environment())
        return json.loads(result.read_text())

    @property
    def processes(self) -> dict[str, psutil.Process]:
        """The server, and the engine's where that is another one."""
        server = psutil.Process(self.pid)
        children = server.children(recursive=True)
        return {"server": server} | ({self.engine: children[-1]} if children else {})


@dataclass
class Bare:
    """The pipeline in a process."""

    process: subprocess.Popen[str]
    folder: Path
    chat_format: ChatFormat

    def run(self, clients: int, requests: list[dict[str, Any]]) -> Answers:
        """Have so many requests in the pipeline; return what was seen."""
        stops = sorted(self.chat_format.stop_tokens)
        bodies = [
            {
                "tokens": self.chat_format.prompt_tokens([Message(role="user", content=request["question"])]),
                "max_tokens": request["max_tokens"],
                "stop_tokens": stops,
            }
            for request in requests
        ]
        spec, result = self.folder / "spec.json", self.folder / "result.json"
        spec.write_text(json.dumps({"clients": clients, "bodies": bodies}))
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"spec": str(spec), "result": str(result)}) + "\n")
        self.process.stdin.flush()
        line_of(self.process)
        return json.loads(result.read_text())

    @property
    def processes(self) -> dict[str, psutil.Process]:
        """The one process."""
        return {"engine": psutil.Process(self.process.pid)}


@contextmanager
def luthier(model: Path, home: Path, folder: Path, precision: EnginePrecision = "auto") -> Iterator[Served]:
    """Run our server."""
    before = set(psutil.Process().children())
    os.environ["LUTHIER_ENGINE_PRECISION"] = precision  # for the process that is started
    with server_process(home, {MODEL: model}) as url:
        (started,) = set(psutil.Process().children()) - before
        yield Served(url, folder, started.pid)


@contextmanager
def bare(model: Path, numbers: str, folder: Path) -> Iterator[Bare]:
    """Run the pipeline alone, with our numbers or the plugin's."""
    with _python("serving.bare", str(model), numbers) as process:
        line_of(process)
        yield Bare(process, folder, ChatFormat.load(model))


@contextmanager
def llama_cpp(model: Path, slots: int, folder: Path) -> Iterator[Served]:
    """Run llama.cpp's server."""
    with _python("serving.llama_cpp", str(model), str(slots)) as process:
        yield Served(str(json.loads(line_of(process))["url"]), folder, process.pid)


@contextmanager
def _python(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


def environment() -> dict[str, str]:
    """Return the environment of a process that imports the parts of this benchmark."""
    paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": paths}


def line_of(process: subprocess.Popen[str]) -> str:
    """Return the next JSON line of a process; what else libraries write there is passed over."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return line
    raise SystemExit(f"{process.args} ended with {process.wait()}")


def _body(request: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": request["question"]}],
        "temperature": 0,
        "max_tokens": request["max_tokens"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
