"""Every route, from the route table: who may call it, and that a project never reaches another's things.

A new route is tested without a line here. A new path parameter needs a maker of such a thing (:data:`MAKERS`), a body
that must be valid one in :data:`BODIES`, and a field of a body that names another thing an entry in
:data:`REFERENCES`; without them these tests fail and say so.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from luthier.api import metrics
from luthier.api.app import create_app
from luthier.api.routes import ROUTERS
from luthier.api.service import administers, reads, writes
from luthier.records.eval import OutputItem
from luthier.records.fine_tuning import Checkpoint
from luthier.records.model import Artifact
from luthier.records.stored import now
from luthier.workflows.models import pull
from tests.api.conftest import Live

OWNER, STRANGER = "acme", "other"
HELLO = [{"role": "user", "content": "hello"}]
CHAT_LINE = {"messages": [*HELLO, {"role": "assistant", "content": "hi"}]}
SHORT = {"model": "tiny-base", "messages": HELLO, "max_tokens": 1}
BATCH_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": SHORT}
RESPONSE = {"model": "tiny-base", "input": "hello", "max_output_tokens": 1}
RESPONSE = {"model": "tiny-base", "input": "hello", "max_output_tokens": 16}
BATCH = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
EVAL = {
    "data_source_config": {"type": "custom", "item_schema": {"type": "object"}, "include_sample_schema": True},
    "testing_criteria": [
        {"type": "string_check", "name": "same", "input": "a", "reference": "a", "operation": "eq"},
    ],
}
SCORE = {
    "type": "score_model",
    "name": "score",
    "model": "tiny-base",
    "input": [{"role": "user", "content": "How good is it?"}],
    "range": [0, 1],
}
ROWS = {"type": "jsonl", "source": {"type": "file_content", "content": [{"item": {"a": 1}}]}}
Maker = Callable[["World", str], str]


@dataclass
class World:
    """A service with two projects, whose things are made as they are needed, once."""

    live: Live

    def __post_init__(self) -> None:
        self.keys = {project: self.live.key(project) for project in (OWNER, STRANGER)}
        self.clients = {project: self.live.client(key) for project, key in self.keys.items()}
        self.made: dict[tuple[str, str], str] = {}

    def id_of(self, parameter: str, project: str = OWNER) -> str:
        """Return the id of the project's thing that a path parameter stands for."""
        assert parameter in MAKERS, f"MAKERS needs a maker of a thing for the path parameter {parameter!r}"
        place = parameter, project
        if place not in self.made:
            self.made[place] = MAKERS[parameter](self, project)
        return self.made[place]

    def all_ids(self) -> list[str]:
        return [self.id_of(parameter) for parameter in MAKERS]

    def ask(self, project: str, method: str, path: str, **content: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[project]}"}
        return httpx.request(method, f"{self.live.url}{path}", headers=headers, timeout=60, **content)

    def make(self, project: str, path: str, **body: Any) -> str:
        """Return the id of what a route makes of a body."""
        return str(self.ask(project, "POST", path, json=body).raise_for_status().json()["id"])

    def everything(self) -> dict[str, list[str]]:
        """Return all that the service keeps: the rows of the database, and the names of its files."""
        with sqlite3.connect(self.live.store.home / "luthier.db") as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            kept = {table: sorted(map(repr, database.execute(f"SELECT * FROM {table}"))) for table in tables}  # noqa: S608
        return kept | {"files": sorted(str(path) for path in self.live.store.home.glob("[ar]*/**/*"))}

    def file(self, project: str, purpose: str, *rows: object) -> str:
        """Return the id of a new file."""
        content = {"file": ("rows.jsonl", "\n".join(map(json.dumps, rows)).encode())}
        return str(self.ask(project, "POST", "/v1/files", files=content, data={"purpose": purpose}).json()["id"])

    @cached_property
    def training_files(self) -> dict[str, str]:
        return {project: self.file(project, "fine-tune", *[CHAT_LINE] * 12) for project in self.keys}

    @cached_property
    def batch_files(self) -> dict[str, str]:
        return {project: self.file(project, "batch", BATCH_LINE) for project in self.keys}

    @cached_property
    def rows_file(self) -> str:
        return self.file(OWNER, "evals", {"item": {"a": 1}})

    @cached_property
    def encoder(self) -> str:
        self.live.store.models.set_alias(OWNER, "reader@production", "tiny-encoder")
        return "reader@production"


def make_checkpoint(world: World, project: str) -> str:
    model = f"ft:tiny-base:local::{project}:ckpt-step-1"
    adapter = Artifact(kind="adapter", path="nowhere", bytes=0, sha256={})
    world.live.store.checkpoints.add(
        Checkpoint(
            id=f"ftckpt_{project}-1",
            project=project,
            created_at=now(),
            parent=f"train-{project}",
            model=model,
            base="tiny-base",
            step=1,
            metrics={},
            adapter=adapter,
        )
    )
    return model


