from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from luthier.errors import CapacityError, InputError, NotFoundError
from luthier.serve.engine_memory import ENCODER_PROCESS_BYTES, encoder_need
from luthier.serve.pool import ModelPool, Resolved


def pool_of(decoder: Path, encoder: Path, **options: int) -> ModelPool:
    return ModelPool(
        lambda *_: Resolved("decoder", decoder),
        lambda _: [],
        resolve_encoder=lambda *_: Resolved("encoder", encoder),
        **options,
    )


def test_encoders_and_models_that_write_make_room_for_one_another(served_tiny_model: Path, tiny_encoder: Path) -> None:
    async def scenario() -> None:
        pool = pool_of(served_tiny_model, tiny_encoder, max_loaded=1)
        async with pool.lease("writes") as decoder:
            waiting = asyncio.create_task(embed(pool))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            assert decoder.engine.alive
        assert (await waiting).shape == (1, 32)
        assert not pool.loaded
        (encoder,) = pool.loaded_encoders
        (info,) = pool.engines
        assert ENCODER_PROCESS_BYTES / 4 < info.memory_bytes < encoder_need(tiny_encoder).expected_bytes * 2
        async with pool.lease("writes"):
            assert not encoder.engine.alive
            assert not pool.loaded_encoders
        await pool.close()

    async def embed(pool: ModelPool) -> object:
        async with pool.lease_encoder("reads") as loaded:
            return await loaded.engine.embed([[2, 7, 3]])

    before = {child.pid for child in psutil.Process().children()}
    asyncio.run(scenario())
    assert {child.pid for child in psutil.Process().children()} <= before


def test_an_encoder_that_is_larger_than_all_may_be_is_refused(served_tiny_model: Path, tiny_encoder: Path) -> None:
    async def scenario() -> None:
        pool = pool_of(served_tiny_model, tiny_encoder, memory_bytes=ENCODER_PROCESS_BYTES)
        with pytest.raises(CapacityError, match="LUTHIER_ENGINE_MEMORY"):
            async with pool.lease_encoder("reads"):
                pass
        await pool.close()

    asyncio.run(scenario())


def test_a_pool_without_encoders_has_none(served_tiny_model: Path) -> None:
    async def scenario() -> None:
        pool = ModelPool(lambda *_: Resolved("tiny", served_tiny_model), lambda _: [])
        with pytest.raises(NotFoundError, match="'reads' does not exist"):
            async with pool.lease_encoder("reads"):
                pass
        await pool.close()

    asyncio.run(scenario())


def test_a_folder_that_is_no_encoder_is_a_clear_error(served_tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")

    async def scenario() -> None:
        pool = pool_of(served_tiny_model, tmp_path)
        with pytest.raises(InputError, match=r"no config\.json"):
            async with pool.lease_encoder("reads"):
                pass
        await pool.close()

    asyncio.run(scenario())
