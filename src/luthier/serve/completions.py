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
from luthier.serve.completion_request import CompletionRequest
from luthier.serve.pool import LoadedModel
from luthier.serve.sampling_options import refuse, several
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
    """A request that is ready to run: as tokens, bounded, and sure to fit the model's context.

    ``questions`` are all candidates of the first prompt, then those of the second one, and so on.
    """

    request: CompletionRequest
    loaded: LoadedModel
    prompts: list[Prompt]
    questions: list[Question]
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def prompt_of(self, candidate: int) -> Prompt:
        """Return the prompt of a candidate."""
        return self.prompts[candidate // self.request.candidates]


def prepare_completion(request: CompletionRequest, loaded: LoadedModel) -> PromptCompletion:
    """Make tokens of a request's prompts, and settle how they are answered.

    A text gets the special tokens that the model's tokenizer puts around one, and no chat format. A request without a
    prompt begins a new document.

    Raises:
        ApiError: 400, where a prompt leaves no room for an answer or has tokens that are not the model's, or where the
            model's engine cannot honour an option.
    """
    chat_format = loaded.chat_format
    texts = [""] if request.prompt is None else request.prompt
    prompts = [_prompt(chat_format, index, text) for index, text in enumerate(texts)]
    vocabulary, options = chat_format.tokenizer.get_vocab_size(), loaded.engine.options
    questions = []
    for prompt in prompts:
        sampling = request.bounded(chat_format.context_length - len(prompt.tokens), vocabulary, options)
        questions += [Question(prompt.tokens, one) for one in several(sampling, request.candidates)]
    return PromptCompletion(request, loaded, prompts, questions)


async def complete(completion: PromptCompletion) -> Dict:
    """Return a ``text_completion``.

    Raises:
        ApiError: 400, where the best answers are asked for, and the engine does not tell logprobs.
        EngineError: the engine died.
    """
    candidates = [Choice(index) for index in range(len(completion.questions))]
    async with aclosing(answer_all(completion.loaded, completion.questions)) as deltas:
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
    completion_tokens = 0
    offsets = [0] * len(completion.questions)
    if completion.request.echo:
        for index in range(len(completion.questions)):
            yield _chunk(completion, index, Choice(index, text=completion.prompt_of(index).text))
    async with aclosing(answer_all(completion.loaded, completion.questions)) as deltas:
        async for index, delta in deltas:
            completion_tokens += delta.token_count
            new = Choice(index)
            new.add(delta)
            if new.text or new.finish_reason or (new.tokens and completion.request.shows_tokens):
                yield _chunk(completion, index, new, offsets[index])
            offsets[index] += len(new.text)
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
    shown = _choice(completion, index, choice)
    return shown | {"text": completion.prompt_of(choice.index).text + choice.text} if completion.request.echo else shown


def _choice(completion: PromptCompletion, index: int, choice: Choice, offset: int = 0) -> Dict:
    token_ids = {"token_ids": choice.tokens} if completion.request.return_token_ids else {}
    return {
        **token_ids,
        "index": index,
        "text": choice.text,
        "logprobs": _logprobs(completion, choice, offset),
        "finish_reason": choice.finish_reason,
    }


def _envelope(completion: PromptCompletion) -> Dict:
    envelope: Dict = {
        "id": completion.id,
        "object": "text_completion",
        "created": completion.created,
        "model": completion.request.model,
        "system_fingerprint": None,
    }
    return envelope | ({"usage": None} if completion.request.include_usage else {})


def _chunk(completion: PromptCompletion, index: int, new: Choice, offset: int = 0) -> Dict:
    return _envelope(completion) | {"choices": [_choice(completion, index, new, offset)]}


def _usage(completion: PromptCompletion, completion_tokens: int) -> Dict:
    """Count tokens: each prompt once, and all candidates, given or not."""
    prompt_tokens = sum(len(prompt.tokens) for prompt in completion.prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _logprobs(completion: PromptCompletion, choice: Choice, offset: int) -> Dict | None:
    """Return the legacy shape: parallel lists, and for each token the likeliest ones beside it."""
    asked = completion.request.logprobs
    if asked is None:
        return None
    if choice.token_count > len(choice.tokens):
        refuse("logprobs", "the engine of this model does not tell its tokens")
    chat_format = completion.loaded.chat_format
    kept = [place for place, token in enumerate(choice.tokens) if token not in chat_format.stop_tokens]
    texts = [_text(chat_format, choice.tokens[place]) for place in kept]
    return {
        "tokens": texts,
        "token_logprobs": [choice.logprobs[place] for place in kept],
        "top_logprobs": [_top(chat_format, choice, place, asked) for place in kept] if asked else None,
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else [],
    }


def _top(chat_format: ChatFormat, choice: Choice, place: int, asked: int) -> dict[str, float]:
    """Return the likeliest tokens and the chosen one; without any told, the chosen one is the likeliest."""
    told = choice.alternatives[place] if choice.alternatives else {}
    likeliest = dict(sorted(told.items(), key=lambda item: -item[1])[:asked])
    found = likeliest | {choice.tokens[place]: choice.logprobs[place]}
    return {_text(chat_format, token): logprob for token, logprob in found.items()}


def _text(chat_format: ChatFormat, token: int) -> str:
    return str(chat_format.tokenizer.decode([token], skip_special_tokens=False))