def make_permission(world: World, project: str) -> str:
    permissions = world.clients[project].fine_tuning.checkpoints.permissions
    return permissions.create(world.id_of("checkpoint", project), project_ids=["third"]).data[0].id


def make_alias(world: World, project: str) -> str:
    name = f"{project}@production"
    world.live.store.models.set_alias(project, name, "tiny-base")
    return name


def make_output_item(world: World, project: str) -> str:
    store = world.live.store.evals
    run = store.runs.get(project, world.id_of("eval_run_id", project))
    item = OutputItem(
        id=f"outputitem_{project}",
        project=project,
        created_at=now(),
        parent=run.id,
        eval_id=run.parent,
        status="pass",
        number=0,
        item={},
        sample={},
        results=(),
    )
    store.keep(run, [item])
    return item.id


# For each path parameter: makes a thing of a project, and returns what stands for it in a path.
MAKERS: dict[str, Maker] = {
    "file_id": lambda world, project: world.training_files[project],
    "upload_id": lambda world, project: world.make(
        project, "/v1/uploads", bytes=5, filename="a", mime_type="text/plain", purpose="user_data"
    ),
    "job": lambda world, project: world.make(
        project, "/v1/fine_tuning/jobs", model="tiny-base", training_file=world.training_files[project]
    ),
    "checkpoint": make_checkpoint,
    "permission": make_permission,
    "model": make_alias,
    "completion": lambda world, project: world.make(project, "/v1/chat/completions", **SHORT, store=True),
    "response": lambda world, project: world.make(project, "/v1/responses", **RESPONSE),
    "batch": lambda world, project: world.make(
        project, "/v1/batches", **BATCH, input_file_id=world.batch_files[project]
    ),
    "eval_id": lambda world, project: world.make(project, "/v1/evals", **EVAL),
    "eval_run_id": lambda world, project: world.make(
        project, f"/v1/evals/{world.id_of('eval_id', project)}/runs", data_source=ROWS
    ),
    "output_item_id": make_output_item,
    "webhook_endpoint_id": lambda world, project: world.make(
        project, "/v1/webhook_endpoints", name="a", url="http://127.0.0.1:1", event_types=["batch.completed"]
    ),
}

# Valid bodies of routes with path parameters, where an empty one is none.
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/uploads/{upload_id}/parts"): {"files": {"data": b"hello"}},
    ("POST", "/v1/uploads/{upload_id}/complete"): {"json": {"part_ids": ["part_a"]}},
    ("POST", "/v1/fine_tuning/checkpoints/{checkpoint}/permissions"): {"json": {"project_ids": ["third"]}},
    ("POST", "/v1/chat/completions/{completion}"): {"json": {"metadata": {"a": "b"}}},
    ("POST", "/v1/evals/{eval_id}/runs"): {"json": {"data_source": ROWS}},
    ("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}/test"): {"json": {"event_type": "batch.completed"}},
}

# For each field of a body that names a thing: a body that names one of the owner's there, and the asking project's own
# things elsewhere. It is executed for the owner, and for nobody else. Fields of free parts (``data_source.…``) are not
# found by looking at the routes; they are listed all the same.
Reference = Callable[["World", str], dict[str, Any]]
Place = tuple[str, str, str]
REFERENCES: dict[Place, Reference] = {
    ("POST", "/v1/fine_tuning/jobs", "training_file"): lambda world, _: {
        "model": "tiny-base",
        "training_file": world.training_files[OWNER],
    },
    ("POST", "/v1/fine_tuning/jobs", "model"): lambda world, project: {
        "model": world.id_of("model"),
        "training_file": world.training_files[project],
    },
    ("POST", "/v1/fine_tuning/jobs", "validation_file"): lambda world, project: {
        "model": "tiny-base",
        "training_file": world.training_files[project],
        "validation_file": world.training_files[OWNER],
    },
    ("POST", "/v1/chat/completions", "model"): lambda world, _: SHORT | {"model": world.id_of("model")},
    ("POST", "/v1/completions", "model"): lambda world, _: {
        "model": world.id_of("model"),
        "prompt": "hello",
        "max_tokens": 1,
    },
    ("POST", "/v1/embeddings", "model"): lambda world, _: {"model": world.encoder, "input": "hello"},
    ("POST", "/v1/batches", "input_file_id"): lambda world, _: BATCH | {"input_file_id": world.batch_files[OWNER]},
    ("POST", "/v1/fine_tuning/alpha/graders/run", "grader.model"): lambda world, _: {
        "grader": SCORE | {"model": world.id_of("model")},
        "model_sample": "hello",
    },
    ("POST", "/v1/evals/{eval_id}/runs", "data_source.source.id"): lambda world, _: {
        "data_source": {"type": "jsonl", "source": {"type": "file_id", "id": world.rows_file}},
    },
    **{
        ("POST", path, field): lambda world, _, field=field, thing=thing: RESPONSE | {field: world.id_of(thing)}
        for path in ("/v1/responses", "/v1/responses/input_tokens")
        for field, thing in (("model", "model"), ("previous_response_id", "response"))
    },
}
# Fields that are called like references and are none: what is uploaded, parts of that one upload, other projects to
# share with, calls of tools.
NO_REFERENCES = {"file", "part_ids", "project_ids", "id", "tool_call_id", "call_id", "return_token_ids"}
# Fields whose unknown things are a 400 at OpenAI.
BAD_REQUESTS = {"previous_response_id"}
LOOKS_LIKE_A_REFERENCE = re.compile(r"(^|_)(file|job|batch|eval|model|run|response|completion|id)(_?ids?|s)?$")

