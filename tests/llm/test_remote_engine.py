from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm_dialect import Dialect, Running, continuation

from luthier.errors import BusyError, EngineError, InputError
from luthier.llm.answer_stream import AnswerDelta, stream_answer
from luthier.llm.engine_interface import TokenDelta
from luthier.llm.engine_process import EngineOptions, EngineProcess
from luthier.llm.engine_servers import EngineServers, Servable
from luthier.llm.grammar.constraints import json_constraint
from luthier.llm.grammar.tool_calls import must_call
from luthier.llm.remote_engine import RemoteEngine, request_body
from luthier.records.completion import Sampling
from luthier.serve.api_error import ApiError
from luthier.serve.chat import prepare_chat
from luthier.serve.chat_request import ChatRequest
from luthier.serve.pool import ModelPool, Resolved
from luthier.templates.chat_format import ChatFormat
from luthier.templates.tool_formats import TOOL_FORMATS

BASE = "tiny-base"
PROMPT = [1, 40, 50, 60]
LONG = Sampling(max_tokens=1500)
COMMAND = f"{sys.executable} {Path(__file__).with_name('vllm_dialect.py')} --model {{folder}} --port {{port}}"
LLAMA_CPP = """
import signal, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.n_ctx, parameters.n_parallel = 2048, 2
server = xllamacpp.Server(parameters)
signal.pause()
"""


@pytest.fixture
def vllm(served_tiny_model: Path) -> Iterator[tuple[Dialect, Running]]:
    dialect = Dialect(served_tiny_model, BASE)
    running = Running(dialect)
    yield dialect, running
    running.close()


@pytest.fixture
def base(served_tiny_model: Path) -> Servable:
    return Servable(BASE, served_tiny_model, (BASE,), gguf=served_tiny_model / "model.gguf")


@pytest.fixture
def tuned(base: Servable, tmp_path: Path) -> Callable[[str], Servable]:
    def make(name: str) -> Servable:
        folder = tmp_path / name.replace(":", "-")
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        return replace(base, name=name, adapter=folder)

    return make


def run(servers: EngineServers, *models: Servable, then: Callable[..., Awaitable[Any]]) -> Any:
    """Start engines, run a scenario with them, and see that all servers are ended."""

    async def main() -> Any:
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        engines = [await servers.start(model) for model in models]
        try:
            return await then(*engines)
        finally:
            for engine in engines:
                await engine.close()
                await engine.close()
            assert not servers._servers
            assert {child.pid for child in psutil.Process().children(recursive=True)} <= before

    return asyncio.run(main())


async def collect(
    engine: RemoteEngine, sampling: Sampling, stop: tuple[int, ...] = (), prompt: list[int] | None = None
) -> list[TokenDelta]:
    return [delta async for delta in engine.generate(prompt or PROMPT, sampling, stop)]


def tokens_of(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_tokens_go_in_and_come_out_with_their_logprobs(vllm: tuple[Dialect, Running], base: Servable) -> None:
    async def scenario(engine: RemoteEngine) -> list[TokenDelta]:
        return await collect(engine, Sampling(max_tokens=7))

    deltas = run(EngineServers(vllm[1].url), base, then=scenario)
    assert tokens_of(deltas) == continuation(PROMPT, 7)
    assert [logprob for delta in deltas for logprob in delta.logprobs] == [-0.5] * 7
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]


def test_a_stop_token_ends_the_answer_and_is_part_of_it(vllm: tuple[Dialect, Running], base: Servable) -> None:
    expected = continuation(PROMPT, 5)

    async def scenario(engine: RemoteEngine) -> list[TokenDelta]:
        return await collect(engine, LONG, (expected[-1],))

    deltas = run(EngineServers(vllm[1].url), base, then=scenario)
    assert tokens_of(deltas) == expected[: expected.index(expected[-1]) + 1]
    assert deltas[-1].finish_reason == "stop"


def test_a_request_says_all_that_decides_the_answer(vllm: tuple[Dialect, Running], base: Servable) -> None:
    sampling = Sampling(max_tokens=2, temperature=0.7, top_p=0.9, seed=-1, frequency_penalty=0.1, presence_penalty=0.2)

    async def scenario(engine: RemoteEngine) -> None:
        await collect(engine, sampling, (2,))

    run(EngineServers(vllm[1].url), base, then=scenario)
    assert vllm[0].requests == [
        {
            "model": BASE,
            "prompt": PROMPT,
            "add_special_tokens": False,
            "max_tokens": 2,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.1,
            "presence_penalty": 0.2,
            "stop_token_ids": [2],
            "ignore_eos": False,
            "logprobs": 0,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "seed": 2**63 - 1,
        }
    ]


