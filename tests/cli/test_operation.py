from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from luthier.records.webhook import EVENT_TYPES
from luthier.store.store import Store
from luthier.workflows.webhooks import create_endpoint
from tests.api.receiver import Receiver

DEADLINE_SECONDS = 60
OTLP_PORT = 4318  # where OpenTelemetry's exporter sends by default
WORDS = "the purple elephant"
ASK = {"messages": [{"role": "user", "content": WORDS}], "temperature": 0}


class Service:
    """``luthier up`` or ``luthier serve`` in a process of its own, whose log goes into a file."""

    def __init__(self, home: Path, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "luthier", *arguments, "--port", "0", "--announce"]
        self.log = home.with_name("log.jsonl")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "LUTHIER_HOME": str(home), **environment},
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.url = json.loads(line)["url"]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text("utf-8").splitlines()]

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    started: list[Service] = []

    def begin(*arguments: str, **environment: str) -> Service:
        started.append(Service(tmp_path / "home", *arguments, **environment))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def extra(folder: Path) -> tuple[str, ...]:
    return ("serve", "--only-extra", "--extra", f"endless={folder}", "--log-format", "json", "--log-level", "info")


def test_a_stand_in_whose_model_is_not_here_is_told_at_the_start(start: Callable[..., Service]) -> None:
    service = start("up", "--log-format", "json", LUTHIER_STAND_INS="gpt-*=nope,o1=ft:nope:local::1")
    base, tuned = (line["message"] for line in service.lines() if line["level"] == "warning")
    assert base.startswith("LUTHIER_STAND_INS lets 'nope' answer for 'gpt-*', but 'nope' is not here")
    assert base.endswith("luthier model pull nope")
    assert tuned.endswith("luthier model list")
    assert httpx.get(f"{service.url}/health").status_code == 200


def test_a_stream_under_way_is_finished_at_the_end_and_the_log_tells_of_it(
    start: Callable[..., Service], endless_model: Path
) -> None:
    service = start(*extra(endless_model), "--grace", "60")
    children = psutil.Process(service.process.pid).children
    body = ASK | {"model": "endless", "max_tokens": 1500, "n": 8, "stream": True}
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        while "content" not in next(lines):
            pass
        engines = children()
        service.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert "data: [DONE]" in rest
    service.process.communicate(timeout=DEADLINE_SECONDS)
    assert service.process.returncode == 0
    assert engines
    assert not any(engine.is_running() for engine in engines)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.url}/health")
    (line,) = [line for line in service.lines() if line["message"] == "request"]
    assert (line["status"], line["model"], line["completion_tokens"]) == (200, "endless", 8 * 1500)
    assert "purple" not in service.log.read_text()


def test_a_stream_that_takes_too_long_is_broken_off_at_the_end(
    start: Callable[..., Service], endless_model: Path
) -> None:
    service = start(*extra(endless_model), "--grace", "0")
    body = ASK | {"model": "endless", "max_tokens": 1900, "n": 64, "stream": True}
    rest: list[str] = []
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        service.process.send_signal(signal.SIGTERM)
        with suppress(httpx.RemoteProtocolError):
            rest += lines
    assert "data: [DONE]" not in rest
    last = json.loads([line for line in rest if line][-1].removeprefix("data: "))
    assert last["error"]["code"] == "shutting_down"
    service.process.communicate(timeout=DEADLINE_SECONDS)
    assert service.process.returncode == 0
    told = [line["message"] for line in service.lines() if line["level"] in ("warning", "error")]
    assert "A stream was broken off: the server ends." in told
    assert "Traceback" not in service.log.read_text()


def test_nothing_is_sent_anywhere_unless_a_collector_is_named(
    start: Callable[..., Service], endless_model: Path
) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", OTLP_PORT)) == 0:
            pytest.skip("something else listens where traces go by default")
    with Receiver(port=OTLP_PORT) as collector:
        service = start(*extra(endless_model))
        ask = ASK | {"model": "endless", "max_tokens": 3}
        httpx.post(f"{service.url}/v1/chat/completions", json=ask, timeout=60).raise_for_status()
        process = psutil.Process(service.process.pid)
        ours = {connection.laddr.port for connection in process.net_connections() if connection.status == "LISTEN"}
        for one in (process, *process.children(recursive=True)):
            for connection in one.net_connections("inet"):
                assert connection.status == "LISTEN" or connection.laddr.port in ours, connection
        assert service.end() == 0
    assert collector.received == []


def test_a_webhook_that_was_under_way_when_the_service_was_killed_is_sent_again(
    start: Callable[..., Service], tmp_path: Path
) -> None:
    store = Store(tmp_path / "home")
    with Receiver() as receiver:
        receiver.hold.clear()
        create_endpoint(store, "default", "test", receiver.url, EVENT_TYPES)
        first = start("up")
        store.runs.add("train-1", "train", {})
        store.runs.request("train-1", "cancel")
        receiver.wait(1)
        first.end(signal.SIGKILL)
        receiver.hold.set()
        (delivery,) = store.outbox.deliveries.all("default")
        assert (delivery.status, delivery.attempts) == ("pending", 0)
        store.runs.add("train-2", "train", {})
        store.runs.request("train-2", "cancel")  # while nothing runs
        due = {"next_attempt_at": 0}  # as if the lease of the attempt had ended
        store.outbox.deliveries.change("default", delivery.id, lambda one: one.model_copy(update=due))
        start("up")
        received = receiver.wait(3)
    ids = [one.headers["webhook-id"] for one in received]
    assert ids.count(delivery.event) == 2
    end = time.monotonic() + DEADLINE_SECONDS
    while {one.status for one in store.outbox.deliveries.all("default")} != {"delivered"}:
        assert time.monotonic() < end
        time.sleep(0.05)
    store.close()
