from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from luthier.records.stored import now
from luthier.store.store import Store
from luthier.workflows.deliveries import EVENTS
from luthier.workflows.models import pull
from tests.api.conftest import Live
from tests.api.test_sdk_majors import SDKS
from tests.cli.test_up import Up

PATIENCE_SECONDS = 120
SCHEMA = {
    "type": "object",
    "properties": {"q": {"type": "string"}, "a": {"type": "string", "pattern": "^[a-z ]*$"}},
    "required": ["q"],
}
CUSTOM = {"type": "custom", "item_schema": SCHEMA, "include_sample_schema": True}
SAYS_IT = {
    "type": "string_check",
    "name": "says it",
    "input": "{{sample.output_text}}",
    "reference": "{{item.a}}",
    "operation": "ilike",
}
ANSWERS = SAYS_IT | {"name": "answers", "reference": "nothing like this", "operation": "ne"}
ASK = {"type": "template", "template": [{"role": "user", "content": "{{item.q}}"}]}
HELLO = [{"role": "user", "content": "hello"}]
PROGRAM = """
import sys, time, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, _strict_response_validation=True)
judge = {"type": "label_model", "name": "judge", "model": "tiny-base", "labels": ["a", "b"], "passing_labels": ["a"]}
judge["input"] = [{"role": "user", "content": "{{item.q}}"}]
near = {"type": "text_similarity", "name": "near", "input": "{{item.q}}", "reference": "q", "pass_threshold": 0.5,
        "evaluation_metric": "fuzzy_match"}
code = {"type": "python", "name": "code", "source": "def grade(sample, item):\\n    return 1", "pass_threshold": 1}
score = {"type": "score_model", "name": "score", "model": "tiny-base", "input": judge["input"], "range": [0, 9]}
schema = {"type": "object", "properties": {"q": {"type": "string"}}}
config = {"type": "custom", "item_schema": schema}
made = client.evals.create(name="all", data_source_config=config, testing_criteria=[judge, near, code, score])
content = [{"item": {"q": "q"}, "sample": {"output_text": "x"}}]
source = {"type": "jsonl", "source": {"type": "file_content", "content": content}}
run = client.evals.runs.create(made.id, data_source=source)
while run.status in ("queued", "in_progress"):
    time.sleep(0.1)
    run = client.evals.runs.retrieve(run.id, eval_id=made.id)
assert run.status == "completed", run
assert len(run.per_testing_criteria_results) == 4
(item,) = client.evals.runs.output_items.list(run.id, eval_id=made.id)
assert client.evals.runs.output_items.retrieve(item.id, eval_id=made.id, run_id=run.id).id == item.id
assert client.evals.update(made.id, name="new").name == "new"
assert [one.id for one in client.evals.runs.list(made.id, status="completed")] == [run.id]
run = client.evals.runs.create(made.id, data_source=source)
try:
    assert client.evals.runs.cancel(run.id, eval_id=made.id).eval_id == made.id
except openai.ConflictError:
    pass  # it was faster
assert client.evals.runs.delete(run.id, eval_id=made.id).deleted
logs = client.evals.create(data_source_config={"type": "logs", "metadata": {"a": "b"}}, testing_criteria=[near])
assert {made.id, logs.id} <= {one.id for one in client.evals.list()}
assert client.evals.retrieve(logs.id).data_source_config.metadata == {"a": "b"}
assert client.evals.delete(logs.id).eval_id == logs.id

check = {"type": "string_check", "name": "n", "input": "{{sample.output_text}}", "reference": "a", "operation": "eq"}
graders = client.fine_tuning.alpha.graders
assert graders.run(grader=check, model_sample="a").reward == 1
assert graders.run(grader=score, model_sample="a", item={"q": "q"}).metadata.errors.invalid_variable_error is False
multi = {"type": "multi", "name": "m", "graders": check, "calculate_output": "2 * n"}
assert graders.run(grader=multi, model_sample="a").sub_rewards == {"n": 1}
for grader in (check, score, multi):
    assert graders.validate(grader=grader).grader.type == grader["type"]
"""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_encoder: Path) -> Iterator[Live]:
    """A service that executes runs."""
    home = tmp_path_factory.mktemp("evals") / "home"
    store = Store(home)
    pull(store, str(tiny_base))
    pull(store, str(tiny_encoder))
    store.close()
    live = Live(home, processes=1)
    yield live
    live.close()