def test_a_server_is_asked_for_everything_that_vllm_has() -> None:
    every = Sampling(top_k=5, min_p=0.1, repetition_penalty=1.2, logit_bias={7: -2.0}, logprobs=3)
    body = request_body("m", PROMPT, every, ())
    expected = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "logit_bias": {"7": -2.0},
        "logprobs": 3,
        "return_tokens_as_token_ids": True,
    }
    assert {name: body[name] for name in expected} == expected
    assert "logprobs" not in request_body("m", PROMPT, Sampling(logprobs=None), ())


def test_what_an_answer_is_bound_to_is_given_as_vllm_takes_it() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    bound = Sampling(constraint=json_constraint(schema))
    assert request_body("m", PROMPT, bound, ())["structured_outputs"] == {"json": schema}
    calls = must_call(TOOL_FORMATS[0], [("f", schema)], several=False)
    body = request_body("m", PROMPT, Sampling(constraint=calls), ())
    assert body["structured_outputs"] == {"grammar": calls.grammar}
    assert "structured_outputs" not in request_body("m", PROMPT, Sampling(), ())


def test_alternatives_to_a_token_come_with_their_ids(vllm: tuple[Dialect, Running], base: Servable) -> None:
    async def scenario(engine: RemoteEngine) -> list[TokenDelta]:
        return await collect(engine, Sampling(max_tokens=3, logprobs=2))

    deltas = run(EngineServers(vllm[1].url), base, then=scenario)
    told = [one for delta in deltas for one in delta.alternatives]
    assert [next(iter(one)) for one in told] == tokens_of(deltas)
    assert all(len(one) == 2 for one in told)


def test_an_adapter_is_loaded_on_first_use_and_unloaded_at_the_end(
    vllm: tuple[Dialect, Running], base: Servable, tuned: Callable[[str], Servable]
) -> None:
    one, other = tuned("ft:tiny:local:one:1"), tuned("ft:tiny:local:other:2")

    async def scenario(*engines: RemoteEngine) -> list[list[int]]:
        return [tokens_of(await collect(engine, Sampling(max_tokens=5))) for engine in engines]

    answers = run(EngineServers(vllm[1].url), base, one, other, then=scenario)
    assert answers[0] == continuation(PROMPT, 5)
    assert answers[1] == continuation(PROMPT, 5, str(one.adapter))
    assert [request["model"] for request in vllm[0].requests] == [BASE, one.name, other.name]
    loads = [f"load {one.name}", f"load {other.name}"]
    assert vllm[0].calls == [*loads, f"unload {one.name}", f"unload {other.name}"]
    assert vllm[0].adapters == {}


def test_a_model_has_no_more_context_than_its_server(
    vllm: tuple[Dialect, Running], tuned: Callable[[str], Servable], served_tiny_model: Path
) -> None:
    vllm[0].max_model_len = 40
    servers, model = EngineServers(vllm[1].url), tuned("ft:tiny:local:one:1")

    async def scenario() -> None:
        pool = ModelPool(
            lambda *_: Resolved(model.name, served_tiny_model), lambda _: [], start=lambda *_: servers.start(model)
        )
        try:
            async with pool.lease(model.name) as loaded:
                chat = prepare_chat(asking("hello"), loaded)
                assert len(chat.prompt_tokens) + chat.samplings[0].max_tokens == 40
                with pytest.raises(ApiError, match="context is 40 tokens"):
                    prepare_chat(asking("hello " * 40), loaded)
        finally:
            await pool.close()

    def asking(text: str) -> ChatRequest:
        return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": text}]})

    asyncio.run(scenario())


def test_an_adapter_that_the_server_has_forgotten_is_loaded_again(
    vllm: tuple[Dialect, Running], tuned: Callable[[str], Servable]
) -> None:
    model = tuned("ft:tiny:local:one:1")

    async def scenario(engine: RemoteEngine) -> list[list[TokenDelta]]:
        vllm[0].adapters.clear()
        return list(await asyncio.gather(*(collect(engine, Sampling(max_tokens=3)) for _ in range(4))))

    answers = run(EngineServers(vllm[1].url), model, then=scenario)
    assert [tokens_of(answer) for answer in answers] == [continuation(PROMPT, 3, str(model.adapter))] * 4


