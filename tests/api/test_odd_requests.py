"""Requests that nobody thought of, made from the service's own description by schemathesis: none is a 500, none hangs.

Half of them name things that are there, so that they get past "not found".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks

from luthier.workflows.models import pull
from tests.api.conftest import Live
from tests.api.test_route_table import OWNER, World, each_route, parameters

HANG_SECONDS = 60
EXAMPLES = 20
NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
SHORT = ("max_tokens", "max_completion_tokens", "max_output_tokens")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_encoder: Path) -> Iterator[World]:
    live = Live(tmp_path_factory.mktemp("odd") / "home")
    pull(live.store, str(tiny_base))
    pull(live.store, str(tiny_encoder))
    yield World(live)
    live.close()


@pytest.fixture(scope="module")
def described(world: World) -> schemathesis.BaseSchema:
    load_all_checks()
    return schemathesis.openapi.from_dict(httpx.get(f"{world.live.url}/openapi.json", timeout=HANG_SECONDS).json())


def name_what_is_there(world: World, body: dict[str, Any]) -> dict[str, Any]:
    """Return a body with the names of things that there are, and a bound on how long its answer takes."""
    things = {
        "model": "tiny-base",
        "training_file": world.training_files[OWNER],
        "input_file_id": world.batch_files[OWNER],
        "previous_response_id": world.id_of("response"),
        "messages": [{"role": "user", "content": "hello"}],
        "input": "hello",
        "prompt": "hello",
    }
    there = {name: thing for name, thing in things.items() if name in body}
    short = {name: 2 for name in SHORT if isinstance(body.get(name), int)} if "model" in there else {}
    return body | there | short


@each_route
def test_no_request_is_a_server_error(
    world: World, described: schemathesis.BaseSchema, method: str, route: APIRoute
) -> None:
    checks = [CHECKS.get_one(name) for name in NAMES]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=described[route.path_format][method].as_strategy(), is_there=st.booleans())
    def ask(case: schemathesis.Case, is_there: bool) -> None:
        if is_there:
            case.path_parameters |= {name: world.id_of(name) for name in parameters(route) if method != "DELETE"}
            if isinstance(case.body, dict):
                case.body = name_what_is_there(world, case.body)
        headers = {"authorization": f"Bearer {world.keys[OWNER]}"}
        response = case.call(base_url=world.live.url, headers=headers, timeout=HANG_SECONDS)
        case.validate_response(response, checks=checks)
        assert response.headers["x-request-id"]

    ask()
