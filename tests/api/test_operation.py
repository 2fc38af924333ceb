from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

import luthier
from luthier.api.app import create_app
from luthier.api.logs import JsonLines, TextLines
from luthier.api.loopback import call
from luthier.api.tracing import tracing
from luthier.records.access import Caller, Rates
from luthier.workflows.models import pull
from tests.api.conftest import Live
from tests.api.receiver import Receiver

SECRET_WORDS = "the purple elephant"
ASK: dict[str, Any] = {
    "model": "tiny-base",
    "messages": [{"role": "user", "content": SECRET_WORDS}],
    "max_tokens": 8,
    "temperature": 0,
}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Lines(logging.Handler):
    """What is logged, as JSON lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        self.formatter = JsonLines()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["message"] == "request"]


@pytest.fixture
def logged() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("luthier")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def measured(live: Live, key: str = "none") -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = httpx.get(f"{live.url}/metrics", headers={"authorization": f"Bearer {key}"})
    assert response.status_code == 200, response.text
    families = text_string_to_metric_families(response.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(found: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def test_metrics_count_requests_tokens_and_times(live: Live) -> None:
    before = measured(live)
    answer = live.client().chat.completions.create(**ASK, n=2)
    assert answer.usage is not None
    assert httpx.get(f"{live.url}/v1/files/file-nobody").status_code == 404
    httpx.get(f"{live.url}/some/where")
    after = measured(live)

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    chat = {"method": "POST", "route": "/v1/chat/completions", "status": "200", "origin": "client"}
    assert more("luthier_requests_total", **chat) == 1
    assert (
        more("luthier_requests_total", **(chat | {"method": "GET", "route": "/v1/files/{file_id}", "status": "404"}))
        == 1
    )
    assert more("luthier_requests_total", **(chat | {"method": "GET", "route": "unmatched", "status": "404"})) == 1
    assert more("luthier_tokens_total", model="tiny-base", kind="prompt") == answer.usage.prompt_tokens
    assert more("luthier_tokens_total", model="tiny-base", kind="completion") == answer.usage.completion_tokens
    assert more("luthier_time_to_first_token_seconds_count", model="tiny-base") == 2
    assert more("luthier_time_per_output_token_seconds_count", model="tiny-base") <= 2
    assert value(after, "luthier_engines_loaded") == 1
    assert value(after, "luthier_engine_memory_bytes", model="tiny-base") > 1e6
    assert value(after, "luthier_answers_in_flight", model="tiny-base") == 0
    assert value(after, "luthier_requests_waiting", model="tiny-base") == 0
    assert value(after, "process_resident_memory_bytes") > 0


def test_a_model_has_one_series_whatever_it_is_called(live: Live) -> None:
    live.store.models.set_alias("default", "counted@now", "tiny-base")
    before = value(measured(live), "luthier_tokens_total", model="tiny-base", kind="completion")
    live.client().chat.completions.create(**{**ASK, "model": "counted@now"})
    after = measured(live)
    assert value(after, "luthier_tokens_total", model="tiny-base", kind="completion") > before
    assert not [labels for _, labels in after if ("model", "counted@now") in labels]


def test_metrics_show_the_queue_and_are_for_admins(start_live: Callable[..., Live]) -> None:
    live = start_live()
    live.store.runs.add("train-1", "train", {})
    live.store.runs.add("train-2", "train", {})
    live.store.runs.request("train-2", "pause")
    found = measured(live)
    assert value(found, "luthier_runs_unfinished", kind="train", status="queued") == 1
    assert value(found, "luthier_runs_unfinished", kind="train", status="paused") == 1
    admin = live.key()
    assert measured(live, admin)
    reader = live.key("default", "write")
    assert httpx.get(f"{live.url}/metrics", headers={"authorization": f"Bearer {reader}"}).status_code == 403
    assert httpx.get(f"{live.url}/metrics").status_code == 401


def test_a_request_is_one_line_without_its_words(
    start_live: Callable[..., Live], tiny_base: Path, logged: Lines
) -> None:
    live = start_live()
    pull(live.store, str(tiny_base))
    client = live.client(live.key("acme"))
    answer = client.chat.completions.create(**ASK)
    assert answer.usage is not None
    list(client.chat.completions.create(**ASK, stream=True))
    assert httpx.get(f"{live.url}/v1/models").status_code == 401
    first, second, third = logged.requests
    (key,) = live.store.keys.all()
    expected = {
        "level": "info",
        "request_id": answer._request_id,
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "key": key.id,
        "project": "acme",
        "model": "tiny-base",
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
    }
    assert {name: first[name] for name in expected} == expected
    assert first["seconds"] >= first["first_token_seconds"] > 0
    assert second["completion_tokens"] == first["completion_tokens"]
    assert (third["status"], third["key"]) == (401, None)
    everything = json.dumps(logged.lines)
    assert "purple" not in everything
    assert "sk-luthier" not in everything


def test_prompts_are_logged_when_that_is_asked_for(
    start_live: Callable[..., Live], tiny_base: Path, logged: Lines
) -> None:
    live = start_live(log_prompts=True)
    pull(live.store, str(tiny_base))
    answer = live.client().chat.completions.create(**ASK)
    (line,) = [line for line in logged.lines if line["message"] == "prompt"]
    assert SECRET_WORDS in line["prompt"]
    assert line["request_id"] == answer._request_id


def test_a_line_of_text_cannot_be_forged() -> None:
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "path": "/a\nerror forged", "status": 200})
    line = TextLines().format(record)
    assert "\n" not in line
    assert r'path="/a\nerror forged"' in line
    assert json.loads(JsonLines().format(record))["path"] == "/a\nerror forged"


def test_a_bug_is_a_500_with_an_id_that_the_log_has_too(live: Live, logged: Lines) -> None:
    app = create_app(live.service)

    def bug() -> None:
        raise RuntimeError(SECRET_WORDS)

    app.add_api_route("/v1/bug", bug)
    answer = asyncio.run(call(app, Caller(), "GET", "/v1/bug"))
    assert answer.status == 500
    assert answer.body["error"]["type"] == "server_error"
    assert SECRET_WORDS not in json.dumps(answer.body)
    (line,) = [line for line in logged.lines if "traceback" in line]
    assert answer.request_id in line["message"]
    assert "RuntimeError" in line["traceback"]


def test_what_the_service_asks_itself_is_counted_apart_and_not_bounded(start_live: Callable[..., Live]) -> None:
    live = start_live(rates=Rates(requests_per_minute=1))
    app = live.server.config.app

    async def ask() -> list[int]:
        return [(await call(app, Caller(), "GET", "/v1/models")).status for _ in range(5)]

    assert asyncio.run(ask()) == [200] * 5
    own = {"method": "GET", "route": "/v1/models", "status": "200", "origin": "internal"}
    assert value(measured(live), "luthier_requests_total", **own) == 5


def test_metrics_of_names_that_nobody_has_are_not_kept(live: Live) -> None:
    httpx.request("WEIRD", f"{live.url}/v1/models")
    httpx.post(f"{live.url}/v1/chat/completions", json=ASK | {"model": "nobody-knows-this"})
    text = httpx.get(f"{live.url}/metrics").text
    assert "nobody-knows-this" not in text
    assert "WEIRD" not in text


def test_the_page_of_operation_names_every_setting_and_every_metric(live: Live) -> None:
    root = Path(luthier.__file__).parents[2]
    page = (root / "docs" / "service" / "operations.md").read_text("utf-8")
    read = [re.findall(r"LUTHIER_[A-Z]\w*", path.read_text("utf-8")) for path in (root / "src").rglob("*.py")]
    assert not {name for names in read for name in names if f"`{name}`" not in page}
    families = text_string_to_metric_families(httpx.get(f"{live.url}/metrics").text)
    ours = [
        one.name + ("_total" if one.type == "counter" else "") for one in families if one.name.startswith("luthier")
    ]
    assert len(ours) > 10
    assert not {name for name in ours if not name.endswith("_created") and f"`{name}`" not in page}


def spans(receiver: Receiver) -> list[Span]:
    found = []
    for received in receiver.received:
        assert received.path == "/v1/traces"
        message = ExportTraceServiceRequest.FromString(received.body)
        assert message.resource_spans[0].resource.attributes
        found += [span for group in message.resource_spans for scope in group.scope_spans for span in scope.spans]
    return found


def attributes(span: Span) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_requests_and_runs_are_traced_where_a_collector_is_named(
    start_live: Callable[..., Live], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Receiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
        live = start_live(processes=1)
        pull(live.store, str(tiny_base))
        headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        answer = live.client().chat.completions.create(**ASK, extra_headers=headers)
        assert answer.usage is not None
        live.store.runs.add("train-1", "train", {})
        live.store.runs.request("train-1", "cancel")
        end = asyncio.run(_until_announced(live))
        assert end
        live.server.should_exit = True
        live.thread.join()  # what is left is sent at the end
        by_name = {span.name: span for span in spans(collector)}
    chat, run = by_name["chat tiny-base"], by_name["run train"]
    assert chat.trace_id.hex() == TRACE
    found = attributes(chat)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == "tiny-base"
    assert found["gen_ai.usage.input_tokens"] == answer.usage.prompt_tokens
    assert found["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens
    assert found["http.response.status_code"] == 200
    assert found["luthier.request.id"] == answer._request_id
    assert "purple" not in str(found)
    assert attributes(run)["luthier.run.status"] == "cancelled"


async def _until_announced(live: Live) -> bool:
    async with asyncio.timeout(60):
        while live.store.outbox.unannounced():
            await asyncio.sleep(0.05)
    return True


def test_nothing_traces_unless_a_collector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert tracing() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing() is None


def test_the_log_is_written_where_it_is_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    from luthier.api.logs import configure_logs

    root, ours = logging.getLogger(), logging.getLogger("luthier")
    before = (list(root.handlers), root.level, ours.level)
    stream = io.StringIO()
    try:
        configure_logs("json", "info", stream)
        logging.getLogger("luthier.requests").info("request", extra={"status": 200})
        logging.getLogger("luthier.requests").debug("quiet")
        logging.getLogger("some.library").info("quiet")
        logging.getLogger("some.library").warning("loud")
    finally:
        root.handlers[:], root.level, ours.level = before
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["request", "loud"]