def test_an_adapter_of_that_name_from_elsewhere_is_replaced(
    vllm: tuple[Dialect, Running], tuned: Callable[[str], Servable]
) -> None:
    model = tuned("ft:tiny:local:one:1")
    vllm[0].adapters[model.name] = "/elsewhere"

    async def scenario(engine: RemoteEngine) -> None:
        assert vllm[0].adapters == {model.name: str(model.adapter)}

    run(EngineServers(vllm[1].url), model, then=scenario)


def test_an_adapter_that_cannot_be_loaded_is_an_error_with_the_servers_words(
    vllm: tuple[Dialect, Running], tuned: Callable[[str], Servable], tmp_path: Path
) -> None:
    model = replace(tuned("ft:tiny:local:one:1"), adapter=tmp_path / "missing")
    with pytest.raises(EngineError, match="No adapter found"):
        asyncio.run(EngineServers(vllm[1].url).start(model))


def test_a_server_with_other_weights_is_refused(vllm: tuple[Dialect, Running], base: Servable, tmp_path: Path) -> None:
    other = replace(base, weights=tmp_path, weights_names=("another-base", "hub:a/b"))
    with pytest.raises(EngineError, match="tiny-base, and not another-base"):
        asyncio.run(EngineServers(vllm[1].url).start(other))


def test_closing_the_iterator_ends_the_answer_at_the_server(vllm: tuple[Dialect, Running], base: Servable) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        async with aclosing(engine.generate(PROMPT, LONG, ())) as deltas:
            async for _ in deltas:
                assert engine.in_flight == 1
                break
        assert engine.in_flight == 0
        task = asyncio.create_task(collect(engine, LONG))
        await until(lambda: vllm[0].running == 1 and vllm[0].aborted == 1)
        task.cancel()
        await until(lambda: vllm[0].aborted == 2)
        assert engine.in_flight == 0

    run(EngineServers(vllm[1].url), base, then=scenario)


def test_closing_the_engine_fails_the_answers_in_flight(vllm: tuple[Dialect, Running], base: Servable) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        answer = asyncio.create_task(collect(engine, LONG))
        await until(lambda: vllm[0].running == 1)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await answer
        with pytest.raises(EngineError, match="ended"):
            await collect(engine, LONG)

    run(EngineServers(vllm[1].url), base, then=scenario)


@pytest.mark.parametrize(("status", "error"), [(429, BusyError), (503, EngineError), (500, EngineError)])
def test_a_refusal_is_told_by_its_kind(
    vllm: tuple[Dialect, Running], base: Servable, status: int, error: type[Exception]
) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        vllm[0].refuse_with = status
        with pytest.raises(error, match=f"{status}: The server is busy"):
            await collect(engine, LONG)
        assert engine.alive
        assert engine.in_flight == 0

    run(EngineServers(vllm[1].url), base, then=scenario)


def test_a_failure_in_the_middle_of_a_stream_is_an_error(vllm: tuple[Dialect, Running], base: Servable) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        vllm[0].fail_in_stream = True
        with pytest.raises(EngineError, match="EngineCore died"):
            await collect(engine, LONG)
        with pytest.raises(InputError, match=r"server refused: .*out of vocabulary"):
            await collect(engine, LONG, prompt=[1, 10_000])

    run(EngineServers(vllm[1].url), base, then=scenario)


def test_a_server_that_is_gone_is_not_alive(served_tiny_model: Path, base: Servable) -> None:
    running = Running(Dialect(served_tiny_model, BASE))

    async def scenario(engine: RemoteEngine) -> None:
        await asyncio.to_thread(running.close)
        with pytest.raises(EngineError, match="cannot be reached"):
            await collect(engine, LONG)
        assert not engine.alive

    run(EngineServers(running.url), base, then=scenario)
    with pytest.raises(EngineError, match="not ready within"):
        asyncio.run(EngineServers(running.url, ready_seconds=0.3).start(base))


def test_a_command_is_started_once_for_a_base_and_its_adapters_and_ended_with_the_last(
    base: Servable, tuned: Callable[[str], Servable]
) -> None:
    servers = EngineServers(f"{COMMAND} --enable-lora")
    assert servers.takes_adapters

    async def scenario() -> None:
        engines = await asyncio.gather(*(servers.start(model) for model in (base, tuned("ft:a"), tuned("ft:b"))))
        assert len(servers._servers) == 1
        answers = [tokens_of(await collect(engine, Sampling(max_tokens=4))) for engine in engines]
        assert answers[0] == continuation(PROMPT, 4)
        assert answers[0] != answers[1]
        total = sum(engine.memory_bytes for engine in engines)
        assert total > 20 * 2**20
        for engine in engines[:2]:
            await engine.close()
        assert await collect(engines[2], Sampling(max_tokens=4))
        await engines[2].close()

    run(servers, then=scenario)


