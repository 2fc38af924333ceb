"""Evaluation: the base, the base with its best few-shot prompt, and the tuned model on the same held-out examples."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from luthier.errors import CapacityError, InputError
from luthier.evaluate.bootstrap import paired_difference
from luthier.evaluate.contest import answers_of, sample
from luthier.evaluate.engine.scoring import Scorer
from luthier.evaluate.few_shot import candidates, choose, with_shots
from luthier.evaluate.labels import label_named, label_set, task_of
from luthier.evaluate.metrics import score
from luthier.jobs.context import RunContext
from luthier.jobs.launch import OnEvent, follow, submit
from luthier.llm.engine.torch_model import Precision, device, has_fast_bfloat16
from luthier.llm.local import LocalModel
from luthier.records.completion import Sampling
from luthier.records.dataset import DatasetVersion
from luthier.records.evaluation import Answer, Difference, Evaluation, FewShotChoice, TaskKind
from luthier.records.example import Conversation, Message, SplitName
from luthier.records.model import TunedModel
from luthier.records.record import Record
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat
from luthier.templates.renderer import TemplateRenderer
from luthier.workflows.datasets import side
from luthier.workflows.models import decoder, served_folder
from luthier.workflows.training import finished_result

BASE, FEW_SHOT, TUNED = "base", "few_shot", "tuned"
ROOM_FOR_A_CHATTY_LABEL = 12  # tokens beside the label, for a model that answers in a sentence
MAX_TEXT_TOKENS = 512
EVENT_SECONDS = 0.5
MAIN_METRIC: dict[TaskKind, str] = {"label": "macro_recall", "text": "rouge_l"}


class EvaluateRequest(Record):
    """What to evaluate: a tuned model (its base, dataset and template are known), or a base on a dataset.

    ``task`` is seen from the answers where not given. ``validation_examples`` are asked for each few-shot candidate;
    ``perplexity_examples`` are scored in torch.
    """

    model: str | None = None
    base: str | None = None
    dataset: str | None = None
    template: str | None = None
    task: TaskKind | None = None
    few_shot: bool = True
    max_examples: int = Field(500, ge=2)
    validation_examples: int = Field(60, ge=1)
    perplexity_examples: int = Field(150, ge=0)
    resamples: int = Field(2000, ge=100)
    seed: int = 0


@dataclass(frozen=True)
class _Contest:
    """Everything that a request names, looked up and rendered."""

    request: EvaluateRequest
    base: str
    tuned: TunedModel | None
    dataset: DatasetVersion
    template: str | None
    train: list[Conversation]
    validation: list[Conversation]
    held_out: list[Conversation]
    left_out: int
    task: TaskKind
    labels: tuple[str, ...]
    sampling: Sampling


def evaluate_model(store: Store, request: EvaluateRequest, on_event: OnEvent | None = None) -> Evaluation:
    """Evaluate in a process of its own; return scores, differences with intervals, and keep every answer.

    Raises:
        RunStopped: the run was paused or cancelled.
        LuthierError: the run failed; the message is its own.
    """
    run = follow(store, submit(store, "evaluate", request).id, on_event)
    return store.evaluations.get(finished_result(store, run.id)["evaluation"])


def execute(context: RunContext) -> dict[str, Any]:
    """Carry out an evaluation run."""
    started = time.monotonic()
    store = context.store
    contest = _prepare(store, EvaluateRequest.model_validate(context.run.config))
    if contest.left_out:
        context.say(f"{contest.left_out} held-out examples are too long or have no answer; left out", level="warning")
    given: dict[str, list[Answer]] = {}
    shots: dict[str, tuple[Message, ...]] = {BASE: (), TUNED: ()}
    choice: FewShotChoice | None = None
    base = LocalModel(served_folder(store, contest.base), contest.base)
    try:
        with context.stage("base model"):
            given[BASE] = _ask(context, contest, BASE, base)
        if contest.request.few_shot and contest.train:
            choice = _contend_with_shots(context, contest, base, given, shots)
    finally:
        base.close()
    if contest.tuned:
        with context.stage("tuned model"):
            tuned = LocalModel(served_folder(store, contest.tuned.name), contest.tuned.name)
            try:
                given[TUNED] = _ask(context, contest, TUNED, tuned)
            finally:
                tuned.close()
    with context.stage("perplexity"):
        given = _perplexity(store, contest, given, shots)
    with context.stage("intervals"):
        evaluation = _evaluation(context, contest, given, choice, time.monotonic() - started)
    store.evaluations.add(evaluation, [answer for answers in given.values() for answer in answers])
    return {"evaluation": evaluation.id}


def _prepare(store: Store, request: EvaluateRequest) -> _Contest:
    tuned = store.models.get(request.model) if request.model else None
    if tuned and tuned.product != "generator":
        raise InputError(
            f"{tuned.name} is a {tuned.product}: it writes no answers that could be compared.",
            hint=f"its measures on the test side are in: luthier model show {tuned.name}",
        )
    base = tuned.base if tuned else request.base
    reference = request.dataset or (tuned.dataset if tuned else None)
    if base is None or reference is None:
        raise InputError(
            "An evaluation needs a tuned model, or a base model and a dataset.",
            hint="luthier evaluate ft:…   or   luthier evaluate --base smollm2-135m --dataset NAME --template NAME",
        )
    dataset = store.datasets.get(reference)
    if request.template or not tuned:
        template = store.templates.get(request.template) if request.template else None
    else:
        template = tuned.template
    renderer = TemplateRenderer(template.template if template else None, dataset.fields)

    def conversations(split: SplitName) -> list[Conversation]:
        return [renderer.conversation(example) for example in side(store, dataset, split)]

    train, validation, held_out = conversations("train"), conversations("validation"), conversations("test")
    expected, known = [one.answer for one in held_out], [one.answer for one in [*train, *validation]]
    task = request.task or task_of(expected, known)
    chat_format = ChatFormat.load(store.models.base_folder(decoder(store, base)))
    sampling = Sampling(max_tokens=_answer_room(chat_format, train, task == "label"), temperature=0.0)
    asked = [one for one in held_out if _can_be_asked(one, chat_format, sampling)]
    if len(asked) < 2:
        raise InputError(f"Only {len(asked)} of {len(held_out)} held-out examples can be asked; at least 2 are needed.")
    return _Contest(
        request=request,
        base=base,
        tuned=tuned,
        dataset=dataset,
        template=template.reference if template else None,
        train=train,
        validation=sample(validation or train, request.validation_examples, request.seed),
        held_out=sample(asked, request.max_examples, request.seed),
        left_out=len(held_out) - len(asked),
        task=task,
        labels=label_set(expected, known) if task == "label" else (),
        sampling=sampling,
    )


def _can_be_asked(conversation: Conversation, chat_format: ChatFormat, sampling: Sampling) -> bool:
    """Return whether there is an answer to expect, and room in the context to give one."""
    tokens = len(chat_format.prompt_tokens(conversation.prompt)) + sampling.max_tokens
    return bool(conversation.answer.strip()) and tokens <= chat_format.context_length


def _answer_room(chat_format: ChatFormat, train: Sequence[Conversation], is_label_task: bool) -> int:
    """Return how many tokens an answer may take: a label in a sentence, or half as long again as any known answer."""
    longest = max(len(chat_format.encode(answer)) for answer in {conversation.answer for conversation in train})
    if is_label_task:
        return longest + ROOM_FOR_A_CHATTY_LABEL
    return min(MAX_TEXT_TOKENS, int(longest * 1.5) + 8)


def _ask(
    context: RunContext, contest: _Contest, name: str, model: LocalModel, shots: tuple[Message, ...] = ()
) -> list[Answer]:
    """Return a contestant's answers; what an earlier attempt of this run finished is not asked again."""
    kept = context.folder / f"answers-{name}.json"
    if kept.is_file():
        return [Answer.model_validate(answer) for answer in json.loads(kept.read_text("utf-8"))]
    answers = answers_of(
        name,
        model,
        contest.held_out,
        contest.sampling,
        contest.task,
        contest.labels,
        shots=shots,
        on_progress=_progress(context, name),
    )
    staged = kept.with_suffix(".new")
    staged.write_text(json.dumps([answer.model_dump(mode="json") for answer in answers]), "utf-8")
    staged.replace(kept)
    return answers