# Routes that ask models: whoever may read may call them, though they are no GET.
MODEL_ROUTES = ("chat/completions", "completions", "embeddings", "responses", "responses/input_tokens")
ASKS_MODELS = {("POST", f"/v1/{route}") for route in MODEL_ROUTES}
# Lists in which the owner's things are not to be expected.
LISTS_NOTHING_OF_A_PROJECT = {"/v1/webhook_event_types", "/metrics"}
# Where the owner's request would only load torch; that it is valid is tested elsewhere.
NOT_EXECUTED = {"/v1/embeddings"}

ROUTES = [
    (method, route)
    for router in (*ROUTERS, metrics.router)
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods or ())
]
NAMES = [f"{method} {route.path_format}" for method, route in ROUTES]


def parameters(route: APIRoute) -> list[str]:
    return re.findall(r"{(\w+)}", route.path_format)


def each(routes: list[tuple[str, APIRoute]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("method", "route"), routes, ids=[f"{how} {it.path_format}" for how, it in routes])


each_route = each(ROUTES)
each_route_to_a_thing = each([(method, route) for method, route in ROUTES if parameters(route)])
each_route_to_a_part = each([(method, route) for method, route in ROUTES if len(parameters(route)) > 1])
each_paged_route = each(
    [
        (method, route)
        for method, route in ROUTES
        if any(parameter.name == "after" for parameter in route.dependant.query_params)
    ]
)
each_list = each(
    [
        (method, route)
        for method, route in ROUTES
        if method == "GET" and not parameters(route) and route.path_format not in LISTS_NOTHING_OF_A_PROJECT
    ]
)


def with_things(world: World, route: APIRoute, project: str = OWNER) -> str:
    """Return a route's path to a project's things."""
    return route.path_format.format(**{name: world.id_of(name, project) for name in parameters(route)})


def calls(dependant: Dependant) -> Iterator[object]:
    for dependency in dependant.dependencies:
        yield dependency.call
        yield from calls(dependency)


def scope_of(route: APIRoute) -> str:
    scopes = {reads: "read", writes: "write", administers: "admin"}
    (found,) = [scopes[call] for call in calls(route.dependant) if call in scopes]  # type: ignore[index]
    return found


def code_of(response: httpx.Response) -> str | None:
    code: str | None = response.json()["error"]["code"]
    return code


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_encoder: Path) -> Iterator[World]:
    live = Live(tmp_path_factory.mktemp("routes") / "home")
    pull(live.store, str(tiny_base))
    pull(live.store, str(tiny_encoder))
    yield World(live)
    live.close()


def test_the_table_has_every_route_that_the_service_describes(world: World) -> None:
    paths = create_app(world.live.service).openapi()["paths"]
    described = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert described - set(NAMES) == {"GET /health", "GET /ready"}
    assert len(NAMES) == len(set(NAMES))


@each_route
def test_a_route_says_who_may_call_it(method: str, route: APIRoute) -> None:
    scope = scope_of(route)  # exactly one
    if (method, route.path_format) in ASKS_MODELS or method == "GET":
        assert scope in ("read", "admin")
    else:
        assert scope in ("write", "admin")


