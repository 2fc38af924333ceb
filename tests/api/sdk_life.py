"""A program written for OpenAI, from a file to a tuned model and its evaluation, strict: ``sdk_life.py BASE_URL``.

:mod:`tests.api.test_sdk_majors` runs it with three majors of the ``openai`` package against one running service.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import openai
from pydantic import BaseModel

BASE = "tiny-base"
HELLO = [{"role": "user", "content": "hello"}]
DEADLINE_SECONDS = 240


def main(url: str) -> None:
    """Go through the whole surface with a client that refuses any field that is not as its types say."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True)
    assert BASE in [model.id for model in client.models.list()]
    assert client.models.retrieve(BASE).object == "model"
    chat(client)
    others(client)
    bound(client)
    stored(client)
    batch(client)
    uploaded(client)
    stopped(client)
    tuned = fine_tuning(client)
    evaluation(client, tuned)
    assert client.models.delete(tuned).deleted
    sys.stdout.write(json.dumps({"openai": openai.__version__, "tuned": tuned}))


def chat(client: openai.OpenAI) -> None:
    """Ask once, in several ways."""
    answer = client.chat.completions.create(
        model=BASE, messages=HELLO, max_tokens=4, n=2, seed=1, logprobs=True, stop=["zzz"], temperature=0.5
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs.content
    chunks = list(
        client.chat.completions.create(
            model=BASE, messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens > 0
    try:
        client.chat.completions.create(model="nobody", messages=HELLO)
    except openai.NotFoundError as error:
        code = error.code
    assert code == "model_not_found"


def others(client: openai.OpenAI) -> None:
    """Completions, embeddings and responses."""
    assert client.completions.create(model=BASE, prompt="hello", max_tokens=3).choices[0].finish_reason
    assert len(client.embeddings.create(model="tiny-encoder", input=["one", "two"]).data) == 2
    response = client.responses.create(model=BASE, input="hello", max_output_tokens=16)
    assert response.status in ("completed", "incomplete")
    types = [event.type for event in client.responses.create(model=BASE, input="hi", max_output_tokens=16, stream=True)]
    assert types[0] == "response.created"
    assert types[-1] in ("response.completed", "response.incomplete")


class Opinion(BaseModel):
    """What an answer is bound to."""

    agrees: bool


def bound(client: openai.OpenAI) -> None:
    """Ask for an object of a class."""
    chats: Any = client.chat.completions if hasattr(client.chat.completions, "parse") else client.beta.chat.completions
    answer = chats.parse(model=BASE, messages=HELLO, response_format=Opinion, max_tokens=64)
    assert isinstance(answer.choices[0].message.parsed, Opinion)


def uploaded(client: openai.OpenAI) -> None:
    """Bring a file in parts, and give another one up."""
    content = "".join(json.dumps(row) + "\n" for row in examples()).encode()
    about = {"filename": "parts.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    upload = client.uploads.create(bytes=len(content), **about)
    parts = [client.uploads.parts.create(upload.id, data=data).id for data in (content[:99], content[99:])]
    done = client.uploads.complete(upload.id, part_ids=parts)
    assert done.status == "completed"
    assert client.files.content(done.file.id).read() == content
    other = client.uploads.create(bytes=len(content), **about)
    assert client.uploads.cancel(other.id).status == "cancelled"


def stopped(client: openai.OpenAI) -> None:
    """Pause a job on preferences, resume it, cancel it; cancel a batch."""
    pairs = [
        {
            "input": {"messages": row["messages"][:1]},
            "preferred_output": row["messages"][1:],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
        for row in examples()
    ]
    file = client.files.create(file=("pairs.jsonl", lines_of(pairs)), purpose="fine-tune")
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 50, "batch_size": 1, "beta": 0.2}}}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, method=method, metadata={"for": "stop"})
    client.fine_tuning.jobs.pause(job.id)
    until(lambda: client.fine_tuning.jobs.retrieve(job.id), lambda it: it.x_paused)  # the package has no such status
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "validating_files", "running")
    client.fine_tuning.jobs.cancel(job.id)
    until(lambda: client.fine_tuning.jobs.retrieve(job.id), lambda it: it.status == "cancelled")
    body = {"model": BASE, "messages": HELLO, "max_tokens": 500}
    made = client.batches.create(
        input_file_id=client.files.create(file=("many.jsonl", requests(body, 300)), purpose="batch").id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
    )
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    until(lambda: client.batches.retrieve(made.id), lambda it: it.status == "cancelled")