def made(client: openai.OpenAI, *criteria: Any, config: Any = CUSTOM, **options: Any) -> str:
    return client.evals.create(data_source_config=config, testing_criteria=criteria or [ANSWERS], **options).id


def inline(*rows: Any) -> dict[str, Any]:
    return {"type": "file_content", "content": list(rows)}


def items(*questions: str) -> dict[str, Any]:
    return inline(*({"item": {"q": question}} for question in questions))


def asking(source: dict[str, Any], **options: Any) -> dict[str, Any]:
    params = {"max_completion_tokens": 3, "temperature": 0}
    shared = {"type": "completions", "model": "tiny-base", "input_messages": ASK, "sampling_params": params}
    return shared | {"source": source} | options


def ended(client: openai.OpenAI, eval_id: str, run_id: str) -> Any:
    end = time.monotonic() + PATIENCE_SECONDS
    while (run := client.evals.runs.retrieve(run_id, eval_id=eval_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < end, run
        time.sleep(0.05)
    return run


def done(client: openai.OpenAI, eval_id: str, data_source: Any) -> tuple[Any, list[Any]]:
    """Return a run that has ended, and its items in the order of their rows."""
    run = client.evals.runs.create(eval_id, data_source=data_source)
    run = ended(client, eval_id, run.id)
    found = list(client.evals.runs.output_items.list(run.id, eval_id=eval_id))
    return run, sorted(found, key=lambda it: it.datasource_item_id)


# Evals


def test_an_eval_is_made_found_changed_and_deleted(live: Live) -> None:
    client = live.client()
    first = client.evals.create(
        name="first",
        data_source_config=CUSTOM,
        testing_criteria=[SAYS_IT],
        metadata={"team": "a"},  # type: ignore[arg-type, list-item]
    )
    assert (first.name, first.metadata, first.object) == ("first", {"team": "a"}, "eval")
    assert first.data_source_config.schema_["properties"]["item"] == SCHEMA  # type: ignore[index]
    assert "output_text" in str(first.data_source_config.schema_)
    assert first.testing_criteria[0].operation == "ilike"  # type: ignore[union-attr]
    second = made(client)
    assert [it.id for it in client.evals.list(limit=1)] == [first.id, second]
    assert [it.id for it in client.evals.list(order="desc")] == [second, first.id]
    time.sleep(1.1)  # times are whole seconds
    changed = client.evals.update(first.id, name="new", metadata={})
    assert (changed.name, changed.metadata) == ("new", {})
    assert [it.id for it in client.evals.list(order_by="updated_at")] == [second, first.id]
    assert [it.id for it in client.evals.list(order_by="updated_at", after=second)] == [first.id]
    assert client.evals.retrieve(first.id).to_dict() == changed.to_dict()
    for id in (first.id, second):
        assert client.evals.delete(id).deleted
        with pytest.raises(openai.NotFoundError):
            client.evals.retrieve(id)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"data_source_config": {"type": "customs"}}, "data_source_config.type", "Did you mean 'custom'"),
        ({"data_source_config": {"type": "custom"}}, "data_source_config.item_schema", "required"),
        (
            {"data_source_config": {"type": "custom", "item_schema": {"type": "thing"}}},
            "data_source_config.item_schema",
            "not a JSON schema",
        ),
        (
            {"data_source_config": {"type": "custom", "item_schema": {"pattern": "(?=a)"}}},
            "data_source_config.item_schema",
            "look-around",
        ),
        ({"testing_criteria": []}, "testing_criteria", "1 to 64"),
        ({"testing_criteria": [ANSWERS, SAYS_IT | {"operation": "lt"}]}, "testing_criteria[1].operation", "'eq'"),
        ({"testing_criteria": [ANSWERS, ANSWERS]}, "testing_criteria[1].name", "another grader"),
        ({"testing_criteria": [{"type": "multi", "name": "m"}]}, "testing_criteria[0].type", "must be one of"),
        (
            {"testing_criteria": [{"type": "python", "name": "p", "source": "grade = 1"}]},
            "testing_criteria[0].source",
            "does not define",
        ),
        (
            {
                "testing_criteria": [
                    {"type": "text_similarity", "name": "t", "input": "", "reference": "", "evaluation_metric": "bleu"}
                ]
            },
            "testing_criteria[0].pass_threshold",
            "required",
        ),
        (
            {
                "data_source_config": {"type": "custom", "item_schema": SCHEMA | {"additionalProperties": False}},
                "testing_criteria": [SAYS_IT | {"reference": "{{item.answer}}"}],
            },
            "testing_criteria[0].reference",
            "not in item_schema",
        ),
    ],
)
def test_what_is_no_eval_is_refused_with_its_field(live: Live, change: Any, param: str, message: str) -> None:
    body = {"data_source_config": CUSTOM, "testing_criteria": [ANSWERS]} | change
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        live.client().evals.create(**body)
    assert caught.value.param == param


