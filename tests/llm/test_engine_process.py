from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest

from luthier.compress.engine.gguf import write_gguf
from luthier.errors import EngineError, NotFoundError
from luthier.llm.engine_interface import TokenDelta
from luthier.llm.engine_process import WORKER_MODULE, EngineOptions, EngineProcess
from luthier.records.base_model import EnginePrecision
from luthier.records.completion import Constraint, Sampling
from luthier.templates.chat_format import ChatFormat

LONG = Sampling(max_tokens=1500)
EXACT = EngineOptions(precision="float32")  # in bfloat16 a random model's near ties depend on the batch
AUDIT_HOOK = """
import os, sys
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
def watch(event, arguments):
    if event in NETWORK:
        record(f"{event} {arguments!r}")
        raise PermissionError(event)
    if event == "open" and "openvino_telemetry" in str(arguments[0]):
        record(f"{event} {arguments!r}")
def record(line):
    descriptor = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode() + b"\\n")
    os.close(descriptor)
record("watching")
sys.addaudithook(watch)
"""


def prompt(folder: Path, text: str = "hello") -> list[int]:
    return ChatFormat.load(folder).encode(text)


async def collect(
    engine: EngineProcess, tokens: list[int], sampling: Sampling, stop: tuple[int, ...] = ()
) -> list[int]:
    return [token async for delta in engine.generate(tokens, sampling, ()) for token in delta.tokens]


async def gone(pid: int) -> bool:
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        await asyncio.sleep(0.05)
    return False


