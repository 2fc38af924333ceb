"""The command line as a person uses it: in a process of its own, in an empty home."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier.store.store import Store
from luthier.workflows.models import pull
from tests.workflows.conftest import write_questions


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def luthier(home: Path, *arguments: str, ok: bool = True, given: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "luthier", *arguments]
    environment = {**os.environ, "LUTHIER_HOME": str(home), "COLUMNS": "120"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, input=given)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_help_does_not_import_heavy_libraries() -> None:
    script = (
        "import sys, luthier.cli.main as m\ntry: m.app(['--help'])\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert "Tune language models" in done.stdout
    for heavy in ("torch", "transformers", "openvino", "sqlalchemy", "pydantic"):
        assert f"'{heavy}'" not in loaded


def test_a_newcomer_gets_from_a_file_to_a_plan(home: Path, tmp_path: Path, tiny_base: Path) -> None:
    questions = write_questions(tmp_path / "questions.csv")
    luthier(home, "model", "pull", str(tiny_base))
    assert "120 examples taken, 0 rows left out" in luthier(home, "dataset", "import", str(questions)).stdout
    divided = luthier(home, "dataset", "split", "questions", "--label", "label", "--near", "0").stdout
    assert "train" in divided
    luthier(home, "template", "save", "answer", "--user", "{{text}}", "--assistant", "{{label}}")
    shown = luthier(home, "template", "preview", "questions", "answer", "--base", "tiny-base").stdout
    assert "Tokens with loss" in shown
    plan = json.loads(
        luthier(
            home, "train", "questions", "-t", "answer", "-b", "tiny-base", "--plan", "-o", "epochs=2", "--json"
        ).stdout
    )
    assert plan["resolved"]["epochs"] == 2
    assert plan["reasons"]


def test_pairs_of_answers_are_shown_with_both_answers(home: Path, tmp_path: Path, tiny_base: Path) -> None:
    turn = {"role": "user", "content": "hello"}
    good, bad = ({"role": "assistant", "content": text} for text in ("good morning", "maybe"))
    rows = [
        {"prompt": [turn], "chosen": [good], "rejected": [bad], "margin": 2},
        {"chosen": [turn], "rejected": [turn]},
    ]
    chat, plain = tmp_path / "chat.jsonl", tmp_path / "plain.csv"
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    plain.write_text("q,better,worse\nhello,good morning,maybe\n", "utf-8")
    luthier(home, "model", "pull", str(tiny_base))
    imported = luthier(home, "dataset", "import", str(chat)).stdout
    assert "line 2: chosen and rejected are equal" in imported
    assert "Fields: margin" in imported
    assert "rejected" in luthier(home, "dataset", "show", "chat").stdout
    luthier(home, "dataset", "import", str(plain))
    texts = ("--user", "{{q}}", "--assistant", "{{better}}", "--rejected", "{{worse}}")
    luthier(home, "template", "save", "prefer", *texts)
    for dataset in (("chat",), ("plain", "prefer")):
        shown = luthier(home, "template", "preview", *dataset, "--base", "tiny-base").stdout
        assert "good morning<|im_end|>" in shown
        assert "rejected answer" in shown
        assert "maybe<|im_end|>" in shown


def test_all_bad_options_are_named_at_once(home: Path, tmp_path: Path) -> None:
    luthier(home, "dataset", "import", str(write_questions(tmp_path / "questions.csv")))
    failed = luthier(home, "train", "questions", "-o", "epocs=2", "-o", "lora_dropout=3", ok=False)
    assert "Did you mean 'epochs'?" in failed.stderr
    assert "lora_dropout" in failed.stderr


def test_bad_rows_are_listed_with_their_lines(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a;b\n1;2\n3\n4;5;6\n7;8\n", "utf-8")
    shown = luthier(home, "dataset", "import", str(path)).stdout
    assert "2 examples taken, 2 rows left out" in shown
    assert "line 3" in shown
    assert "line 4" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dataset", "show", "nothing"), "There is no dataset 'nothing'"),
        (("dataset", "import", "missing.csv"), "missing.csv"),
        (("run", "logs", "train-0"), "There is no run 'train-0'"),
        (("model", "show", "ft:x"), "There is no tuned model 'ft:x'"),
        (("model", "export", "x", "--form", "gguf", "--to", "y"), "There is no form 'gguf'"),
        (("serve", "--host", "0.0.0.0"), "there is no key"),  # noqa: S104 - is refused
        (("serve", "--port", "99999"), "Invalid value for '--port'"),
        (("up", "--port", "-1"), "Invalid value for '--port'"),
        (("train", "questions", "--suffix", "a b"), "The suffix 'a b' is not 1 to 64 of the letters"),
        (("train", "questions", "--suffix", "-a", "--plan"), "The suffix '-a' is not 1 to 64 of the letters"),
        (("serve", "--extra", "foo"), "--extra takes NAME=FOLDER, each name once; not 'foo'."),
        (("serve", "--extra", "foo="), "not 'foo='."),
        (("serve", "--extra", "foo=a", "--extra", "foo=b"), "not 'foo=b'."),
        (("serve", "--extra", "foo=nowhere", "--port", "0"), "foo: no folder nowhere"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(home: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in luthier(home, *arguments, ok=False).stderr


def test_a_further_model_without_what_serving_needs_is_refused_at_the_start(home: Path, tiny_base: Path) -> None:
    lacks_tokenizer = home.with_name("lacks-tokenizer")
    lacks_tokenizer.mkdir()
    (lacks_tokenizer / "model.gguf").write_bytes(b"GGUF")
    further = ("--extra", f"one={tiny_base}", "--extra", f"two={lacks_tokenizer}")
    refused = luthier(home, "serve", "--port", "0", *further, ok=False).stderr
    assert f"one: {tiny_base} has no model.gguf" in refused
    assert f"two: {lacks_tokenizer} has no tokenizer.json" in refused
    assert "luthier model export" in refused


def test_a_model_chats_in_the_terminal(home: Path, tiny_base: Path) -> None:
    pull(Store(home), str(tiny_base))
    done = luthier(home, "chat", "tiny-base", "--temperature", "0", "--max-tokens", "4", given="hello\n\n")
    assert "tiny-base" in done.stderr


def test_ctrl_c_pauses_a_run_and_says_how_to_go_on(home: Path, tmp_path: Path, tiny_base: Path) -> None:
    store = Store(home)
    pull(store, str(tiny_base))
    luthier(home, "dataset", "import", str(write_questions(tmp_path / "questions.csv")))
    luthier(home, "dataset", "split", "questions", "--near", "0")
    luthier(home, "template", "save", "answer", "--user", "{{text}}", "--assistant", "{{label}}")
    options = ["-o", "epochs=100", "-o", "batch_size=4", "-o", "precision=float32", "--parity-prompts", "0"]
    command = [sys.executable, "-m", "luthier", "train", "questions", "-t", "answer", "-b", "tiny-base", *options]
    environment = {**os.environ, "LUTHIER_HOME": str(home)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while not (runs := store.runs.all()) or not store.runs.events(runs[0].id, type="metrics"):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"luthier run resume {runs[0].id}" in errors
    assert store.runs.get(runs[0].id).status == "paused"


def test_an_encoder_is_shown_as_one_and_refuses_to_chat(home: Path, tiny_encoder: Path) -> None:
    pulled = luthier(home, "model", "pull", str(tiny_encoder)).stdout
    assert "tiny-encoder: encoder" in pulled
    assert "For classification and embeddings (/v1/embeddings); it does not write, so it does not chat." in pulled
    for command in (("list",), ("show", "tiny-encoder"), ("catalogue",)):
        assert "encoder" in luthier(home, "model", *command).stdout
    assert json.loads(luthier(home, "model", "show", "tiny-encoder", "--json").stdout)["kind"] == "encoder"
    refused = luthier(home, "chat", "tiny-encoder", ok=False).stderr
    assert "'tiny-encoder' is an encoder (BertModel)" in refused
    assert "luthier model catalogue" in refused
