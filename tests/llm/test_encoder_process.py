from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from luthier.errors import EngineError, InputError
from luthier.llm.embedding_format import EmbeddingFormat
from luthier.llm.encoder_process import EncoderProcess
from luthier.llm.engine.encoder_worker import EmbeddingModel

TEXTS = [
    "hello world",
    "The quick brown fox jumps over the lazy dog",
    "order",
    "A luthier builds and tunes instruments; this one tunes language models, from raw data to a served model.",
] * 4
MANY = 20_000


class Running:
    """An encoder and the event loop that it belongs to."""

    def __init__(self, folder: Path) -> None:
        self.runner = asyncio.Runner()
        self.encoder = self.runner.run(EncoderProcess.start(folder))

    def run(self, scenario: Callable[[EncoderProcess], Coroutine[Any, Any, Any]]) -> Any:
        return self.runner.run(scenario(self.encoder))


@pytest.fixture(scope="module")
def running(tiny_encoder: Path) -> Iterator[Running]:
    """One encoder for all tests; the one that kills it stands last."""
    running = Running(tiny_encoder)
    yield running
    running.runner.run(running.encoder.close())
    running.runner.close()
    assert not psutil.pid_exists(running.encoder.pid)


def expected(folder: Path, texts: list[str], pooling: str = "mean") -> np.ndarray:
    """Ask plain transformers, one text at a time, as sentence-transformers pools it."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors = []
    with torch.no_grad():
        for text in texts:
            hidden = model(**tokenizer(text, return_tensors="pt", padding=False, truncation=False)).last_hidden_state[0]
            vectors.append(hidden[0] if pooling == "cls" else hidden.mean(0))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=1).numpy()


def pooled(tiny_encoder: Path, tmp_path: Path, **config: Any) -> Path:
    """Return a copy of the encoder as sentence-transformers writes one."""
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "pooled"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **config}))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def test_vectors_are_those_of_plain_transformers(running: Running, tiny_encoder: Path) -> None:
    tokens = EmbeddingFormat.load(tiny_encoder).tokens(TEXTS)
    vectors = running.run(lambda encoder: encoder.embed(tokens))
    np.testing.assert_allclose(vectors, expected(tiny_encoder, TEXTS), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_the_models_own_pooling_counts(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = pooled(tiny_encoder, tmp_path, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    vectors = EmbeddingModel(folder).vectors(EmbeddingFormat.load(folder).tokens(TEXTS[:2]))
    np.testing.assert_allclose(vectors, expected(folder, TEXTS[:2], "cls"), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [({}, "mean"), ({"pooling_mode_mean_tokens": True}, "mean"), ({"pooling_mode": "cls"}, "cls")],
)
def test_pooling_is_read_as_each_version_of_sentence_transformers_writes_it(
    tiny_encoder: Path, tmp_path: Path, config: dict[str, Any], pooling: str
) -> None:
    assert EmbeddingFormat.load(pooled(tiny_encoder, tmp_path, **config)).pooling == pooling


def test_the_longest_text_is_what_the_model_was_tuned_for(tiny_encoder: Path, tmp_path: Path) -> None:
    assert EmbeddingFormat.load(tiny_encoder).max_tokens == 64
    folder = pooled(tiny_encoder, tmp_path)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": true}')
    short = EmbeddingFormat.load(folder)
    assert (short.max_tokens, short.dimensions) == (32, 32)
    assert short.tokens(["HELLO"]) == EmbeddingFormat.load(tiny_encoder).tokens(["hello"])


@pytest.mark.parametrize(
    "config", [{"pooling_mode_max_tokens": True}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}]
)
def test_pooling_that_is_not_known_is_refused(tiny_encoder: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="pools with"):
        EmbeddingFormat.load(pooled(tiny_encoder, tmp_path, **config))


def test_a_module_that_is_not_known_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = pooled(tiny_encoder, tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"path": "3_Dense", "type": "models.Dense"}]))
    with pytest.raises(InputError, match="module Dense"):
        EmbeddingFormat.load(folder)


def test_small_requests_do_not_wait_for_a_large_one_and_a_request_that_is_given_up_is_dropped(
    running: Running,
) -> None:
    async def scenario(encoder: EncoderProcess) -> None:
        large = asyncio.create_task(encoder.embed([[2] + [7] * 40 + [3]] * MANY))
        small = await asyncio.gather(*(encoder.embed([[2, 7, 3]]) for _ in range(8)))
        assert not large.done()
        assert all(np.array_equal(vector, small[0]) for vector in small)
        large.cancel()
        await asyncio.gather(large, return_exceptions=True)
        assert encoder.in_flight == 0
        await encoder.embed([[2, 7, 3]])

    running.run(scenario)


def test_a_text_that_the_model_cannot_read_fails_its_request_alone(running: Running) -> None:
    async def scenario(encoder: EncoderProcess) -> None:
        with pytest.raises(EngineError):
            await encoder.embed([[10**6]])
        assert (await encoder.embed([[2, 7, 3]])).shape == (1, 32)

    running.run(scenario)


def test_a_killed_encoder_fails_its_requests_and_is_not_alive(running: Running) -> None:
    async def scenario(encoder: EncoderProcess) -> None:
        waiting = asyncio.create_task(encoder.embed([[2, 7, 3]] * MANY))
        await asyncio.sleep(0)
        os.kill(encoder.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"died \(signal 9\)"):
            await waiting
        assert not encoder.alive

    running.run(scenario)
