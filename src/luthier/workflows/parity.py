"""Parity: asks the exported and the served model, and compares their answers with the adapter's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.errors import EngineError
from luthier.evaluate.engine.scoring import Scorer
from luthier.evaluate.parity import ScoredAnswer, agreement
from luthier.llm.local import LocalModel
from luthier.llm.model import LanguageModel, Prompt
from luthier.llm.remote import RemoteModel
from luthier.records.completion import Completion, Sampling
from luthier.records.example import Conversation
from luthier.records.model import Artifact, Parity
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat
from luthier.workflows.models import SERVED_FORM
from luthier.workflows.serving import server_process

MAX_ANSWER_TOKENS = 48


def measure_parity(
    store: Store,
    name: str,
    base_folder: Path,
    artifacts: dict[str, Artifact],
    held_out: Sequence[Conversation],
    limit: float,
) -> Parity:
    """Compare adapter, merged, GGUF and a real running server on held-out prompts at temperature 0.

    Raises:
        EngineError: a form cannot be run at all.
    """
    folders = {kind: store.models.artifact_folder(artifact) for kind, artifact in artifacts.items()}
    chat_format = ChatFormat.load(folders[SERVED_FORM])
    prompts = [conversation.prompt for conversation in held_out]
    exported = _ask(LocalModel(folders[SERVED_FORM], name), prompts)
    with server_process(store.home, {name: folders[SERVED_FORM]}) as url:
        served = _ask(RemoteModel(f"{url}/v1", name, want_logprobs=True, want_tokens=True), prompts)
    prompt_tokens = [chat_format.prompt_tokens(prompt) for prompt in prompts]
    answers = [_answer_tokens(completion) for completion in exported]
    served_answers = [_answer_tokens(completion) for completion in served]
    # A model that was trained whole has no adapter: what was saved of it is what the other forms must agree with.
    reference = Scorer(base_folder, folders["adapter"]) if "adapter" in folders else Scorer(folders["merged"])
    adapter = reference.score(prompt_tokens, answers)
    adapter_on_served = adapter if served_answers == answers else reference.score(prompt_tokens, served_answers)
    del reference
    merged = Scorer(folders["merged"]).score(prompt_tokens, answers)
    forms = (
        agreement("merged", adapter, merged),
        agreement("gguf", adapter, _as_scored(exported, answers)),
        agreement("served", adapter_on_served, _as_scored(served, served_answers)),
    )
    return Parity(prompts=len(prompts), answer_tokens=sum(map(len, answers)), limit=limit, forms=forms)


def _ask(model: LanguageModel, prompts: Sequence[Prompt]) -> list[Completion]:
    try:
        return model.answer(prompts, Sampling(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0))
    finally:
        model.close()


def _answer_tokens(completion: Completion) -> list[int]:
    if completion.tokens is None:
        raise EngineError("The server gave no tokens for an answer, so it cannot be compared.")
    return list(completion.tokens)


def _as_scored(completions: Sequence[Completion], answers: Sequence[Sequence[int]]) -> list[ScoredAnswer]:
    """Return what a form answered; it chose each of its own tokens (an end of turn may come without a logprob)."""
    return [ScoredAnswer(answer, completion.logprobs) for completion, answer in zip(completions, answers, strict=True)]