def test_a_server_that_died_fails_its_answers_and_is_started_again(base: Servable) -> None:
    answer = continuation(PROMPT, 30)
    death = next(index for index, token in enumerate(answer) if index > 3 and token not in answer[:index])
    servers = EngineServers(f"{COMMAND} --die-on {answer[death]}")
    assert not servers.takes_adapters

    async def scenario(engine: RemoteEngine) -> None:
        with pytest.raises(EngineError):
            await collect(engine, LONG)
        await until(lambda: not engine.alive)
        second = await servers.start(base)
        assert tokens_of(await collect(second, Sampling(max_tokens=death))) == answer[:death]
        await second.close()

    run(servers, base, then=scenario)


def test_a_command_that_fails_is_an_error_with_its_own_words(base: Servable) -> None:
    servers = EngineServers(f"{COMMAND} --no-such-option")

    async def scenario() -> None:
        results = await asyncio.gather(*(servers.start(base) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, EngineError) and "--no-such-option" in str(result) for result in results)

    run(servers, then=scenario)
    with pytest.raises(EngineError, match="No such file"):
        asyncio.run(EngineServers("/no/such/program --port {port}").start(base))


def test_no_server_outlives_a_killed_parent(served_tiny_model: Path) -> None:
    code = (
        "import asyncio, psutil, sys\nfrom luthier.llm.server_process import ServerProcess\n"
        "async def main():\n    process = await ServerProcess.start(sys.argv[1], {'folder': sys.argv[2]})\n"
        "    while len(found := psutil.Process().children(recursive=True)) < 2:\n        await asyncio.sleep(0.05)\n"
        "    print(*(child.pid for child in found), flush=True)\n    await asyncio.sleep(600)\nasyncio.run(main())"
    )
    command = [sys.executable, "-c", code, COMMAND, str(served_tiny_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        os.kill(parent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert not alive


def test_a_server_without_token_ids_gives_text_and_counts(
    vllm: tuple[Dialect, Running], base: Servable, served_tiny_model: Path
) -> None:
    vllm[0].gives_token_ids = False
    expected = ChatFormat.load(served_tiny_model).tokenizer.decode(continuation(PROMPT, 9), skip_special_tokens=False)

    async def scenario(engine: RemoteEngine) -> tuple[list[AnswerDelta], list[AnswerDelta]]:
        chat_format = ChatFormat.load(served_tiny_model)
        whole = [d async for d in stream_answer(engine, chat_format, PROMPT, Sampling(max_tokens=9))]
        stop = Sampling(max_tokens=9, stop=(expected[4:6],))
        return whole, [d async for d in stream_answer(engine, chat_format, PROMPT, stop)]

    whole, stopped = run(EngineServers(vllm[1].url), base, then=scenario)
    assert sum(delta.token_count for delta in whole) == 9
    assert not any(delta.tokens for delta in whole)
    text = "".join(delta.text for delta in whole)
    assert len(text) > 4
    assert stopped[-1].finish_reason == "stop"
    assert "".join(delta.text for delta in stopped) == text[: text.index(expected[4:6])]


def test_llama_cpps_server_answers_as_the_engine_here_does(
    base: Servable, served_tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "server.py").write_text(LLAMA_CPP)
    chat_format = ChatFormat.load(served_tiny_model)
    prompts = [chat_format.encode(text) for text in ("hello world", "the quick brown fox", "0 1 2 3")]
    sampling = Sampling(max_tokens=12)

    async def texts(engine: Any) -> list[tuple[str, int]]:
        answers = []
        for prompt in prompts:
            deltas = [d async for d in stream_answer(engine, chat_format, prompt, sampling)]
            answers.append(("".join(d.text for d in deltas), sum(d.token_count for d in deltas)))
        return answers

    async def here() -> list[tuple[str, int]]:
        engine = await EngineProcess.start(served_tiny_model, EngineOptions(precision="float32"))
        try:
            return await texts(engine)
        finally:
            await engine.close()

    command = f"{sys.executable} {tmp_path / 'server.py'} {{gguf}} {{port}}"
    there = run(EngineServers(command), base, then=texts)
    ours = asyncio.run(here())
    assert [count for _, count in there] == [count for _, count in ours]
    assert [text for text, _ in there] == [text for text, _ in ours]
