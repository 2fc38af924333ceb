from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from luthier.store.store import Store
from luthier.workflows.models import pull

DEADLINE_SECONDS = 120
ROWS = [
    {"messages": [{"role": "user", "content": f"number {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
    for n in range(40)
]


class Up:
    """``luthier up`` in a process of its own."""

    def __init__(self, home: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "luthier", "up", "--port", "0", "--announce", *arguments]
        environment = {**os.environ, "LUTHIER_HOME": str(home)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.url = json.loads(line)["url"]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode


@pytest.fixture
def home(tmp_path: Path, tiny_base: Path) -> Path:
    store = Store(tmp_path / "home")
    pull(store, str(tiny_base))
    store.close()
    return tmp_path / "home"


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def up(*arguments: str) -> Up:
        started.append(Up(home, *arguments))
        return started[-1]

    yield up
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def until(look: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not look():
        assert time.monotonic() < end
        time.sleep(0.1)


def begin_job(client: openai.OpenAI, epochs: int) -> str:
    content = io.BytesIO("\n".join(map(json.dumps, ROWS)).encode())
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    options = {"n_epochs": epochs, "batch_size": 2}
    method = {"type": "supervised", "supervised": {"hyperparameters": options}}
    return client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id, method=method).id  # type: ignore[arg-type]


def trains(client: openai.OpenAI, job: str) -> bool:
    return any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job, limit=100).data)


def test_up_is_ready_answers_and_ends_without_orphans(start: Callable[..., Up]) -> None:
    up = start()
    assert httpx.get(f"{up.url}/ready").json() == {"status": "ready", "reasons": []}
    answer = up.client().chat.completions.create(
        model="tiny-base", messages=[{"role": "user", "content": "hello"}], max_tokens=2
    )
    assert answer.choices
    children = psutil.Process(up.process.pid).children(recursive=True)
    assert children
    assert up.stop() == 0
    assert not any(child.is_running() for child in children)


def test_a_run_that_is_under_way_at_the_end_goes_on_at_the_next_start(start: Callable[..., Up], home: Path) -> None:
    first = start()
    job = begin_job(first.client(), epochs=50)
    until(lambda: trains(first.client(), job))
    assert first.stop() == 0
    store = Store(home)
    (run,) = store.runs.all()
    assert (run.status, run.attempts, run.owner) == ("queued", 0, None)
    steps = max(event.data.get("step", 0) for event in store.runs.events(run.id, type="metrics"))
    second = start()
    client = second.client()
    until(lambda: client.fine_tuning.jobs.retrieve(job).status == "running")
    until(
        lambda: any(
            event.data["step"] > steps for event in store.runs.events(run.id, type="metrics") if "step" in event.data
        )
    )
    firsts = [event.data["step"] for event in store.runs.events(run.id, type="metrics") if "step" in event.data]
    assert firsts == sorted(firsts)  # no step was made twice
    client.fine_tuning.jobs.cancel(job)
    until(lambda: client.fine_tuning.jobs.retrieve(job).status == "cancelled")
    store.close()


def test_a_service_that_is_killed_with_all_its_processes_loses_nothing_that_it_had_acknowledged(
    start: Callable[..., Up],
) -> None:
    first = start()
    client = first.client()
    asked: dict[str, Any] = {"model": "tiny-base", "messages": [{"role": "user", "content": "hello"}], "store": True}
    (kept,) = {chunk.id for chunk in client.chat.completions.create(**asked, max_tokens=3, stream=True)}
    job = begin_job(client, epochs=12)
    until(lambda: trains(client, job))
    stream = client.chat.completions.create(**asked, max_tokens=1900, n=64, stream=True)  # one of so many is long
    next(iter(stream))
    processes = [psutil.Process(first.process.pid), *psutil.Process(first.process.pid).children(recursive=True)]
    for process in processes:  # a worker would outlive its server
        process.kill()
    first.process.communicate()
    with pytest.raises(openai.APIConnectionError):
        list(stream)
    client = start().client()
    assert [one.id for one in client.chat.completions.list()] == [kept]
    assert client.chat.completions.create(**asked, max_tokens=3).choices
    until(lambda: client.fine_tuning.jobs.retrieve(job).status in ("succeeded", "failed"))
    ended = client.fine_tuning.jobs.retrieve(job)
    assert ended.status == "succeeded", ended.error
    assert ended.fine_tuned_model in [model.id for model in client.models.list()]


def test_the_example_that_is_written_for_openai_runs_unchanged(
    start: Callable[..., Up], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_STAND_INS", "gpt-4o-mini*=tiny-base")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{start().url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    example = Path(__file__).parents[2] / "examples" / "openai_finetune.py"
    command = [sys.executable, str(example), "--examples", "200", "--test", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"gpt-4o-mini: \d+% of 3 right", before)
    assert re.fullmatch(r"ft:tiny-base:local:sentiment:\w+: \d+% of 3 right", after)
    refused = subprocess.run([*command[:2], "--test", "1800"], capture_output=True, text=True, check=False)
    assert "1800 rows: too few" in refused.stderr


def test_a_home_without_models_is_told_how_to_get_one(tmp_path: Path, home: Path) -> None:
    assert "There is no model yet: luthier model pull smollm2-135m" in shown_by_up(tmp_path / "empty")
    shown = shown_by_up(home)
    assert "  tiny-base\n" in shown
    assert "no model yet" not in shown


def shown_by_up(home: Path) -> str:
    """Return what ``luthier up`` prints up to its example for clients."""
    command = [sys.executable, "-m", "luthier", "up", "--port", "0"]
    environment = {**os.environ, "LUTHIER_HOME": str(home)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        lines = list(takewhile(str.strip, process.stdout))
        process.terminate()
    return "".join(lines)


def test_off_loopback_it_does_not_start_without_a_key(home: Path) -> None:
    command = [sys.executable, "-m", "luthier", "up", "--port", "0", "--host", "0.0.0.0", "--announce"]  # noqa: S104
    environment = {**os.environ, "LUTHIER_HOME": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no key" in done.stderr
    assert "luthier key create" in done.stderr
