from __future__ import annotations

import asyncio

from luthier.api.app import create_app
from luthier.api.loopback import call
from luthier.records.access import Caller
from tests.api.conftest import Live

HELLO = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 3}


def test_the_service_calls_itself_in_the_name_of_a_caller(live: Live) -> None:
    app = live.server.config.app

    async def ask() -> None:
        reader = Caller(project="acme", scopes=("read",))
        listed = await call(app, reader, "GET", "/v1/models")
        assert [model["id"] for model in listed.body["data"]] == ["tiny-base", "tiny-encoder"]
        refused = await call(app, reader, "DELETE", "/v1/models/tiny-base")
        assert (refused.status, refused.body["error"]["code"]) == (403, "insufficient_scope")
        assert refused.request_id.startswith("req_")

    asyncio.run(ask())


def test_a_call_from_within_gets_an_answer_of_a_model(live: Live) -> None:
    fresh = create_app(live.service)

    async def ask() -> None:
        answer = await call(fresh, Caller(), "POST", "/v1/chat/completions", HELLO | {"model": "tiny-base"})
        assert answer.status == 200
        assert answer.body["usage"]["completion_tokens"] == 3
        await live.service.pool.close()

    asyncio.run(ask())
