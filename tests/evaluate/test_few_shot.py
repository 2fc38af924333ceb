from collections import Counter

import pytest

from luthier.errors import CapacityError, EngineError, InputError
from luthier.evaluate.few_shot import candidates, choose, with_shots
from luthier.llm.scripted import ScriptedModel
from luthier.records.completion import Sampling
from luthier.records.example import Conversation, Message

GREEDY = Sampling(max_tokens=8)
LABELS = ("good", "bad", "mixed")


def conversation(number: int, question: str, answer: str) -> Conversation:
    turns = (("system", "Judge."), ("user", question), ("assistant", answer))
    messages = tuple(Message(role=role, content=text) for role, text in turns)
    return Conversation(example_id=f"e{number}", messages=messages)


def training(labels=LABELS, each: int = 20) -> list[Conversation]:
    return [
        conversation(i, f"{label} {i:03} " + "long " * (i % each), label)
        for i, label in enumerate(label for label in labels for _ in range(each))
    ]


def shot(question: str, answer: str) -> tuple[Message, ...]:
    return (Message(role="user", content=question), Message(role="assistant", content=answer))


def drawn_labels(shots) -> Counter:
    return Counter(message.content for message in shots if message.role == "assistant")


def test_label_candidates_have_as_many_examples_of_each_label():
    made = candidates(training(), "label", LABELS, seed=0)
    assert list(made) == [f"{count} per label, draw {draw}" for count in (1, 2, 4) for draw in (1, 2)]
    for name, shots in made.items():
        assert drawn_labels(shots) == dict.fromkeys(LABELS, int(name[0]))
        assert [message.role for message in shots] == ["user", "assistant"] * (len(shots) // 2)


@pytest.mark.parametrize(("labels", "counts"), [(5, [1, 2, 3]), (10, [1]), (16, [1])])
def test_label_candidates_have_at_most_sixteen_shots(labels, counts):
    names = [f"class {i:02}" for i in range(labels)]
    made = candidates(training(names), "label", names)
    assert sorted({len(shots) // 2 for shots in made.values()}) == [count * labels for count in counts]


def test_with_more_labels_than_shots_sixteen_labels_are_drawn():
    names = [f"class {i:02}" for i in range(40)]
    made = candidates(training(names, each=4), "label", names)
    assert list(made) == ["16 labels, draw 1", "16 labels, draw 2"]
    assert all(len(drawn_labels(shots)) == 16 for shots in made.values())
    assert len({frozenset(drawn_labels(shots)) for shots in made.values()}) == 2


def test_the_order_of_the_labels_is_shuffled():
    orders = {
        tuple(message.content for message in shots if message.role == "assistant")
        for seed in range(8)
        for name, shots in candidates(training(), "label", LABELS, seed=seed).items()
        if name.startswith("1")
    }
    assert len(orders) > 1


def test_text_candidates_have_one_three_and_five_examples():
    made = candidates(training(), "text")
    assert {name: len(shots) // 2 for name, shots in made.items()} == {
        "1 example, draw 1": 1,
        "1 example, draw 2": 1,
        "3 examples, draw 1": 3,
        "3 examples, draw 2": 3,
        "5 examples, draw 1": 5,
        "5 examples, draw 2": 5,
    }


def test_only_the_shorter_half_of_each_label_is_drawn():
    train = training() + [conversation(100 + i, "x" * (1000 + i), "verbose") for i in range(4)]
    for seed in range(5):
        for shots in candidates(train, "label", (*LABELS, "verbose"), seed=seed).values():
            questions = [message.content for message in shots if message.role == "user"]
            assert all(question.count("long") < 10 for question in questions)
            assert all(len(question) < 1002 for question in questions)


def test_the_same_seed_draws_the_same_shots_and_another_others():
    first, again, other = (candidates(training(), "label", LABELS, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_few_training_examples_make_few_candidates():
    made = candidates([conversation(0, "sun", "warm")], "text")
    assert made == {"1 example, draw 1": shot("sun", "warm")}


def test_nothing_to_draw_from_is_an_error():
    with pytest.raises(InputError, match="no training example is given"):
        candidates([], "text")
    with pytest.raises(InputError, match="no training example has one of the labels"):
        candidates([conversation(0, "sun", "warm")], "label", LABELS)


def test_shots_follow_the_system_message():
    prompt = conversation(0, "sun", "good").prompt
    assert [message.content for message in with_shots(prompt, shot("a", "b"))] == ["Judge.", "a", "b", "sun"]


VALIDATION = [conversation(0, "sun", "good"), conversation(1, "rain", "bad")]
TRIED = {"none helps": shot("wind", "mixed"), "helps, long": shot("the snow", "good"), "helps": shot("snow", "good")}


def learns_from_snow(prompt) -> str:
    learned = any("snow" in message.content for message in prompt)
    return {"sun": "good", "rain": "bad"}[prompt[-1].content] if learned else "good"


def test_the_best_candidate_on_validation_wins_and_of_equals_the_shorter():
    heard = []
    model = ScriptedModel(rule=learns_from_snow)
    choice = choose(
        model, TRIED, VALIDATION, GREEDY, "label", LABELS, "macro_recall", lambda *numbers: heard.append(numbers)
    )
    assert choice.shots == TRIED["helps"]
    assert (choice.validation_score, choice.validation_examples) == (1.0, 2)
    assert choice.tried == {"none helps": 0.5, "helps, long": 1.0, "helps": 1.0}
    assert heard == [(done, 6) for done in range(1, 7)]


def test_a_candidate_that_does_not_fit_the_context_is_left_out():
    model = ScriptedModel(rule=learns_from_snow, context_length=5)
    choice = choose(model, TRIED, VALIDATION, GREEDY, "label", LABELS, "accuracy")
    assert choice.tried == {"none helps": 0.5, "helps": 1.0}


def test_no_fitting_candidate_is_an_error_that_names_each():
    with pytest.raises(CapacityError) as caught:
        choose(
            ScriptedModel(rule=learns_from_snow, context_length=3),
            TRIED,
            VALIDATION,
            GREEDY,
            "label",
            LABELS,
            "accuracy",
        )
    assert [problem.split(":")[0] for problem in caught.value.problems] == list(TRIED)


def test_a_text_task_is_chosen_by_a_text_metric():
    choice = choose(ScriptedModel(rule=learns_from_snow), TRIED, VALIDATION, GREEDY, "text", (), "exact_match")
    assert choice.shots == TRIED["helps"]


def test_a_failing_engine_and_useless_arguments_are_errors():
    model = ScriptedModel(rule=learns_from_snow, fail_on=3)
    with pytest.raises(EngineError):
        choose(model, TRIED, VALIDATION, GREEDY, "label", LABELS, "accuracy")
    with pytest.raises(InputError, match="one candidate or more"):
        choose(model, {}, VALIDATION, GREEDY, "label", LABELS, "accuracy")
    with pytest.raises(InputError, match="another metric"):
        choose(ScriptedModel(rule=learns_from_snow), TRIED, VALIDATION, GREEDY, "label", LABELS, "perplexity")