def _progress(context: RunContext, what: str) -> Callable[[int, int], None]:
    """Return a callback that passes progress on twice a second, and stops the run where a person asked for it."""
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        context.stop_if_asked()
        if time.monotonic() - last > EVENT_SECONDS or done == total:
            last = time.monotonic()
            context.progress(f"{what}: {done}/{total}", done, total)

    return progress


def _contend_with_shots(
    context: RunContext,
    contest: _Contest,
    base: LocalModel,
    given: dict[str, list[Answer]],
    shots: dict[str, tuple[Message, ...]],
) -> FewShotChoice | None:
    """Choose a few-shot prompt and let the base answer with it; None where none fits the context."""
    tried = candidates(contest.train, contest.task, contest.labels, contest.request.seed)
    try:
        with context.stage("few-shot prompt"):
            choice = choose(
                base,
                tried,
                contest.validation,
                contest.sampling,
                contest.task,
                contest.labels,
                MAIN_METRIC[contest.task],
                on_progress=_progress(context, "few-shot prompts"),
            )
        with context.stage("base model with few-shot prompt"):
            given[FEW_SHOT] = _ask(context, contest, FEW_SHOT, base, choice.shots)
    except (InputError, CapacityError) as error:
        context.say(f"No few-shot contestant: {error.message}", level="warning")
        return None
    shots[FEW_SHOT] = choice.shots
    message = f"Best of {len(tried)} few-shot prompts on {choice.validation_examples} validation examples"
    context.say(message, data=choice.tried)
    return choice