class RawWorker:
    """A worker spoken to in its own protocol."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", WORKER_MODULE, "--model", str(folder), "--fd", str(theirs.fileno()), *arguments],
                pass_fds=(theirs.fileno(),),
            )
        self.lines = self.socket.makefile("rb")

    def send(self, **message: Any) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def generate(self, request: int, tokens: list[int], max_tokens: int, grammar: str | None = None) -> None:
        constraint = grammar and Constraint(grammar=grammar)
        sampling = Sampling(max_tokens=max_tokens, constraint=constraint or None).model_dump()
        self.send(op="generate", id=request, tokens=tokens, sampling=sampling, stop_tokens=[])

    def receive(self) -> dict[str, Any]:
        return json.loads(self.lines.readline())

    def close(self) -> None:
        self.lines.close()
        self.socket.close()
        self.process.wait(30)


@pytest.fixture
def raw_worker(served_tiny_model: Path) -> Iterator[RawWorker]:
    worker = RawWorker(served_tiny_model)
    assert worker.receive()["op"] == "ready"
    yield worker
    worker.close()


def test_an_answer_ends_with_a_finish_reason_and_has_a_logprob_per_token(served_tiny_model: Path) -> None:
    async def scenario() -> list[TokenDelta]:
        engine = await EngineProcess.start(served_tiny_model)
        deltas = [d async for d in engine.generate(prompt(served_tiny_model), Sampling(max_tokens=7), ())]
        await engine.close()
        return deltas

    deltas = asyncio.run(scenario())
    assert sum(len(delta.tokens) for delta in deltas) == 7
    assert all(len(delta.tokens) == len(delta.logprobs) for delta in deltas)
    assert all(logprob < 0 for delta in deltas for logprob in delta.logprobs)
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]


def test_a_stop_token_ends_the_answer_and_is_part_of_it(served_tiny_model: Path) -> None:
    async def scenario() -> tuple[list[int], list[TokenDelta]]:
        engine = await EngineProcess.start(served_tiny_model, EXACT)
        free = await collect(engine, prompt(served_tiny_model), Sampling(max_tokens=6))
        deltas = [d async for d in engine.generate(prompt(served_tiny_model), LONG, (free[3],))]
        await engine.close()
        return free, deltas

    free, deltas = asyncio.run(scenario())
    assert [token for delta in deltas for token in delta.tokens] == free[: free.index(free[3]) + 1]
    assert deltas[-1].finish_reason == "stop"


def test_greedy_is_repeatable_and_seeds_decide_samples(served_tiny_model: Path) -> None:
    async def scenario() -> list[list[int]]:
        engine = await EngineProcess.start(served_tiny_model, EXACT)
        sample = Sampling(max_tokens=12, temperature=1.0)
        samplings = [Sampling(max_tokens=12)] * 2
        samplings += [sample.model_copy(update={"seed": seed}) for seed in (7, 7, 8, None, None)]
        tokens = prompt(served_tiny_model)
        answers = await asyncio.gather(*(collect(engine, tokens, sampling) for sampling in samplings))
        await engine.close()
        return list(answers)

    greedy, again, seven, seven_again, eight, free, other = asyncio.run(scenario())
    assert greedy == again
    assert seven == seven_again
    assert len({tuple(answer) for answer in (seven, eight, free, other)}) == 4


def test_prompts_that_share_a_prefix_are_answered_as_if_asked_alone(served_tiny_model: Path) -> None:
    async def scenario() -> tuple[list[list[int]], list[list[int]]]:
        shared = prompt(served_tiny_model, "the quick brown fox jumps over the lazy dog " * 20)
        prompts = [[*shared, *prompt(served_tiny_model, f"number {index}")] for index in range(12)]
        sampling = Sampling(max_tokens=2)
        engine = await EngineProcess.start(served_tiny_model, EXACT)
        together = await asyncio.gather(*(collect(engine, tokens, sampling) for tokens in prompts))
        alone = [await collect(engine, tokens, sampling) for tokens in prompts]
        await engine.close()
        return list(together), alone

    together, alone = asyncio.run(scenario())
    assert together == alone


def test_closing_the_iterator_cancels_and_the_engine_goes_on(served_tiny_model: Path) -> None:
    async def scenario() -> None:
        engine = await EngineProcess.start(served_tiny_model)
        async with aclosing(engine.generate(prompt(served_tiny_model), LONG, ())) as deltas:
            async for _ in deltas:
                break
        assert engine.in_flight == 0
        assert len(await collect(engine, prompt(served_tiny_model), LONG)) == LONG.max_tokens
        assert engine.generated_tokens < 1.5 * LONG.max_tokens
        await engine.close()

    asyncio.run(scenario())


def test_a_cancelled_request_makes_no_more_tokens(raw_worker: RawWorker, served_tiny_model: Path) -> None:
    tokens = prompt(served_tiny_model)
    raw_worker.generate(1, tokens, 1500)
    assert raw_worker.receive()["deltas"][0][0] == 1
    raw_worker.send(op="cancel", id=1)
    raw_worker.generate(2, tokens, 40)
    seen: list[list[int]] = []
    while not seen or seen[-1] != [2, "length"]:
        seen += [[delta[0], delta[3]] for delta in raw_worker.receive()["deltas"]]
    started = seen.index([2, None])
    assert {request for request, _ in seen[started:]} == {2}


def test_a_waiting_request_can_be_cancelled(raw_worker: RawWorker, served_tiny_model: Path) -> None:
    shared = prompt(served_tiny_model, "the lazy dog " * 100)
    raw_worker.generate(1, shared, 5)
    raw_worker.generate(2, shared, 5)
    raw_worker.send(op="cancel", id=2)
    raw_worker.generate(3, [*shared, 5], 5)
    finished: list[int] = []
    while 3 not in finished:
        finished += [delta[0] for delta in raw_worker.receive()["deltas"] if delta[3]]
    assert finished == [1, 3]


def test_an_engine_that_is_asked_for_ever_new_grammars_forgets_old_ones(served_tiny_model: Path) -> None:
    worker = RawWorker(served_tiny_model, "--grammar-bytes", "0")  # one at a time
    assert worker.receive()["op"] == "ready"
    tokens = prompt(served_tiny_model)
    worker.generate(0, tokens, 300)  # under way while a second grammar waits
    for request, letter in enumerate("aabb", 1):
        worker.generate(request, tokens, 20, f'root ::= "{letter}" "{letter}"')
    answers: dict[int, list[int]] = {}
    ends: list[int | str] = []
    while len(ends) < 6:
        message = worker.receive()
        ends += ["reopened"] if message["op"] == "reopened" else []
        for request, made, _, reason in message.get("deltas", ()):
            answers.setdefault(request, []).extend(made)
            ends += [request] if reason else []
    worker.close()
    assert ends.index("reopened") == 3
    assert set(ends[:3]) == {0, 1, 2}
    decode = ChatFormat.load(served_tiny_model).decode
    assert [decode(answers[request]) for request in range(1, 5)] == ["aa", "aa", "bb", "bb"]
    assert len(answers[0]) == 300


def test_the_worker_ends_when_its_socket_closes_even_in_the_middle_of_an_answer(
    raw_worker: RawWorker, served_tiny_model: Path
) -> None:
    raw_worker.generate(1, prompt(served_tiny_model), 1500)
    raw_worker.receive()
    raw_worker.close()
    assert raw_worker.process.returncode == 0


@pytest.mark.parametrize("half", [b'{"op": "gen', b"\xff\xfe"], ids=["half a line", "no text"])
def test_the_worker_ends_when_its_parent_dies_in_the_middle_of_a_line(raw_worker: RawWorker, half: bytes) -> None:
    raw_worker.socket.sendall(half)
    raw_worker.close()
    assert raw_worker.process.returncode == 0


def test_a_killed_engine_fails_its_answers_and_is_not_alive(served_tiny_model: Path) -> None:
    async def scenario() -> None:
        engine = await EngineProcess.start(served_tiny_model)
        answers = [asyncio.create_task(collect(engine, prompt(served_tiny_model), LONG)) for _ in range(3)]
        while not any(queue.qsize() for queue in engine._answers.values()):
            await asyncio.sleep(0.01)
        os.kill(engine.pid, signal.SIGKILL)
        for error in await asyncio.gather(*answers, return_exceptions=True):
            assert isinstance(error, EngineError)
            assert "died (signal 9)" in str(error)
        assert not engine.alive
        with pytest.raises(EngineError, match="died"):
            await collect(engine, prompt(served_tiny_model), LONG)
        await engine.close()

    asyncio.run(scenario())


def test_closing_fails_the_answers_in_flight_and_leaves_no_process(served_tiny_model: Path) -> None:
    async def scenario() -> None:
        engine = await EngineProcess.start(served_tiny_model)
        answer = asyncio.create_task(collect(engine, prompt(served_tiny_model), LONG))
        while not engine.in_flight:
            await asyncio.sleep(0.01)
        await engine.close()
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await answer
        assert not psutil.pid_exists(engine.pid)

    asyncio.run(scenario())


def test_a_broken_model_is_an_error_with_the_engines_own_words(served_tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(served_tiny_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineError, match="died while loading") as caught:
        asyncio.run(EngineProcess.start(tmp_path))
    assert caught.value.problems


def test_a_folder_without_weights_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"model\.gguf"):
        asyncio.run(EngineProcess.start(tmp_path))


def test_what_meets_weights_of_integers_is_rounded_only_where_that_is_asked_for(
    tiny_base: Path, served_tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(served_tiny_model, tmp_path / "eight"))
    write_gguf(tiny_base, folder / "new.gguf", "q8_0", name="tiny")
    (folder / "new.gguf").replace(folder / "model.gguf")
    auto, float32, _, int8 = (
        asyncio.run(_logprobs(folder, EngineOptions(precision=precision))) for precision in get_args(EnginePrecision)
    )
    assert auto == float32
    assert int8 != float32
    assert int8 == pytest.approx(float32, abs=0.2)


async def _logprobs(folder: Path, options: EngineOptions) -> list[float]:
    engine = await EngineProcess.start(folder, options)
    try:
        sampling = Sampling(max_tokens=1)
        texts = ("hello", "how are you", "one two three four five six")
        return [
            logprob
            for text in texts
            async for delta in engine.generate(prompt(folder, text), sampling, ())
            for logprob in delta.logprobs
        ]
    finally:
        await engine.close()


def test_an_engine_that_is_not_ready_in_time_is_killed(served_tiny_model: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(EngineError, match="not ready within"):
        asyncio.run(EngineProcess.start(served_tiny_model, ready_deadline_seconds=0.01))
    assert {child.pid for child in psutil.Process().children()} <= before


def test_no_engine_outlives_a_killed_parent(served_tiny_model: Path) -> None:
    code = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom luthier.llm.engine_process import EngineProcess\n"
        "async def main():\n    engine = await EngineProcess.start(Path(sys.argv[1]))\n"
        "    print(engine.pid, flush=True)\n    await asyncio.sleep(600)\nasyncio.run(main())"
    )
    command = [sys.executable, "-c", code, str(served_tiny_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine_pid = int(parent.stdout.readline())
        assert psutil.pid_exists(engine_pid)
        parent.kill()
    assert asyncio.run(gone(engine_pid))


def test_an_engine_sends_nothing_and_never_loads_telemetry(
    served_tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AUDIT_HOOK, "utf-8")
    log = tmp_path / "audit.log"
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("AUDIT_LOG", str(log))
    monkeypatch.setenv("HOME", str(home))

    async def scenario() -> None:
        engine = await EngineProcess.start(served_tiny_model)
        await collect(engine, prompt(served_tiny_model), Sampling(max_tokens=5))
        assert psutil.Process(engine.pid).net_connections(kind="inet") == []
        await engine.close()

    asyncio.run(scenario())
    assert log.read_text("utf-8").splitlines() == ["watching"]
    assert not (home / "intel").exists()
