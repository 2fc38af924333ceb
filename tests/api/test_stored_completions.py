"""The production log: what is asked with ``store=True`` is kept with its answer, to be read, labelled and deleted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from luthier.errors import InputError
from luthier.records.example import Message
from luthier.store.store import Store
from luthier.workflows.completions import completions_of, keep_completion
from luthier.workflows.datasets import import_completions
from luthier.workflows.models import pull
from luthier.workflows.serving import model_pool
from tests.api.conftest import Live

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SHORT: dict[str, Any] = {"model": "tiny-base", "messages": HELLO, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, endless_model: Path) -> Iterator[Live]:
    """A service with the models ``tiny-base`` and ``endless``."""
    home = tmp_path_factory.mktemp("live") / "home"
    store = Store(home)
    pull(store, str(tiny_base))
    live = Live(home, model_pool(store, {"endless": endless_model}))
    yield live
    live.close()
    store.close()


def client_of(live: Live, project: str = "default", **options: Any) -> openai.OpenAI:
    return live.client(live.key(project), **options)


def kept(live: Live, project: str = "default", **wanted: Any) -> list[str]:
    return [stored.id for stored in completions_of(live.store, project, **wanted)]


def test_an_answer_is_kept_with_its_request_and_its_labels(live: Live) -> None:
    client = client_of(live)
    answer = client.chat.completions.create(**SHORT, store=True, metadata={"ticket": "1"}, seed=3, user="me")
    found = client.chat.completions.retrieve(answer.id)
    assert found.choices == answer.choices
    assert (found.usage, found.created, found.metadata) == (answer.usage, answer.created, {"ticket": "1"})
    assert found.model_extra is not None
    assert {"seed": 3, "temperature": 0, "input_user": "me", "tools": None}.items() <= found.model_extra.items()
    assert found.model_extra["request_id"].startswith("req_")


def test_without_store_nothing_is_kept(live: Live) -> None:
    before = kept(live)
    client_of(live).chat.completions.create(**SHORT, metadata={"ticket": "1"})
    client_of(live).chat.completions.create(**SHORT, store=False)
    assert kept(live) == before


def test_a_stream_is_kept_as_the_answer_that_it_is(live: Live) -> None:
    client = client_of(live)
    options = {**SHORT, "logprobs": True, "n": 2, "store": True}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert all(chunk.choices for chunk in chunks)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    stored = client.chat.completions.retrieve(chunks[0].id)
    assert [choice.message for choice in stored.choices] == [choice.message for choice in whole.choices]
    assert (stored.usage, stored.choices[1].finish_reason) == (whole.usage, "length")
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == 1]
    logprobs = [entry for part in parts if part.logprobs for entry in part.logprobs.content or ()]
    assert stored.choices[1].logprobs is not None
    assert stored.choices[1].logprobs.content == logprobs
    counted = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert counted[-1].usage == whole.usage
    assert client.chat.completions.retrieve(counted[-1].id).usage == whole.usage


def test_a_stream_that_its_client_leaves_is_not_kept(live: Live) -> None:
    client = client_of(live)
    asked = {**SHORT, "model": "endless", "max_tokens": 1900, "store": True}
    before = kept(live)
    stream = client.chat.completions.create(**asked, stream=True)
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 30
    while any(loaded.engine.in_flight for loaded in live.service.pool.loaded):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert kept(live) == before


def test_they_are_listed_by_model_and_labels_page_by_page(live: Live) -> None:
    client = client_of(live, "listing")
    ids = [
        client.chat.completions.create(**SHORT, store=True, metadata={"even": str(number % 2 == 0)}).id
        for number in range(5)
    ]
    assert [one.id for one in client.chat.completions.list(limit=2)] == ids
    assert [one.id for one in client.chat.completions.list(limit=2, order="desc")] == ids[::-1]
    assert [one.id for one in client.chat.completions.list(metadata={"even": "True"})] == ids[::2]
    assert [one.id for one in client.chat.completions.list(model="tiny-base", after=ids[2])] == ids[3:]
    assert list(client.chat.completions.list(model="other")) == []
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.list(after="chatcmpl-nobody")


def test_the_messages_that_were_sent_are_listed_with_their_roles(live: Live) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    client = client_of(
        live, _strict_response_validation=False
    )  # the package's own type knows no role but the assistant's
    answer = client.chat.completions.create(**{**SHORT, "messages": messages}, store=True)
    found = list(client.chat.completions.messages.list(answer.id, limit=1))
    assert [(one.role, one.content) for one in found] == [("system", "Be short."), ("user", "hello")]
    assert found[1].content_parts is not None
    assert len(found[1].content_parts) == 2
    assert [one.id for one in client.chat.completions.messages.list(answer.id, order="desc")] == [
        f"{answer.id}-1",
        f"{answer.id}-0",
    ]


def test_labels_are_replaced_and_a_deleted_one_is_gone(live: Live) -> None:
    completions = client_of(live).chat.completions
    answer = completions.create(**SHORT, store=True, metadata={"a": "1"})
    assert completions.update(answer.id, metadata={"b": "2"}).metadata == {"b": "2"}
    assert completions.retrieve(answer.id).metadata == {"b": "2"}
    assert completions.delete(answer.id).deleted
    for missing in (completions.retrieve, completions.delete, completions.messages.list):
        with pytest.raises(openai.NotFoundError):
            missing(answer.id)


ODD_KEYS = ['q"x', "a.b", "$", "[0]", "a]b", "\\", "it's", "%", "tab\tnew\nline", "größe", "", " "]


def test_completions_are_found_by_labels_whatever_these_are_called(live: Live) -> None:
    completions = client_of(live, "labels").chat.completions
    ids = {key: completions.create(**SHORT, store=True, metadata={key: "yes", "of": "all"}).id for key in ODD_KEYS}
    for key, id in ids.items():
        assert [one.id for one in completions.list(metadata={key: "yes", "of": "all"})] == [id]
        assert list(completions.list(metadata={key: "no"})) == []
    assert [one.id for one in completions.list(metadata={"of": "all"}, limit=5)] == list(ids.values())


def test_completions_without_labels_are_found(live: Live) -> None:
    completions = client_of(live, "unlabelled").chat.completions
    labels: list[Any] = [openai.omit, {"a": "1"}, {}, openai.omit, {"b": "null"}, openai.omit]
    ids = [completions.create(**SHORT, store=True, metadata=one).id for one in labels]
    without: dict[str, object] = {"metadata": "null"}
    assert [one.id for one in completions.list(extra_query=without, order="asc")] == [ids[n] for n in (0, 2, 3, 5)]
    page = completions.list(extra_query=without, order="desc", limit=2)
    assert ([one.id for one in page.data], page.has_more) == ([ids[5], ids[3]], True)
    page = completions.list(extra_query=without, order="desc", limit=2, after=ids[3])
    assert ([one.id for one in page.data], page.has_more) == ([ids[2], ids[0]], False)


@pytest.mark.parametrize(
    "metadata", [{"a": 1}, {"a" * 65: "b"}, {"a": "b" * 513}, {str(n): "" for n in range(17)}, "a"]
)
def test_labels_that_break_a_rule_are_refused_by_name(live: Live, metadata: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client_of(live).chat.completions.create(**SHORT, store=True, metadata=metadata)
    assert str(caught.value.param).startswith("metadata")


def test_the_log_becomes_a_dataset_whose_last_message_is_the_answer(live: Live) -> None:
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}, *HELLO]
    answer = {"role": "assistant", "content": "Good morning!", "refusal": None, "annotations": []}

    def keep(number: int, finish_reason: str, **metadata: str) -> None:
        choice = {"index": 0, "message": answer, "logprobs": None, "finish_reason": finish_reason}
        completion = {"id": f"chatcmpl-log{number}", "created": number, "model": "tiny-base", "choices": [choice]}
        request = {"model": "tiny-base", "messages": history, "metadata": metadata}
        keep_completion(live.store, "logging", request, completion)

    keep(1, "stop", intent="greeting")
    keep(2, "length", intent="greeting")
    keep(3, "stop", intent="other")
    dataset = import_completions(live.store, "log", project="logging", metadata={"intent": "greeting"})
    assert (dataset.examples, dataset.kind, dataset.fields) == (1, "chat", ("intent",))
    assert dataset.report is not None
    assert "finish_reason is 'length'" in dataset.report.bad_rows[0].reason
    (example,) = live.store.datasets.examples(dataset)
    assert (example.id, example.fields) == ("chatcmpl-log1", {"intent": "greeting"})
    assert example.messages == (
        Message(role="user", content="hi"),
        Message(role="assistant", content="Hello!", weight=0),
        Message(role="user", content="hello"),
        Message(role="assistant", content="Good morning!"),
    )
    function = {"name": "weather", "arguments": "{}"}
    answer = answer | {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    keep(4, "tool_calls", intent="weather")
    dataset = import_completions(live.store, "log", project="logging", metadata={"intent": "weather"})
    (example,) = live.store.datasets.examples(dataset)
    assert example.messages[-1].tool_calls[0].name == "weather"
    with pytest.raises(InputError, match="none fits"):
        import_completions(live.store, "log", project="logging", model="nobody")


def test_another_project_does_not_see_them(live: Live) -> None:
    keep_completion(
        live.store, "acme", {"messages": HELLO}, {"id": "chatcmpl-acme", "created": 1, "model": "m", "choices": []}
    )
    completions = client_of(live, "other").chat.completions
    assert list(completions.list()) == []
    for forbidden in (completions.retrieve, completions.delete, completions.messages.list):
        with pytest.raises(openai.NotFoundError):
            forbidden("chatcmpl-acme")
    assert kept(live, "acme") == ["chatcmpl-acme"]
