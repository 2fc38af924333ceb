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
    stored(client)
    batch(client)
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
    body = {"model": BASE, "messages": HELLO, "max_tokens": 3}
    lines = [
        {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number in range(5)
    ]
    content = io.BytesIO("\n".join(map(json.dumps, lines)).encode())
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"for": "test"}
    )
    done = until(lambda: client.batches.retrieve(made.id), lambda it: it.status in ("completed", "failed"))
    assert done.status == "completed", done
    assert done.request_counts.completed == 5
    answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]


def fine_tuning(client: openai.OpenAI) -> str:
    """Tune a model on an uploaded file, and ask it and its checkpoint."""
    rows = [
        {"messages": [{"role": "user", "content": f"number {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(12)
    ]
    content = io.BytesIO("\n".join(map(json.dumps, rows)).encode())
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
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


def until(look: Callable[[], Any], is_done: Callable[[Any], bool]) -> Any:
    """Look until it is done."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not is_done(found := look()):
        assert time.monotonic() < end, found
        time.sleep(0.2)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