def _perplexity(
    store: Store, contest: _Contest, given: dict[str, list[Answer]], shots: dict[str, tuple[Message, ...]]
) -> dict[str, list[Answer]]:
    """Return the answers with the expected answers' log-probabilities, on as many examples as the request says."""
    if contest.request.perplexity_examples == 0:
        return given
    base_folder = store.models.base_folder(store.models.base(contest.base))
    chat_format = ChatFormat.load(base_folder)
    precision: Precision = "bfloat16" if has_fast_bfloat16(device()) else "float32"
    scorer = Scorer(base_folder, None, precision)
    filled = {name: _scored(contest, scorer, chat_format, given[name], shots[name]) for name in given if name != TUNED}
    if contest.tuned and TUNED in given:
        adapter = store.models.artifact_folder(contest.tuned.artifacts["adapter"])
        scorer = Scorer(base_folder, adapter, precision)
        filled[TUNED] = _scored(contest, scorer, chat_format, given[TUNED], shots[TUNED])
    return filled


def _scored(
    contest: _Contest, scorer: Scorer, chat_format: ChatFormat, answers: list[Answer], shots: tuple[Message, ...]
) -> list[Answer]:
    prompts, expected = [], []
    # The examples were drawn at random, so the first ones are as good as any.
    for conversation in contest.held_out[: contest.request.perplexity_examples]:
        answer = Message(role="assistant", content=conversation.answer)
        rendered = chat_format.render([*with_shots(conversation.prompt, shots), answer])
        start = rendered.prompt_tokens
        prompts.append(rendered.tokens[:start])
        behind = zip(rendered.tokens[start:], rendered.loss_mask[start:], strict=True)
        expected.append([token for token, learned in behind if learned])
    filled = [
        answer.model_copy(update={"expected_logprob": sum(one.logprobs or ()), "expected_tokens": len(one.chosen)})
        for answer, one in zip(answers, scorer.score(prompts, expected), strict=False)
    ]
    return filled + answers[len(filled) :]


def _evaluation(
    context: RunContext,
    contest: _Contest,
    given: dict[str, list[Answer]],
    choice: FewShotChoice | None,
    seconds: float,
) -> Evaluation:
    scores = {name: score(answers, contest.task, contest.labels) for name, answers in given.items()}
    pairs = [(TUNED, BASE), (TUNED, FEW_SHOT), (FEW_SHOT, BASE)]
    differences = {
        f"{better}_minus_{worse}": _differences(contest, given[better], given[worse], scores[better].metrics)
        for better, worse in pairs
        if better in given and worse in given
    }
    return Evaluation(
        id=context.run.id,
        task=contest.task,
        metric=MAIN_METRIC[contest.task],
        labels=contest.labels,
        dataset=contest.dataset.reference,
        dataset_hash=contest.dataset.content_hash,
        template=contest.template,
        base=contest.base,
        model=contest.tuned.name if contest.tuned else None,
        examples=len(contest.held_out),
        scores=scores,
        differences=differences,
        few_shot=choice,
        seconds=seconds,
        created_at=datetime.now(UTC),
    )


def _differences(
    contest: _Contest, better: list[Answer], worse: list[Answer], metrics: dict[str, float]
) -> dict[str, Difference]:
    return {
        metric: paired_difference(
            better,
            worse,
            metric,
            contest.task,
            contest.labels,
            resamples=contest.request.resamples,
            seed=contest.request.seed,
        )
        for metric in metrics
    }


def side_by_side(store: Store, evaluation: Evaluation, *, wrong: bool = False) -> list[dict[str, Any]]:
    """Return question, expected and given answers by example; with ``wrong`` only those that the tuned model misses."""
    rows: dict[str, dict[str, Any]] = {}
    missed: set[str] = set()
    for answer in store.evaluations.answers(evaluation.id):
        row = rows.setdefault(
            answer.example_id,
            {
                "example_id": answer.example_id,
                "question": answer.question,
                "expected": answer.expected,
                "answers": {},
            },
        )
        row["answers"][answer.contestant] = answer.text
        if evaluation.task == "label":
            right = answer.label == label_named(answer.expected, evaluation.labels)
        else:
            right = answer.text.split() == answer.expected.split()
        if answer.contestant == (TUNED if evaluation.model else BASE) and not right:
            missed.add(answer.example_id)
    return [row for key, row in rows.items() if not wrong or key in missed]
