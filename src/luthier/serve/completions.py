"""OpenAI's completions on a loaded model, independent of HTTP: prompts come in, plain dicts go out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from luthier.serve.answers import Choice, Question, answer_all
from luthier.serve.api_error import ApiError
from luthier.serve.completion_request import DEFAULT_MAX_TOKENS, CompletionRequest
from luthier.serve.pool import LoadedModel
from luthier.serve.text_input import Text
from luthier.templates.chat_format import ChatFormat

Dict = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens."""

    text: str
    tokens: list[int]


@dataclass(frozen=True)
class PromptCompletion:
    """A request that is ready to run: as tokens, bounded, and sure to fit the model's context."""

    request: CompletionRequest
    loaded: LoadedModel
    prompts: list[Prompt]
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def questions(self) -> list[Question]:
        """All candidates of the first prompt, then those of the second one, and so on."""
        context = self.loaded.chat_format.context_length
        limit = self.request.max_tokens or DEFAULT_MAX_TOKENS
        return [
            Question(prompt.tokens, self.request.sampling(min(limit, context - len(prompt.tokens)), index))
            for prompt in self.prompts
            for index in range(self.request.candidates)
        ]

    def prompt_of(self, candidate: int) -> Prompt:
        """Return the prompt of a candidate."""
        return self.prompts[candidate // self.request.candidates]


def prepare_completion(request: CompletionRequest, loaded: LoadedModel) -> PromptCompletion:
    """Make tokens of a request's prompts.

    A text gets the special tokens that the model's tokenizer puts around one, and no chat format. A request without a
    prompt begins a new document.

    Raises:
        ApiError: 400, where a prompt leaves no room for an answer, or has tokens that are not the model's.
    """
    texts = [""] if request.prompt is None else request.prompt
    prompts = [_prompt(loaded.chat_format, index, text) for index, text in enumerate(texts)]
    return PromptCompletion(request, loaded, prompts)


async def complete(completion: PromptCompletion) -> Dict:
    """Return a ``text_completion``.

    Raises:
        ApiError: 400, where the best answers are asked for, and the engine does not tell logprobs.
        EngineError: the engine died.
    """
    questions = completion.questions
    candidates = [Choice(index) for index in range(len(questions))]
    async with aclosing(answer_all(completion.loaded, questions)) as deltas:
        async for index, delta in deltas:
            candidates[index].add(delta)
    chosen = _best(completion, candidates)
    return {
        "id": completion.id,
        "object": "text_completion",
        "created": completion.created,
        "model": completion.request.model,
        "choices": [_full_choice(completion, index, choice) for index, choice in enumerate(chosen)],
        "usage": _usage(completion, sum(choice.token_count for choice in candidates)),
        "system_fingerprint": None,
    }


async def stream_completion(completion: PromptCompletion) -> AsyncGenerator[Dict, None]:
    """Yield ``text_completion`` dicts: the prompt if it is echoed, pieces of text, and the usage if asked.

    Raises:
        EngineError: the engine died.
    """
    questions = completion.questions
    completion_tokens = 0
    offsets = [0] * len(questions)
    if completion.request.echo:
        for index in range(len(questions)):
            yield _chunk(completion, index, completion.prompt_of(index).text)
    async with aclosing(answer_all(completion.loaded, questions)) as deltas:
        async for index, delta in deltas:
            completion_tokens += delta.token_count
            logprobs = _logprobs(completion, delta.tokens, delta.logprobs, offsets[index])
            offsets[index] += len(delta.text)
            if delta.text or delta.finish_reason or (logprobs and logprobs["tokens"]):
                yield _chunk(completion, index, delta.text, logprobs, delta.finish_reason, delta.tokens)
    if completion.request.include_usage:
        yield _envelope(completion) | {"choices": [], "usage": _usage(completion, completion_tokens)}


def _prompt(chat_format: ChatFormat, index: int, text: Text) -> Prompt:
    tokenizer, context = chat_format.tokenizer, chat_format.context_length
    tokens = list(tokenizer.encode(text).ids) if isinstance(text, str) else text
    if len(tokens) >= context:
        raise ApiError(
            400,
            f"This model's context is {context} tokens, and prompt[{index}] has {len(tokens)} tokens, which leaves no "
            "room for an answer.",
            param="prompt",
            code="context_length_exceeded",
        )
    if isinstance(text, str):
        return Prompt(text, tokens or [chat_format.end_of_text])
    vocabulary = tokenizer.get_vocab_size()
    if max(tokens) >= vocabulary:
        message = f"prompt[{index}] has the token {max(tokens)}; those of this model are below {vocabulary}."
        raise ApiError(400, message, param="prompt", code="invalid_value")
    return Prompt(str(tokenizer.decode(tokens, skip_special_tokens=False)), tokens)


def _best(completion: PromptCompletion, candidates: Sequence[Choice]) -> list[Choice]:
    """Return the answers to give: of each prompt's candidates those whose tokens are likeliest on average."""
    answers, made = completion.request.answers, completion.request.candidates
    if made == answers:
        return list(candidates)
    if not all(choice.logprobs for choice in candidates):
        message = "best_of: this model's engine does not tell logprobs, so that the best answer is not known."
        raise ApiError(400, message, param="best_of", code="unsupported_parameter")
    chosen: list[Choice] = []
    for first in range(0, len(candidates), made):
        ranked = sorted(
            candidates[first : first + made], key=lambda one: sum(one.logprobs) / len(one.logprobs), reverse=True
        )
        chosen += ranked[:answers]
    return chosen


def _full_choice(completion: PromptCompletion, index: int, choice: Choice) -> Dict:
    echoed = completion.prompt_of(choice.index).text if completion.request.echo else ""
    logprobs = _logprobs(completion, choice.tokens, choice.logprobs, 0)
    return _choice(completion, index, echoed + choice.text, logprobs, choice.finish_reason, choice.tokens)


def _choice(
    completion: PromptCompletion,
    index: int,
    text: str,
    logprobs: Dict | None,
    finish_reason: str | None,
    tokens: Sequence[int],
) -> Dict:
    token_ids = {"token_ids": list(tokens)} if completion.request.return_token_ids else {}
    return {**token_ids, "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _envelope(completion: PromptCompletion) -> Dict:
    envelope: Dict = {
        "id": completion.id,
        "object": "text_completion",
        "created": completion.created,
        "model": completion.request.model,
        "system_fingerprint": None,
    }
    return envelope | ({"usage": None} if completion.request.include_usage else {})


def _chunk(
    completion: PromptCompletion,
    index: int,
    text: str,
    logprobs: Dict | None = None,
    finish_reason: str | None = None,
    tokens: Sequence[int] = (),
) -> Dict:
    return _envelope(completion) | {"choices": [_choice(completion, index, text, logprobs, finish_reason, tokens)]}


def _usage(completion: PromptCompletion, completion_tokens: int) -> Dict:
    """Count tokens: each prompt once, and all candidates, given or not."""
    prompt_tokens = sum(len(prompt.tokens) for prompt in completion.prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _logprobs(
    completion: PromptCompletion, tokens: Sequence[int], logprobs: Sequence[float], offset: int
) -> Dict | None:
    """Return the legacy shape: parallel lists; with ``logprobs`` 1 the chosen token is the likeliest one."""
    if completion.request.logprobs is None:
        return None
    chat_format = completion.loaded.chat_format
    kept = [pair for pair in zip(tokens, logprobs, strict=True) if pair[0] not in chat_format.stop_tokens]
    texts = [str(chat_format.tokenizer.decode([token], skip_special_tokens=False)) for token, _ in kept]
    offsets = list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else []
    values = [logprob for _, logprob in kept]
    top = [{text: value} for text, value in zip(texts, values, strict=True)] if completion.request.logprobs else None
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}
