from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import openai
import pytest

from luthier.workflows import graders
from tests.api.conftest import Live

CHECK = {
    "type": "string_check",
    "name": "right",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "ilike",
}
CODE = {
    "type": "python",
    "name": "short",
    "source": "def grade(sample, item):\n    return 1 - len(sample['output_text']) / item['most']",
}
JUDGE = {"name": "judge", "model": "tiny-base", "input": [{"role": "user", "content": "Good? {{sample.output_text}}"}]}
MULTI = {"type": "multi", "name": "both", "graders": {"a": CHECK, "b": CODE}, "calculate_output": "0.5 * a + 0.5 * b"}
ITEM = {"answer": "paris", "most": 10}


def run(live: Live, grader: Any, sample: str, item: Any = ITEM) -> Any:
    return live.client().fine_tuning.alpha.graders.run(grader=grader, model_sample=sample, item=item)


def test_a_grader_is_run_on_a_sample(live: Live) -> None:
    found = run(live, CHECK, "It is Paris.")
    assert (found.reward, found.sub_rewards) == (1.0, {})
    assert (found.metadata.name, found.metadata.type) == ("right", "string_check")
    assert found.metadata.scores == {"right": 1.0}
    assert not any(value for value in found.metadata.errors.model_dump().values())
    assert (found.metadata.token_usage, found.api_model_grader_token_usage_per_model) == (None, {})


def test_code_is_run_in_the_sandbox(live: Live) -> None:
    assert run(live, CODE, "Paris").reward == 0.5
    failed = run(live, CODE, "Paris", {})
    assert failed.reward == 0.0
    assert failed.metadata.errors.python_grader_runtime_error
    assert "KeyError: 'most'" in failed.metadata.errors.python_grader_runtime_error_details
    spy = CODE | {"source": "def grade(sample, item):\n    return len(open('/etc/passwd').read())"}
    assert "PermissionError" in run(live, spy, "").metadata.errors.python_grader_runtime_error_details


def test_a_formula_gives_its_parts_too(live: Live) -> None:
    found = run(live, MULTI, "Paris")
    assert (found.reward, found.sub_rewards) == (0.75, {"a": 1.0, "b": 0.5})


def test_cosine_uses_an_encoder_of_the_service(live: Live) -> None:
    grader = {"type": "text_similarity", "name": "near", "evaluation_metric": "cosine"}
    grader |= {"input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
    assert run(live, grader, "paris").reward == pytest.approx(1.0, abs=1e-5)
    assert run(live, grader, "nothing like it").reward < 0.999


def test_cosine_is_refused_where_there_is_no_encoder(start_live: Callable[..., Live]) -> None:
    live = start_live()
    grader = {"type": "text_similarity", "name": "near", "evaluation_metric": "cosine", "input": "a", "reference": "b"}
    with pytest.raises(openai.BadRequestError, match="luthier model pull minilm-l6") as caught:
        run(live, grader, "paris")
    assert caught.value.param == "grader.evaluation_metric"


def test_a_model_of_the_service_grades(live: Live) -> None:
    found = run(live, JUDGE | {"type": "label_model", "labels": ["a", "b"], "passing_labels": ["a"]}, "Paris")
    assert found.reward in (0.0, 1.0)
    assert not any(value for value in found.metadata.errors.model_dump().values())
    assert found.metadata.sampled_model_name == "tiny-base"
    usage = found.api_model_grader_token_usage_per_model["tiny-base"]
    assert usage["total_tokens"] == found.metadata.token_usage > 0


def test_a_model_that_does_not_exist_is_not_found(live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        run(live, JUDGE | {"type": "score_model", "model": "nobody"}, "Paris")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("grader", "param", "message"),
    [
        ({"type": "strong_check"}, "grader.type", "Did you mean 'string_check'"),
        ({"name": "x"}, "grader.type", "is required, and one of string_check"),
        (CHECK | {"operation": "lt"}, "grader.operation", "'eq', 'ne'"),
        ({**CHECK, "name": ""}, "grader.name", "at least 1 character"),
        (CHECK | {"input": "{{row.x}}"}, "grader.input", r"only item\.… and sample\.…"),
        (CHECK | {"reference": "{{#if item.x}}"}, "grader.reference", "not valid handlebars"),
        (CODE | {"source": "def grade(:"}, "grader.source", "SyntaxError"),
        (CODE | {"source": "x = 1"}, "grader.source", "does not define grade"),
        (JUDGE | {"type": "score_model", "range": [1, 1]}, "grader.range", "smaller"),
        (JUDGE | {"type": "score_model", "input": []}, "grader.input", "at least 1 item"),
        (
            JUDGE
            | {
                "type": "score_model",
                "input": [{"role": "user", "content": {"type": "input_image", "image_url": "x"}}],
            },
            "grader.input[0].content.type",
            "input_text",
        ),
        (JUDGE | {"type": "label_model", "labels": ["a"], "passing_labels": ["c"]}, "grader.passing_labels", "not one"),
        (MULTI | {"calculate_output": "a + c"}, "grader.calculate_output", "no grader 'c'"),
        (MULTI | {"calculate_output": "a.__class__"}, "grader.calculate_output", "is none of"),
        (MULTI | {"graders": {"a": CHECK | {"input": 3}}}, "grader.graders.a.input", "valid string"),
        (MULTI | {"graders": {"a": MULTI}}, "grader.graders.a.type", "not 'multi'"),
        (MULTI | {"graders": []}, "grader.graders", "must be an object"),
    ],
)
def test_what_is_no_grader_is_refused_with_its_field(live: Live, grader: Any, param: str, message: str) -> None:
    graders = live.client().fine_tuning.alpha.graders
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        graders.validate(grader=grader)
    assert caught.value.param == param
    with pytest.raises(openai.BadRequestError):
        graders.run(grader=grader, model_sample="x", item={})


def test_without_a_sandbox_code_is_refused(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(graders, "SANDBOX", type(graders.SANDBOX)())
    with pytest.raises(openai.BadRequestError, match="no sandbox for Python code on darwin") as caught:
        run(live, CODE, "Paris")
    assert caught.value.param == "grader.source"


def test_a_key_that_only_reads_runs_no_grader(start_live: Callable[..., Live]) -> None:
    live = start_live()
    reader = live.client(live.key("default", "read"))
    with pytest.raises(openai.PermissionDeniedError):
        reader.fine_tuning.alpha.graders.validate(grader=CHECK)  # type: ignore[arg-type]
