"""Graders, each over one sample; the models that grade are played by functions."""

from __future__ import annotations

import asyncio
import json
import random
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import TypeAdapter

from luthier.errors import InputError
from luthier.evaluate.graders.failure import GradingError
from luthier.evaluate.graders.formula import Formula
from luthier.evaluate.graders.grading import Grade, Tools, grade, sample_of
from luthier.evaluate.graders.similarity import MAX_LETTERS, similarity
from luthier.evaluate.graders.template import check_template, item_fields, render
from luthier.evaluate.sandbox.sandbox import Sandbox
from luthier.records.grader import Grader, SimilarityMetric

GRADER: TypeAdapter[Grader] = TypeAdapter(Grader)
JUDGE = {"model": "judge", "input": [{"role": "user", "content": "Judge: {{sample.output_text}}"}]}
LOOPS = "{{#each item.a}}{{#each @root.item.a}}{{#each @root.item.a}}x{{/each}}{{/each}}{{/each}}"
CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"q": 1}'}}


class Judge:
    """Answers every request with the same message, and embeds by counting letters."""

    def __init__(self, **message: Any) -> None:
        self.message = message
        self.asked: list[dict[str, Any]] = []
        self.tools = Tools(self.ask, self.embed, Sandbox())

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        finish = self.message.pop("finish_reason", "stop")
        return {"choices": [{"index": 0, "message": self.message, "finish_reason": finish}], "usage": {}}

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [[float(text.count(letter)) for letter in "abc"] for text in texts]


def graded(written: dict[str, Any], text: str = "", judge: Judge | None = None, **item: Any) -> Grade:
    grader = GRADER.validate_python({"name": "it"} | written)
    return asyncio.run(grade(grader, item, sample_of(text), (judge or Judge()).tools))


# Templates


def test_a_template_names_fields_of_the_item_and_of_the_sample() -> None:
    namespace = {
        "item": {"q": "a<b", "n": 3, "rows": [{"k": "v"}], "a b": 5},
        "sample": sample_of('{"x": [1, 2]}', [CALL]),
    }
    source = "{{item.q}} {{ item.n }} {{item.rows}} {{item.[a b]}} {{sample.output_json.x[1]}}"
    assert render(source, namespace) == 'a<b 3 [{"k": "v"}] 5 2'
    assert render("{{sample.output_tools[0].function.name}}", namespace) == "find"
    assert json.loads(render("{{sample.output_tools}}", namespace)) == [CALL]
    assert render("{{#each item.rows}}{{k}}{{/each}}{{#if item.nobody}}!{{/if}}", namespace) == "v"
    assert render("nothing to fill", namespace) == "nothing to fill"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{item.nobody}}", "invalid_variable_error"),
        ("{{item.q.deeper}}", "invalid_variable_error"),
        ("{{sample.nobody}}", "invalid_variable_error"),
        ("{{sample.output_json.x}}", "sample_parse_error"),
        ("{{sample.output_tools[0].function.name}}", "sample_parse_error"),
    ],
)
def test_what_a_template_names_has_to_be_there(source: str, kind: str) -> None:
    with pytest.raises(GradingError) as caught:
        render(source, {"item": {"q": "text"}, "sample": sample_of("no JSON")})
    assert caught.value.kind == kind


def test_a_template_that_names_anything_else_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"names itme; only item\.… and sample\.… can be named here\. Did you mean .item."
    ):
        check_template("{{itme.q}}", "input")
    with pytest.raises(InputError, match="not valid handlebars"):
        check_template("{{#if item.q}}", "input")
    with pytest.raises(InputError, match="names sample; only item"):
        check_template("a sample. {{sample.output_text}}", "content", ("item",))
    assert item_fields("{{item.a}} {{item.b.c}} {{sample.d}} {{item}}") == {"a", "b"}


# Texts


@pytest.mark.parametrize(
    ("operation", "text", "score"),
    [
        ("eq", "Yes", 1),
        ("eq", "yes", 0),
        ("ne", "yes", 1),
        ("ne", "Yes", 0),
        ("like", "Oh Yes!", 1),
        ("like", "oh yes!", 0),
        ("ilike", "oh yes!", 1),
        ("ilike", "no", 0),
    ],
)
def test_strings_are_compared(operation: str, text: str, score: float) -> None:
    written = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.want}}"}
    found = graded(written | {"operation": operation}, text, want="Yes")
    assert (found.score, found.passed) == (score, bool(score))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("fuzzy_match", 1 - 5 / 45),
        ("bleu", 0.5372849659),
        ("gleu", 11 / 18),
        ("meteor", 0.7433333333),
        ("rouge_1", 5 / 6),
        ("rouge_2", 3 / 5),
        ("rouge_3", 1 / 2),
        ("rouge_4", 1 / 3),
        ("rouge_5", 0),
        ("rouge_l", 5 / 6),
        ("cosine", 1),
    ],
)
def test_each_metric_of_similarity_gives_the_number_of_its_package(metric: SimilarityMetric, expected: float) -> None:
    written = {"type": "text_similarity", "input": "{{sample.output_text}}", "reference": "the cat sat on a mat"}
    found = graded(written | {"evaluation_metric": metric}, "the cat sat on the mat")
    assert found.failures == ()
    assert found.score == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", "meteor", "rouge_1", "rouge_l", "cosine"])