# Runs


def test_a_run_asks_a_model_for_every_item_and_grades_its_answers(live: Live) -> None:
    client = live.client()
    eval_id = made(client, ANSWERS, SAYS_IT | {"reference": "impossible words"})
    run, found = done(client, eval_id, asking(items("one", "two", "three")))
    assert (run.status, run.model, run.error.message) == ("completed", "tiny-base", "")
    assert run.result_counts.model_dump() == {"total": 3, "passed": 0, "failed": 3, "errored": 0}
    criteria = {it.testing_criteria: (it.passed, it.failed) for it in run.per_testing_criteria_results}
    assert criteria == {"answers": (3, 0), "says it": (0, 3)}
    (usage,) = run.per_model_usage
    assert (usage.run_model_name, usage.invocation_count) == ("tiny-base", 3)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0
    assert run.report_url.startswith(live.url)
    assert EVENTS["eval_run"](live.store, live.store.runs.get(run.id)) == ("eval.run.succeeded", run.id)
    first = found[0]
    assert (first.status, first.datasource_item, first.datasource_item_id) == ("fail", {"q": "one"}, 0)
    assert [(it.name, it.score, it.passed) for it in first.results] == [("answers", 1.0, True), ("says it", 0.0, False)]
    assert first.sample.input[0].content == "one"
    assert (first.sample.model, first.sample.seed, first.sample.max_completion_tokens) == ("tiny-base", 42, 3)
    asked = client.chat.completions.create(
        model="tiny-base",
        messages=[{"role": "user", "content": "one"}],
        max_completion_tokens=3,
        temperature=0,
        seed=42,
    )
    assert first.sample.output[0].content == asked.choices[0].message.content
    listing = client.evals.runs.output_items.list
    assert len(list(listing(run.id, eval_id=eval_id, status="fail", limit=2))) == 3
    assert not list(listing(run.id, eval_id=eval_id, status="pass"))


def test_samples_that_are_given_are_graded_as_they_are(live: Live) -> None:
    client = live.client()
    code = {"type": "python", "name": "code", "source": "def grade(s, i):\n    return s['output_json']['n'] / 4"}
    eval_id = made(client, code)
    rows = inline(*({"item": {"q": "x"}, "sample": {"output_text": json.dumps({"n": n})}} for n in (1, 2, 3)))
    run, found = done(client, eval_id, {"type": "jsonl", "source": rows})
    assert (run.model, run.per_model_usage) == ("", [])
    assert [it.results[0].score for it in found] == [0.25, 0.5, 0.75]
    assert [it.status for it in found] == ["fail", "pass", "pass"]


def test_the_rows_of_a_file_are_evaluated(live: Live) -> None:
    client = live.client()
    lines = [{"item": {"q": str(n), "a": "yes"}, "sample": {"output_text": "oh yes"}} for n in range(40)]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("rows.jsonl", content), purpose="evals")
    run, found = done(client, made(client, SAYS_IT), {"type": "jsonl", "source": {"type": "file_id", "id": file.id}})
    assert run.result_counts.passed == 40
    assert [it.datasource_item_id for it in found] == list(range(40))


