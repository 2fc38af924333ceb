"""The spine on a tiny model: every form of the tuned model is real, agrees, and is better than its base."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.errors import ConflictError, IntegrityError, NotFoundError
from luthier.llm.local import LocalModel
from luthier.llm.remote import RemoteModel
from luthier.records.completion import Sampling
from luthier.records.example import Conversation, Message
from luthier.store.artifacts import check_hashes
from luthier.templates.chat_format import ChatFormat
from luthier.workflows.evaluation import side_by_side
from luthier.workflows.models import SERVED_FORM, export, served_folder
from luthier.workflows.parity import measure_parity
from luthier.workflows.serving import server_process
from tests.workflows.conftest import Way

PROMPT = [
    Message(role="system", content="Answer."),
    Message(role="user", content="please help me with my order and the fox 3"),
]


def test_the_record_of_a_model_reproduces_it(way: Way) -> None:
    model = way.store.models.get(way.model.name)
    assert model.name.startswith("ft:tiny-base:local:spine:")
    assert model.base_sha256 == way.store.models.base("tiny-base").sha256
    assert (model.dataset, model.dataset_hash) == (way.dataset.reference, way.dataset.content_hash)
    assert model.template == way.template
    assert model.hyperparameters.epochs == 8
    assert model.seed == 0
    assert model.training.best_valid_loss is not None
    for artifact in model.artifacts.values():
        check_hashes(way.store.models.artifact_folder(artifact), artifact.sha256)


def test_the_tuned_model_is_better_and_the_interval_is_clear_of_zero(way: Way) -> None:
    difference = way.evaluation.differences["tuned_minus_base"]["macro_recall"]
    assert way.evaluation.scores["tuned"].metrics["macro_recall"] > 0.9
    assert difference.low > 0


def test_every_answer_of_every_contestant_is_kept(way: Way) -> None:
    rows = side_by_side(way.store, way.evaluation)
    assert len(rows) == way.evaluation.examples
    assert all(set(row["answers"]) == {"base", "few_shot", "tuned"} for row in rows)
    wrong = side_by_side(way.store, way.evaluation, wrong=True)
    assert len(wrong) < len(rows)


def test_perplexity_is_measured_for_every_contestant(way: Way) -> None:
    perplexity = {name: scores.metrics["perplexity"] for name, scores in way.evaluation.scores.items()}
    assert set(perplexity) == {"base", "few_shot", "tuned"}
    assert 1 <= perplexity["tuned"] < perplexity["base"]


def test_all_forms_agree_with_the_adapter(way: Way) -> None:
    assert way.model.parity is not None
    assert {form.form for form in way.model.parity.forms} == {"merged", "gguf", "served"}
    assert way.model.parity.prompts >= 45
    assert all(form.token_agreement >= 0.9 for form in way.model.parity.forms)
    assert all(form.mean_logprob_difference is not None for form in way.model.parity.forms)


def test_another_model_in_the_place_of_the_export_is_a_drift(way: Way, tiny_base: Path) -> None:
    store, model = way.store, way.model
    base_gguf = served_folder(store, "tiny-base")
    wrong = model.artifacts[SERVED_FORM].model_copy(
        update={"path": base_gguf.relative_to(store.artifacts.root).as_posix()}
    )
    answer = Message(role="assistant", content="no")
    held_out = []
    for index in range(4):
        question = Message(role="user", content=f"thank you for my dog {index}")
        held_out.append(Conversation(example_id=str(index), messages=(PROMPT[0], question, answer)))
    parity = measure_parity(store, model.name, tiny_base, {**model.artifacts, SERVED_FORM: wrong}, held_out, 0.9)
    assert not parity.passed


def test_adapter_and_merged_load_in_plain_peft_and_transformers(way: Way, tiny_base: Path, tmp_path: Path) -> None:
    export(way.store, way.model.name, "adapter", tmp_path / "adapter")
    export(way.store, way.model.name, "merged", tmp_path / "merged")
    tokens = torch.tensor([ChatFormat.load(tiny_base).prompt_tokens(PROMPT)])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        left, right = adapted(input_ids=tokens).logits[0, -1], merged(input_ids=tokens).logits[0, -1]
    assert float((left - right).abs().max()) < 1e-3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    chat = [{"role": m.role, "content": m.content} for m in PROMPT]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text, add_special_tokens=False).input_ids == tokens[0].tolist()


@pytest.mark.parametrize("form", ["gguf-q8_0", "gguf-f16"])
def test_an_exported_gguf_answers_in_openvino_and_in_llama_cpp(way: Way, tmp_path: Path, form: str) -> None:
    import xllamacpp

    export(way.store, way.model.name, form, tmp_path / form)  # type: ignore[arg-type]
    local = LocalModel(tmp_path / form, "exported")
    try:
        answer = local.answer([PROMPT], Sampling(max_tokens=8))[0]
    finally:
        local.close()
    assert answer.text == "yes"
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(tmp_path / form / "model.gguf")
    parameters.n_ctx, parameters.n_parallel = 512, 1
    tokens = ChatFormat.load(tmp_path / form).prompt_tokens(PROMPT)
    request = {"prompt": tokens, "n_predict": 8, "temperature": 0.0}
    reply = xllamacpp.Server(parameters).handle_completions(request)
    assert reply["choices"][0]["text"] == "yes"


def test_an_export_never_overwrites(way: Way, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep")
    with pytest.raises(ConflictError, match="not an empty folder"):
        export(way.store, way.model.name, "adapter", tmp_path / "full")
    assert (tmp_path / "full" / "precious.txt").read_text() == "keep"


def test_a_changed_artifact_is_not_exported(way: Way, tmp_path: Path) -> None:
    folder = way.store.models.artifact_folder(way.model.artifacts["adapter"])
    config = folder / "adapter_config.json"
    original = config.read_text()
    try:
        config.write_text(original + " ")
        with pytest.raises(IntegrityError, match=r"adapter_config\.json has changed|not the recorded"):
            export(way.store, way.model.name, "adapter", tmp_path / "adapter")
    finally:
        config.write_text(original)


def test_the_openai_package_talks_to_the_served_model(way: Way) -> None:
    folder = served_folder(way.store, way.model.name)
    with server_process(way.store.home, {way.model.name: folder}) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True)
        assert [model.id for model in client.models.list()] == [way.model.name]
        chat = [{"role": m.role, "content": m.content} for m in PROMPT]
        reply = client.chat.completions.create(model=way.model.name, messages=chat, temperature=0)  # type: ignore[arg-type]
        assert reply.choices[0].message.content == "yes"
        stream = client.chat.completions.create(
            model=way.model.name,
            messages=chat,  # type: ignore[arg-type]
            temperature=0,
            stream=True,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "yes"


def test_stages_and_metrics_of_the_run_are_in_its_events(way: Way) -> None:
    events = way.store.runs.events(way.model.run_id)
    stages = [event.data["stage"] for event in events if event.type == "stage" and "seconds" in event.data]
    assert stages == ["plan", "train", "export", "parity"]
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == sorted(steps)
    assert steps[-1] == way.model.training.steps
    folder = way.store.run_folder(way.model.run_id)
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((folder / "checkpoints" / "latest" / "state.json").read_text())["step"] == steps[-1]


def test_an_unknown_model_gets_a_suggestion(way: Way) -> None:
    with pytest.raises(NotFoundError, match="Did you mean"):
        way.store.models.get(way.model.name[:-1] + "x")


def test_a_key_in_the_environment_does_not_lock_out_the_parity_check(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_API_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    folder = served_folder(way.store, way.model.name)
    with server_process(way.store.home, {way.model.name: folder}) as url:
        remote = RemoteModel(f"{url}/v1", way.model.name, want_tokens=True)
        answer = remote.answer([PROMPT], Sampling(max_tokens=8))[0]
        remote.close()
    assert answer.text == "yes"
    assert answer.tokens is not None


ORPHANS = """
import os, signal, sys
from pathlib import Path
from luthier.workflows.serving import server_process
with server_process(Path(sys.argv[1]), {"m": Path(sys.argv[2])}) as url:
    print(url, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_server_does_not_outlive_the_process_that_started_it(way: Way) -> None:
    folder = served_folder(way.store, way.model.name)
    command = [sys.executable, "-c", ORPHANS, str(way.store.home), str(folder)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    port = int(killed.stdout.strip().rsplit(":", 1)[1])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError("the server still listens")