def stored(client: openai.OpenAI) -> None:
    """Keep an answer, find it by its label, change the label, delete it."""
    kept = client.chat.completions.create(
        model=BASE, messages=HELLO, max_tokens=4, store=True, metadata={"ticket": openai.__version__}
    )
    found = client.chat.completions.list(metadata={"ticket": openai.__version__})
    assert [completion.id for completion in found] == [kept.id]
    # The package's type of these messages knows the role "assistant" alone: a strict client reads no question at all.
    loose = openai.OpenAI(base_url=str(client.base_url), api_key="none", max_retries=0)
    assert loose.chat.completions.messages.list(kept.id).data[0].content == "hello"
    assert client.chat.completions.update(kept.id, metadata={"done": "yes"}).metadata == {"done": "yes"}
    assert client.chat.completions.delete(kept.id).deleted


def batch(client: openai.OpenAI) -> None:
    """Send a file of requests, and read the file of answers."""
    content = requests({"model": BASE, "messages": HELLO, "max_tokens": 3}, 5)
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"for": "test"}
    )
    done = until(lambda: client.batches.retrieve(made.id), lambda it: it.status in ("completed", "failed"))
    assert done.status == "completed", done
    assert done.request_counts.completed == 5
    answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"line-{number}" for number in range(5)]


def fine_tuning(client: openai.OpenAI) -> str:
    """Tune a model on an uploaded file, and ask it and its checkpoint."""
    file = client.files.create(file=("train.jsonl", lines_of(examples())), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="life",
        seed=7,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 8, "batch_size": 4, "learning_rate_multiplier": 5.0}},
        },
    )
    assert job.id in [one.id for one in client.fine_tuning.jobs.list()]
    job = until(
        lambda: client.fine_tuning.jobs.retrieve(job.id), lambda it: it.status in ("succeeded", "failed", "cancelled")
    )
    assert job.status == "succeeded", job
    events = client.fine_tuning.jobs.list_events(job.id).data
    assert any(event.type == "metrics" for event in events)
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    assert "train_loss" in client.files.content(job.result_files[0]).text
    for name in (job.fine_tuned_model, checkpoint):
        assert client.chat.completions.create(model=name, messages=HELLO, max_tokens=2).model == name
    return str(job.fine_tuned_model)


def evaluation(client: openai.OpenAI, model: str) -> None:
    """Evaluate a model over items given in the request."""
    made = client.evals.create(
        name="says it",
        data_source_config={
            "type": "custom",
            "item_schema": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
            "include_sample_schema": True,
        },
        testing_criteria=[
            {
                "type": "string_check",
                "name": "not empty",
                "input": "{{sample.output_text}}",
                "reference": "nothing like this",
                "operation": "ne",
            }
        ],
    )
    run = client.evals.runs.create(
        made.id,
        name="first",
        data_source={
            "type": "completions",
            "model": model,
            "source": {"type": "file_content", "content": [{"item": {"q": "one"}}, {"item": {"q": "two"}}]},
            "input_messages": {"type": "template", "template": [{"role": "user", "content": "{{item.q}}"}]},
            "sampling_params": {"max_completion_tokens": 4},
        },
    )
    run = until(
        lambda: client.evals.runs.retrieve(run.id, eval_id=made.id), lambda it: it.status in ("completed", "failed")
    )
    assert run.result_counts.passed == 2, run
    assert len(list(client.evals.runs.output_items.list(run.id, eval_id=made.id))) == 2
    assert client.evals.delete(made.id).deleted


def examples() -> list[dict[str, Any]]:
    """Return conversations to learn."""
    return [
        {"messages": [{"role": "user", "content": f"number {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(12)
    ]


def requests(body: dict[str, Any], count: int) -> io.BytesIO:
    """Return a file of so many requests."""
    url = "/v1/chat/completions"
    return lines_of([{"custom_id": f"line-{n}", "method": "POST", "url": url, "body": body} for n in range(count)])


def lines_of(rows: list[dict[str, Any]]) -> io.BytesIO:
    """Return rows as a file."""
    return io.BytesIO("\n".join(map(json.dumps, rows)).encode())


def until(look: Callable[[], Any], is_done: Callable[[Any], bool]) -> Any:
    """Look until it is done."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not is_done(found := look()):
        assert time.monotonic() < end, found
        time.sleep(0.2)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