def test_rows_that_do_not_fit_the_schema_are_named(live: Live) -> None:
    client = live.client()
    eval_id = made(client)
    with pytest.raises(openai.BadRequestError, match="'q' is a required property") as caught:
        client.evals.runs.create(eval_id, data_source=asking(inline({"item": {"q": "a"}}, {"item": {"a": "b"}})))  # type: ignore[arg-type]
    assert caught.value.param == "data_source.source.content[1]"
    lines = [{"item": {"q": "a"}}, {"item": {"q": 3}}, {"item": {"q": "b", "a": "B!"}}]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("rows.jsonl", content), purpose="evals")
    run, found = done(client, eval_id, asking({"type": "file_id", "id": file.id}))
    assert (run.status, run.error.code, found) == ("failed", "run_failed", [])
    assert "line 2: item.q: 3 is not of type 'string'" in run.error.message
    assert "line 3: item.a: 'B!' does not match" in run.error.message


def test_stored_completions_are_graded_and_asked_again(live: Live) -> None:
    client = live.client()
    for text in ("hello", "good morning"):
        client.chat.completions.create(
            model="tiny-base",
            messages=[{"role": "user", "content": text}],
            max_tokens=3,
            store=True,
            metadata={"for": "evals"},
        )
    polite = SAYS_IT | {"name": "polite", "input": "{{item.input.[0].content}}", "reference": "morning"}
    config = {"type": "stored_completions", "metadata": {"for": "evals"}}
    eval_id = made(client, polite, ANSWERS, config=config)
    stored = {"type": "stored_completions", "created_before": now()}
    run, found = done(client, eval_id, {"type": "completions", "source": stored})
    assert run.result_counts.model_dump() == {"total": 2, "passed": 1, "failed": 1, "errored": 0}
    assert run.per_model_usage == []
    assert found[1].sample.input[0].content == "good morning"
    assert found[0].sample.output[0].content
    again = asking(stored | {"limit": 1})
    del again["input_messages"]
    run, found = done(client, eval_id, again)
    assert (run.result_counts.total, run.per_model_usage[0].invocation_count) == (1, 1)
    assert found[0].sample.input[0].content == "hello"
    run, _ = done(client, eval_id, {"type": "completions", "source": stored | {"model": "nobody"}})
    assert (run.status, run.error.message) == ("failed", "There is nothing to evaluate: the source has no rows.")


def test_responses_are_asked_and_graded(live: Live) -> None:
    client = live.client()
    eval_id = made(client)
    run, found = done(client, eval_id, asking(items("hello"), type="responses"))
    assert (run.status, run.result_counts.passed) == ("completed", 1)
    assert found[0].sample.output[0].content
    assert found[0].sample.seed == 0  # none was used
    assert run.per_model_usage[0].total_tokens > 0
    client.responses.create(model="tiny-base", input="hello", instructions="Be brief.", max_output_tokens=16)
    source = {"type": "responses", "instructions_search": "brief"}
    config = {"type": "logs"}
    logged = made(client, ANSWERS, config=config)
    run, found = done(client, logged, {"type": "responses", "source": source})
    assert [it.content for it in found[0].sample.input] == ["Be brief.", "hello"]
    assert run.result_counts.total == 1


def test_models_that_grade_are_counted_and_shown(live: Live) -> None:
    client = live.client()
    judge = {"type": "label_model", "name": "judge", "model": "tiny-base", "labels": ["a", "b"]}
    judge |= {"passing_labels": ["a", "b"], "input": [{"role": "user", "content": "{{sample.output_text}}"}]}
    run, found = done(client, made(client, judge), asking(items("one")))
    assert (run.result_counts.passed, run.per_model_usage[0].invocation_count) == (1, 2)
    assert found[0].results[0].sample["output"]
    assert found[0].sample.usage.total_tokens < run.per_model_usage[0].total_tokens


def test_an_item_that_cannot_be_graded_is_an_error_and_the_others_go_on(live: Live) -> None:
    client = live.client()
    rows = inline({"item": {"q": "one", "a": "x"}}, {"item": {"q": "two"}})
    run, found = done(client, made(client, SAYS_IT), asking(rows))
    assert run.status == "completed"
    assert (run.result_counts.total, run.result_counts.errored) == (2, 1)
    assert found[1].status == "error"
    assert found[1].results[0].error["code"] == "invalid_variable_error"
    assert found[0].status in ("pass", "fail")


