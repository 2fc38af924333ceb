from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from luthier.errors import EngineError, InputError, NotFoundError
from luthier.llm.engine_process import EngineOptions
from luthier.llm.local import LocalModel
from luthier.records.completion import Completion, Sampling
from luthier.records.example import Message

SHORT = Sampling(max_tokens=8)


def ask(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


@pytest.fixture(scope="module")
def model(endless_model: Path) -> Iterator[LocalModel]:
    with LocalModel(endless_model, "tiny", EngineOptions(precision="float32")) as model:
        yield model


def test_completions_come_in_the_prompts_order_and_report_as_they_finish(model: LocalModel) -> None:
    seen: dict[int, Completion] = {}
    threads = set()

    def on_answer(index: int, completion: Completion) -> None:
        seen[index] = completion
        threads.add(threading.current_thread())

    prompts = [ask(f"number {index} " * (index + 1)) for index in range(20)]
    completions = model.answer(prompts, SHORT, on_answer)
    assert [seen[index] for index in range(20)] == completions
    assert threads == {threading.current_thread()}
    assert [c.prompt_tokens for c in completions] == [len(model.chat_format.prompt_tokens(p)) for p in prompts]


def test_a_completion_counts_every_token_and_its_text_is_their_decoding(model: LocalModel) -> None:
    (completion,) = model.answer([ask("hello")], SHORT)
    assert completion.tokens is not None
    assert completion.logprobs is not None
    assert completion.completion_tokens == len(completion.tokens) == len(completion.logprobs) == 8
    assert completion.text == model.chat_format.decode(completion.tokens).rstrip("\ufffd")
    assert completion.finish_reason == "length"
    assert completion.seconds > 0


def test_streamed_text_is_the_text_of_the_completion(model: LocalModel) -> None:
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=3)
    (completion,) = model.answer([ask("hello")], sampling)
    assert "".join(model.stream(ask("hello"), sampling)) == completion.text


def test_a_stop_string_ends_the_answer_before_it(model: LocalModel) -> None:
    (free,) = model.answer([ask("hello")], Sampling(max_tokens=40))
    stop = free.text[5:8]
    (stopped,) = model.answer([ask("hello")], Sampling(max_tokens=40, stop=(stop,)))
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.completion_tokens < free.completion_tokens


def test_a_stream_left_early_does_not_hold_the_engine(model: LocalModel) -> None:
    stream = model.stream(ask("hello"), Sampling(max_tokens=1500))
    next(stream)
    stream.close()
    assert len(model.answer([ask("again")], SHORT)) == 1


def test_all_prompts_that_do_not_fit_the_context_are_named_with_their_lengths(model: LocalModel) -> None:
    long = ask("0 1 2 3 " * 2000)
    tokens = len(model.chat_format.prompt_tokens(long))
    with pytest.raises(InputError) as caught:
        model.answer([ask("short"), long, long], SHORT)
    assert "2 of 3 prompts" in str(caught.value)
    assert "2048" in str(caught.value)
    assert caught.value.problems == (f"prompt 2: {tokens} tokens", f"prompt 3: {tokens} tokens")


def test_an_answer_ends_at_the_edge_of_the_context(model: LocalModel) -> None:
    prompt = ask("0 1 2 3 " * 390)
    room = model.chat_format.context_length - len(model.chat_format.prompt_tokens(prompt))
    assert 0 < room < 150
    (completion,) = model.answer([prompt], Sampling(max_tokens=500))
    assert completion.completion_tokens == room
    assert completion.finish_reason == "length"


def test_an_error_in_the_callback_reaches_the_caller_and_frees_the_engine(model: LocalModel) -> None:
    def on_answer(index: int, completion: Completion) -> None:
        raise KeyError(index)

    with pytest.raises(KeyError):
        model.answer([ask("one"), ask("two")], SHORT, on_answer)
    assert len(model.answer([ask("three")], SHORT)) == 1


def test_no_prompts_no_answers(model: LocalModel) -> None:
    assert model.answer([], SHORT) == []


def test_a_dead_engine_is_an_error_and_closing_still_works(endless_model: Path) -> None:
    model = LocalModel(endless_model, "tiny")
    (engine,) = [child for child in psutil.Process().children() if str(endless_model) in child.cmdline()][-1:]
    stream = model.stream(ask("hello"), Sampling(max_tokens=1500))
    next(stream)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="died"):
        list(stream)
    model.close()


def test_closing_leaves_no_process_and_further_calls_are_errors(endless_model: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    model = LocalModel(endless_model, "tiny")
    model.close()
    model.close()
    assert {child.pid for child in psutil.Process().children()} == before
    with pytest.raises(EngineError, match="closed"):
        model.answer([ask("hello")], SHORT)


def test_a_folder_without_weights_is_not_found_and_leaves_no_thread(endless_model: Path, tmp_path: Path) -> None:
    shutil.copytree(endless_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.gguf").unlink()
    threads = threading.active_count()
    with pytest.raises(NotFoundError):
        LocalModel(tmp_path, "tiny")
    assert threading.active_count() == threads
