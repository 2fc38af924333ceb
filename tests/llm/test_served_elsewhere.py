"""Models of a store behind a server that speaks vLLM's dialect: each is asked with its own weights and adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_dialect import Dialect, Running, continuation

from luthier.errors import InputError, NotFoundError
from luthier.llm.answer_stream import stream_answer
from luthier.records.completion import Sampling
from luthier.serve.pool import ModelPool
from luthier.settings import Settings
from luthier.store.store import Store
from luthier.workflows.checkpoints import keep_checkpoint
from luthier.workflows.models import pull
from luthier.workflows.serving import model_pool
from luthier.workflows.sharing import share

BASE = "tiny-base"
PROMPT = [1, 40, 50, 60]
NAME = "ft:tiny-base:local::1:ckpt-step-5"


@pytest.fixture
def store(tmp_path: Path, tiny_base: Path) -> Iterator[Store]:
    """A store with a checkpoint of the project ``acme`` that is shared with ``other``."""
    store = Store(tmp_path / "home")
    pull(store, str(tiny_base))
    run = store.runs.add("train-1", "train", {}, project="acme")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "adapter_config.json").write_text("{}")
    keep_checkpoint(store, run, BASE, NAME.removesuffix(":ckpt-step-5"), weights, 5, {"step": 5.0})
    share(store, "acme", NAME, ["other"])
    yield store
    store.close()


def ask(pool: ModelPool, name: str, project: str) -> list[int]:
    async def scenario() -> list[int]:
        try:
            async with pool.lease(name, project) as loaded:
                deltas = stream_answer(loaded.engine, loaded.chat_format, PROMPT, Sampling(max_tokens=5))
                return [token async for delta in deltas for token in delta.tokens]
        finally:
            await pool.close()

    return asyncio.run(scenario())


@pytest.mark.parametrize("project", ["acme", "other"])
def test_a_checkpoint_is_an_adapter_in_the_server_of_its_base_for_all_who_may_ask_it(
    store: Store, project: str
) -> None:
    folder = store.models.base_folder(store.models.base(BASE))
    server = Running(Dialect(folder, BASE))
    try:
        pool = model_pool(store, settings=Settings(home=store.home, engine=server.url))
        (adapter,) = (one.adapter for one in store.checkpoints.all("acme"))
        expected = continuation(PROMPT, 5, str(store.models.artifact_folder(adapter)))
        assert ask(pool, NAME, project) == expected
    finally:
        server.close()


def test_a_checkpoint_of_others_is_not_found(store: Store) -> None:
    pool = model_pool(store, settings=Settings(home=store.home, engine="http://127.0.0.1:9"))
    with pytest.raises(NotFoundError):
        ask(pool, NAME, "a third")


def test_a_checkpoint_needs_a_server_that_loads_adapters(store: Store) -> None:
    pool = model_pool(store, settings=Settings(home=store.home, engine="serve {folder} --port {port}"))
    with pytest.raises(InputError, match="--enable-lora"):
        ask(pool, NAME, "acme")