@each_route
def test_a_key_without_the_scope_is_refused_and_nothing_happens(world: World, method: str, route: APIRoute) -> None:
    lower = {"read": None, "write": "read", "admin": "write"}[scope_of(route)]
    path = with_things(world, route)
    if lower is not None:
        before = world.everything()
        secret = world.live.store.keys.add("weak", OWNER, [lower])[1]  # type: ignore[list-item]
        body = BODIES.get((method, route.path_format), {"json": {}})
        headers = {"authorization": f"Bearer {secret}"}
        response = httpx.request(method, f"{world.live.url}{path}", headers=headers, **body)
        assert (response.status_code, code_of(response)) == (403, "insufficient_scope")
        after = world.everything()
        assert {name: rows for name, rows in after.items() if name != "api_keys"} == {
            name: rows for name, rows in before.items() if name != "api_keys"
        }
    response = httpx.request(method, f"{world.live.url}{path}")
    assert (response.status_code, code_of(response)) == (401, "invalid_api_key")


@each_route_to_a_thing
def test_another_projects_thing_is_not_found_and_stays_as_it_is(world: World, method: str, route: APIRoute) -> None:
    path = with_things(world, route)
    if method == "GET":
        assert world.ask(OWNER, method, path).status_code == 200  # or the ids would be wrong
    body = BODIES.get((method, route.path_format), {} if method in ("GET", "DELETE") else {"json": {}})
    before = world.everything()
    response = world.ask(STRANGER, method, path, **body)
    assert response.status_code != 400, f"BODIES needs a valid body for {method} {route.path_format}: {response.text}"
    assert response.status_code == 404, response.text
    assert world.everything() == before


@each_route_to_a_part
def test_a_part_is_not_found_under_a_thing_of_another_project(world: World, method: str, route: APIRoute) -> None:
    *above, last = parameters(route)
    things = {name: world.id_of(name, STRANGER) for name in above} | {last: world.id_of(last)}
    body = BODIES.get((method, route.path_format), {} if method in ("GET", "DELETE") else {"json": {}})
    before = world.everything()
    response = world.ask(STRANGER, method, route.path_format.format(**things), **body)
    assert response.status_code == 404, response.text
    assert world.everything() == before


@each_paged_route
def test_no_page_begins_behind_another_projects_thing(world: World, method: str, route: APIRoute) -> None:
    path = with_things(world, route, STRANGER)
    for after in world.all_ids():
        response = world.ask(STRANGER, method, path, params={"after": after})
        assert response.status_code == 404, (after, response.text)


@each_list
def test_a_list_has_nothing_of_another_project(world: World, method: str, route: APIRoute) -> None:
    ids = world.all_ids()
    own, others = (world.ask(project, method, route.path_format).json() for project in (OWNER, STRANGER))
    assert own["object"] == others["object"] == "list"
    shown = {one["id"] for one in own["data"]}
    assert shown & set(ids), f"MAKERS makes nothing that {route.path_format} lists"
    text = json.dumps(others)
    assert not [id for id in ids if id in text]


def fields(schema: object) -> Iterator[str]:
    """Yield the names of all fields of a JSON schema, those within others too."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            yield from fields(inner)


def references() -> set[Place]:
    """Return (method, path, field) of all fields in bodies that look as if they named a thing."""
    found = set()
    for method, route in ROUTES:
        if route.body_field is not None:
            schema = TypeAdapter(route.body_field.field_info.annotation).json_schema()
            named = {name for name in fields(schema) if LOOKS_LIKE_A_REFERENCE.search(name)}
            found |= {(method, route.path_format, name) for name in named - NO_REFERENCES}
    return found


def test_every_field_that_names_a_thing_is_tried() -> None:
    found = references()
    assert found == {place for place in REFERENCES if "." not in place[2]}


@pytest.mark.parametrize(("method", "path", "field"), REFERENCES, ids=[" ".join(place) for place in REFERENCES])
def test_a_body_does_not_reach_another_projects_thing(world: World, method: str, path: str, field: str) -> None:
    bodies = {project: REFERENCES[method, path, field](world, project) for project in (OWNER, STRANGER)}
    paths = {project: path.format(eval_id=world.id_of("eval_id", project)) for project in bodies}
    before = world.everything()
    response = world.ask(STRANGER, method, paths[STRANGER], json=bodies[STRANGER])
    assert response.status_code == (400 if field in BAD_REQUESTS else 404), response.text
    assert field.endswith(response.json()["error"]["param"])
    assert world.everything() == before
    if path not in NOT_EXECUTED:
        own = world.ask(OWNER, method, paths[OWNER], json=bodies[OWNER])
        assert own.status_code in (200, 201), own.text  # or the body would be wrong


def test_a_checkpoint_is_no_model_of_another_project(world: World) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = SHORT | {"prompt": "hello", "model": world.id_of("checkpoint")}
        response = world.ask(STRANGER, "POST", path, json=body)
        assert (response.status_code, code_of(response)) == (404, "model_not_found")


def test_the_things_are_still_there_in_the_end(world: World) -> None:
    for method, route in ROUTES:
        if method == "GET":
            assert world.ask(OWNER, method, with_things(world, route)).status_code == 200, route.path_format