def test_the_same_text_is_most_alike_and_an_empty_one_least(metric: SimilarityMetric) -> None:
    text = "a baby can count " * 3
    written = {"type": "text_similarity", "input": "{{sample.output_text}}", "reference": text}
    same, empty = (graded(written | {"evaluation_metric": metric}, sample).score for sample in (text, ""))
    assert same == pytest.approx(1, abs=0.001)
    assert empty == 0


@pytest.mark.parametrize("words", ["ab", "abcdefgh"])
def test_rouge_l_is_what_its_package_says(words: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    chance, scorer = random.Random(1), RougeScorer(["rougeL"])
    for _ in range(50):
        text, reference = ("-".join(chance.choices(words, k=chance.randrange(30))) for _ in range(2))
        expected = scorer.score(reference, text)["rougeL"].fmeasure
        assert similarity("rouge_l", text, reference) == expected


def test_the_longest_texts_that_are_compared_need_little_memory() -> None:
    text, reference = ("a " * (MAX_LETTERS // 2), "b a " * (MAX_LETTERS // 4))
    similarity("rouge_l", "a", "a")  # imports
    tracemalloc.start()
    assert similarity("rouge_l", text, reference) == 0.5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


def test_a_template_that_would_go_on_and_on_is_an_error_of_the_grader() -> None:
    written = {"type": "string_check", "operation": "eq", "reference": "x", "input": LOOPS}
    found = graded(written, a=["x"] * 1500)
    assert [failure.kind for failure in found.failures] == ["invalid_variable_error"]
    assert "goes through more than 262,144 pieces" in str(found.failures[0])
    assert found.is_error


def test_long_texts_are_not_compared() -> None:
    with pytest.raises(GradingError, match=f"at most {MAX_LETTERS}"):
        similarity("rouge_l", "a" * (MAX_LETTERS + 1), "a")


def test_a_threshold_says_what_passes() -> None:
    written = {"type": "text_similarity", "input": "abcd", "reference": "abcx", "evaluation_metric": "fuzzy_match"}
    assert not graded(written | {"pass_threshold": 0.8}).passed
    assert graded(written | {"pass_threshold": 0.75}).passed


# Models


def test_a_model_labels_a_sample_and_is_bound_to_the_labels() -> None:
    written = JUDGE | {"type": "label_model", "labels": ["good", "bad"], "passing_labels": ["good"]}
    judge = Judge(content='{"label": "good"}')
    found = graded(written, "well", judge)
    assert (found.score, found.passed, found.failures) == (1.0, True, ())
    (request,) = judge.asked
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert request["messages"][1]["content"] == "Judge: well"
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["label"]["enum"] == ["good", "bad"]
    assert not graded(written, "well", Judge(content='{"label": "bad"}')).passed
    assert found.exchanges[0].model == "judge"


def test_a_model_scores_a_sample_within_a_range() -> None:
    sampling = {"max_completions_tokens": 9, "seed": 3, "temperature": 0.5}
    written = JUDGE | {"type": "score_model", "range": [1, 5], "sampling_params": sampling}
    judge = Judge(content='{"score": 4}')
    found = graded(written, "well", judge)
    assert (found.score, found.passed) == (4.0, True)
    assert judge.asked[0]["max_completion_tokens"] == 9
    assert (judge.asked[0]["seed"], judge.asked[0]["temperature"]) == (3, 0.5)
    assert not graded(written, "well", Judge(content='{"score": 2.5}')).passed
    assert graded(written | {"pass_threshold": 2}, "well", Judge(content='{"score": 2.5}')).passed


def test_what_form_the_answer_has_is_said_in_the_system_message() -> None:
    messages = [
        {"role": "system", "content": "Be strict."},
        {"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]},
    ]
    judge = Judge(content='{"score": 1}')
    graded({"type": "score_model", "model": "judge", "input": messages}, judge=judge)
    first, second = judge.asked[0]["messages"]
    assert first["content"].startswith("Be strict.\n\n")
    assert "from 0 to 1" in first["content"]
    assert second == {"role": "user", "content": "ab"}


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        ({"content": "four"}, "model_grader_parse_error", "has no score"),
        ({"content": '{"score": "4"}'}, "model_grader_parse_error", "no score"),
        ({"content": '{"score": true}'}, "model_grader_parse_error", "no score"),
        ({"content": '{"score": 7}'}, "model_grader_parse_error", "not within 0 to 1"),
        ({"content": '{"sc', "finish_reason": "length"}, "model_grader_parse_error", "cut off"),
        ({"content": None, "refusal": "I will not."}, "model_grader_refusal_error", "I will not."),
    ],
)
def test_an_answer_without_a_score_is_an_error_of_the_grader(message: dict[str, Any], kind: str, text: str) -> None:
    found = graded(JUDGE | {"type": "score_model"}, judge=Judge(**message))
    assert (found.score, found.passed, found.is_error) == (0.0, False, True)
    (failure,) = found.failures
    assert failure.kind == kind
    assert text in str(failure)


# Code


def test_code_grades_in_the_sandbox() -> None:
    source = "def grade(sample, item):\n    return len(sample['output_json']['words']) / item['most']"
    found = graded({"type": "python", "source": source}, '{"words": ["a", "b"]}', most=4)
    assert (found.score, found.passed) == (0.5, True)


@pytest.mark.parametrize(
    ("line", "kind"), [("1 / 0", "python_grader_runtime_error"), ("None", "unresponsive_reward_error")]
)
def test_code_without_a_score_is_an_error_of_the_grader(line: str, kind: str) -> None:
    found = graded({"type": "python", "source": f"def grade(sample, item):\n    return {line}"})
    assert [failure.kind for failure in found.failures] == [kind]
    assert found.is_error


# Several


def check(reference: str) -> dict[str, Any]:
    shared = {"type": "string_check", "name": reference, "input": "{{sample.output_text}}", "operation": "ilike"}
    return shared | {"reference": reference}


def test_a_formula_joins_graders() -> None:
    written = {"type": "multi", "graders": {"a": check("red"), "b": check("blue")}, "calculate_output": "(a + b) / 2"}
    found = graded(written, "red wine")
    assert (found.score, found.passed) == (0.5, True)
    assert {name: part.score for name, part in found.parts.items()} == {"a": 1.0, "b": 0.0}
    failed = graded(written | {"calculate_output": "a / b"}, "red wine")
    assert [failure.kind for failure in failed.failures] == ["formula_parse_error"]


def test_a_part_without_a_score_counts_nothing_and_does_not_pass() -> None:
    parts = {"a": check("red"), "b": check("blue") | {"reference": "{{item.nobody}}"}}
    found = graded({"type": "multi", "graders": parts, "calculate_output": "a + b"}, "red wine")
    assert (found.score, found.passed, found.is_error) == (1.0, False, True)


def test_a_sample_that_is_not_what_a_grader_reads_fails_without_an_error() -> None:
    found = graded(check("x") | {"input": "{{sample.output_json.x}}"}, "no JSON")
    assert (found.passed, found.is_error, len(found.failures)) == (False, False, 1)


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("a + b ^ 2", 19),
        ("-a ^ 2 + 2 * (b - 1)", -3),
        ("min(a, b, 2) + max(a, b)", 6),
        ("abs(-a) + floor(2.7) + ceil(0.2)", 6),
        ("sqrt(b) + log(exp(1)) - 1e-1", 2.9),
        ("1", 1),
    ],
)
def test_a_formula_is_calculated(formula: str, value: float) -> None:
    assert Formula(formula, {"a", "b"}).value({"a": 3, "b": 4}) == pytest.approx(value)


@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os').system('true')",
        "a.real",
        "a if b else 1",
        "[a][0]",
        "lambda: 1",
        "(a := 1)",
        "'a'",
        "True",
        "a == b",
        "a // b",
        "max(*a)",
        "min(a, key=b)",
        "min()",
        "sqrt(a, b)",
        "print(a)",
        "c",
        "a b",
        "",
        "9" * 400,
        "(" * 400 + "a" + ")" * 400,
        "a\x00",
    ],
)
def test_anything_but_a_formula_is_refused(formula: str) -> None:
    with pytest.raises(InputError, match="is not a formula"):
        Formula(formula, {"a", "b"})


@pytest.mark.parametrize("formula", ["a / 0", "9 ^ 9 ^ 9", "(-8) ^ 0.5", "log(0)", "exp(1e9)", "1e308 * 10"])
def test_a_formula_without_a_finite_value_says_so(formula: str) -> None:
    with pytest.raises(InputError, match=r"no (finite )?value"):
        Formula(formula, {"a"}).value({"a": 3})