def test_an_item_whose_question_fails_is_an_error(live: Live) -> None:
    client = live.client()
    ask = {"type": "template", "template": [{"role": "user", "content": "{{item.q}} {{item.a}}"}]}
    run, found = done(client, made(client), asking(items("one"), input_messages=ask))
    assert (run.result_counts.errored, run.per_testing_criteria_results) == (1, [])
    assert (found[0].sample.error.code, found[0].results) == ("invalid_variable_error", [])
    long = "word " * 3000
    run, found = done(client, made(client), asking(items(long)))
    assert run.result_counts.errored == 1
    assert "context" in found[0].sample.error.message


def test_a_run_of_a_model_that_cannot_be_asked_is_refused(live: Live) -> None:
    client = live.client()
    with pytest.raises(openai.NotFoundError, match="'nobody'") as caught:
        client.evals.runs.create(made(client), data_source=asking(items("one"), model="nobody"))
    assert (caught.value.param, caught.value.code) == ("data_source.model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="tiny-encoder") as wrong:
        client.evals.runs.create(made(client), data_source=asking(items("one"), model="tiny-encoder"))
    assert wrong.value.param == "data_source.model"


def test_a_run_whose_model_went_before_its_turn_fails(tmp_path: Path, tiny_base: Path) -> None:
    waiting = Live(tmp_path / "home")
    try:
        pull(waiting.store, str(tiny_base))
        waiting.store.models.set_alias("default", "one@now", "tiny-base")
        client = waiting.client()
        eval_id = made(client)
        run = client.evals.runs.create(eval_id, data_source=asking(items("one"), model="one@now"))
        client.models.delete("one@now")
    finally:
        waiting.close()
    live = Live(tmp_path / "home", processes=1)
    try:
        run = ended(live.client(), eval_id, run.id)
        assert run.status == "failed"
        assert run.error is not None
        assert "'one@now'" in run.error.message
    finally:
        live.close()


@pytest.mark.parametrize(
    ("data_source", "param", "message"),
    [
        ({"type": "json"}, "data_source.type", "must be one of"),
        ({"type": "jsonl"}, "data_source.source", "required"),
        ({"type": "jsonl", "source": {"type": "stored_completions"}}, "data_source.source.type", "must be one of"),
        ({"type": "jsonl", "source": inline()}, "data_source.source.content", "at least 1 item"),
        (
            {"type": "jsonl", "source": inline({"item": {"q": "a"}, "sample": {"choices": 5}})},
            "data_source.source.content[0].sample.choices",
            "valid list",
        ),
        (asking(items("a"), model=None), "data_source.model", "required"),
        (asking(items("a"), input_messages=None), "data_source.input_messages", "required"),
        (
            asking(items("a"), type="responses", sampling_params={"seed": 42}),
            "data_source.sampling_params.seed",
            "/v1/responses has no such field",
        ),
        (
            asking(items("a"), type="responses", sampling_params={"response_format": {"type": "json_object"}}),
            "data_source.sampling_params.response_format",
            "give text",
        ),
        (
            asking(items("a"), sampling_params={"text": {"format": {"type": "json_object"}}}),
            "data_source.sampling_params.text",
            "give response_format",
        ),
        (
            asking(items("a"), sampling_params={"temperature": 3}),
            "data_source.sampling_params.temperature",
            "less than",
        ),
        (
            asking(items("a"), input_messages={"type": "item_reference", "item_reference": "sample.x"}),
            "data_source.input_messages.item_reference",
            "pattern",
        ),
        (
            asking(items("a"), input_messages={"type": "template", "template": [{"role": "user", "content": "{{a}}"}]}),
            "data_source.input_messages.template[0].content",
            "only item",
        ),
    ],
)
def test_what_is_no_run_is_refused_with_its_field(live: Live, data_source: Any, param: str, message: str) -> None:
    client = live.client()
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.evals.runs.create(made(client), data_source=data_source)
    assert caught.value.param == param


def test_a_file_of_another_project_or_purpose_is_refused(start_live: Callable[..., Live]) -> None:
    live = start_live()
    owner, other = live.client(live.key("acme")), live.client(live.key("other"))
    content = json.dumps({"item": {"q": "a"}}).encode()
    file = owner.files.create(file=("rows.jsonl", content), purpose="evals")
    source: Any = {"type": "jsonl", "source": {"type": "file_id", "id": file.id}}
    assert owner.evals.runs.create(made(owner), data_source=source).status == "queued"
    with pytest.raises(openai.NotFoundError) as caught:
        other.evals.runs.create(made(other), data_source=source)
    assert caught.value.param == "data_source.source.id"
    batch = owner.files.create(file=("rows.txt", content), purpose="user_data")
    source = {"type": "jsonl", "source": {"type": "file_id", "id": batch.id}}
    with pytest.raises(openai.BadRequestError, match="purpose"):
        owner.evals.runs.create(made(owner), data_source=source)


def test_runs_are_listed_cancelled_and_deleted(start_live: Callable[..., Live]) -> None:
    client = start_live().client()  # executes nothing
    eval_id, other = made(client), made(client)
    graded: Any = {"type": "jsonl", "source": inline({"item": {"q": "a"}, "sample": {"output_text": "x"}})}
    runs = [client.evals.runs.create(eval_id, data_source=graded, name=str(n)).id for n in range(3)]
    assert [run.id for run in client.evals.runs.list(eval_id, limit=2)] == runs
    assert [run.id for run in client.evals.runs.list(eval_id, order="desc")] == runs[::-1]
    assert not list(client.evals.runs.list(other))
    assert client.evals.runs.cancel(runs[1], eval_id=eval_id).status == "canceled"
    assert [run.id for run in client.evals.runs.list(eval_id, status="queued", limit=1)] == [runs[0], runs[2]]
    assert [run.id for run in client.evals.runs.list(eval_id, status="canceled")] == [runs[1]]
    with pytest.raises(openai.ConflictError, match="canceled"):
        client.evals.runs.cancel(runs[1], eval_id=eval_id)
    with pytest.raises(openai.NotFoundError):
        client.evals.runs.retrieve(runs[0], eval_id=other)
    assert client.evals.runs.delete(runs[0], eval_id=eval_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.evals.runs.retrieve(runs[0], eval_id=eval_id)
    assert client.evals.delete(eval_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.evals.runs.list(eval_id)


SLOW = {"type": "python", "name": "slow", "source": "import time\ndef grade(s, i):\n    time.sleep(0.2)\n    return 1"}
MANY: Any = {
    "type": "jsonl",
    "source": inline(*({"item": {"q": str(n)}, "sample": {"output_text": "x"}} for n in range(16))),
}


def test_a_run_that_is_under_way_is_cancelled_and_keeps_what_it_has(live: Live) -> None:
    client = live.client()
    eval_id = made(client, SLOW)
    run = client.evals.runs.create(eval_id, data_source=MANY)
    while not (counts := client.evals.runs.retrieve(run.id, eval_id=eval_id).result_counts).total:
        time.sleep(0.05)  # counts are live
    assert counts.total < 16
    client.evals.runs.cancel(run.id, eval_id=eval_id)
    stopped = ended(client, eval_id, run.id)
    assert stopped.status == "canceled"
    assert 0 < stopped.result_counts.total < 16
    assert len(list(client.evals.runs.output_items.list(run.id, eval_id=eval_id))) == stopped.result_counts.total


def test_after_a_kill_the_next_server_grades_what_is_left(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = Up(home)
    client = first.client()
    eval_id = made(client, SLOW)
    run = client.evals.runs.create(eval_id, data_source=MANY)
    while client.evals.runs.retrieve(run.id, eval_id=eval_id).result_counts.total < 2:
        time.sleep(0.05)
    first.stop(signal.SIGKILL)
    store = Store(home)
    before = [item.id for item in store.evals.items.all("default", parent=run.id)]
    assert 2 <= len(before) < 16
    second = Up(home)
    try:
        finished = ended(second.client(), eval_id, run.id)
        assert finished.result_counts.model_dump() == {"total": 16, "passed": 16, "failed": 0, "errored": 0}
        kept = list(store.evals.items.all("default", parent=run.id))
        assert [item.id for item in kept][: len(before)] == before
        assert sorted(item.number for item in kept) == list(range(16))
        assert store.runs.get(run.id).attempts == 2
    finally:
        assert second.stop() == 0
        store.close()


@pytest.mark.parametrize("major", ["1", "2", "3"])
def test_each_major_of_the_package_reads_the_answers_strictly(live: Live, major: str) -> None:
    folder = SDKS / major
    environment = dict(os.environ)
    if folder.is_dir():
        environment["PYTHONPATH"] = f"{folder}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", PROGRAM, f"{live.url}/v1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
