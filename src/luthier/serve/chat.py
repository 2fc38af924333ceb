"""OpenAI's chat completions on a loaded model, independent of HTTP: a request comes in, plain dicts go out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import InputError
from luthier.llm.answer_stream import AnswerDelta
from luthier.records.completion import Sampling
from luthier.serve.answers import Choice, Question, answer_all
from luthier.serve.api_error import ApiError
from luthier.serve.chat_request import ChatRequest
from luthier.serve.pool import LoadedModel
from luthier.templates.chat_format import ChatFormat

DEFAULT_TEMPERATURE = 1.0
SMALLEST_TOP_P = 1e-6  # top_p 0 means the likeliest token alone
Dict = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A request that is ready to run: rendered, bounded, and sure to fit the model's context."""

    request: ChatRequest
    loaded: LoadedModel
    prompt_tokens: list[int]
    samplings: list[Sampling]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def deltas(self) -> AsyncGenerator[tuple[int, AnswerDelta], None]:
        """Yield (choice, delta) of all choices as they come; closing it cancels them all.

        Raises:
            EngineError: the engine refused the prompt, or it died.
        """
        return answer_all(self.loaded, [Question(self.prompt_tokens, sampling) for sampling in self.samplings])


def prepare_chat(request: ChatRequest, loaded: LoadedModel) -> Chat:
    """Render a request's prompt and settle its sampling.

    An answer may be as long as the context allows where no limit is given, and never longer.

    Raises:
        ApiError: 400, where the prompt leaves no room for an answer or the chat template refuses it.
    """
    try:
        prompt = loaded.chat_format.prompt_tokens([message.as_message() for message in request.messages])
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from error
    context = loaded.chat_format.context_length
    room = context - len(prompt)
    if room <= 0:
        raise ApiError(
            400,
            f"This model's context is {context} tokens, and the messages have {len(prompt)} tokens, which leaves no "
            "room for an answer.",
            param="messages",
            code="context_length_exceeded",
        )
    limit = request.max_completion_tokens or request.max_tokens or room
    return Chat(request, loaded, prompt, [_sampling(request, min(limit, room), i) for i in range(request.n or 1)])


async def complete_chat(chat: Chat) -> Dict:
    """Return a ``chat.completion``.

    Raises:
        EngineError: the engine died.
    """
    choices = [Choice(index) for index in range(len(chat.samplings))]
    async with aclosing(chat.deltas()) as deltas:
        async for index, delta in deltas:
            choices[index].add(delta)
    return {
        "id": chat.id,
        "object": "chat.completion",
        "created": chat.created,
        "model": chat.request.model,
        "choices": [_full_choice(chat, choice) for choice in choices],
        "usage": _usage(chat, sum(choice.token_count for choice in choices)),
        "system_fingerprint": None,
    }


async def stream_chat(chat: Chat) -> AsyncGenerator[Dict, None]:
    """Yield ``chat.completion.chunk`` dicts: the role, pieces of text, the finish reason, and the usage if asked.

    Raises:
        EngineError: the engine died.
    """
    completion_tokens = 0
    for index in range(len(chat.samplings)):
        yield _chunk(chat, index, {"role": "assistant", "content": "", "refusal": None})
    async with aclosing(chat.deltas()) as deltas:
        async for index, delta in deltas:
            completion_tokens += delta.token_count
            logprobs = _logprobs(chat, delta.tokens, delta.logprobs)
            if delta.text or (logprobs and logprobs["content"]):
                yield _chunk(chat, index, {"content": delta.text}, logprobs=logprobs)
            if delta.finish_reason is not None:
                yield _chunk(chat, index, {}, finish_reason=delta.finish_reason)
    if chat.request.include_usage:
        yield _envelope(chat) | {"choices": [], "usage": _usage(chat, completion_tokens)}


def _sampling(request: ChatRequest, max_tokens: int, index: int) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else max(request.top_p, SMALLEST_TOP_P),
        seed=None if request.seed is None else request.seed + index,
        stop=request.stops,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
    )


def _full_choice(chat: Chat, choice: Choice) -> Dict:
    token_ids = {"token_ids": choice.tokens} if chat.request.return_token_ids else {}
    return {
        **token_ids,
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []},
        "logprobs": _logprobs(chat, choice.tokens, choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _envelope(chat: Chat) -> Dict:
    envelope: Dict = {
        "id": chat.id,
        "object": "chat.completion.chunk",
        "created": chat.created,
        "model": chat.request.model,
        "system_fingerprint": None,
    }
    return envelope | ({"usage": None} if chat.request.include_usage else {})


def _chunk(
    chat: Chat, index: int, delta: Dict, *, logprobs: Dict | None = None, finish_reason: str | None = None
) -> Dict:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return _envelope(chat) | {"choices": [choice]}


def _usage(chat: Chat, completion_tokens: int) -> Dict:
    """Count tokens; an answer's end-of-turn token counts, as it was generated."""
    prompt_tokens = len(chat.prompt_tokens)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _logprobs(chat: Chat, tokens: Sequence[int], logprobs: Sequence[float]) -> Dict | None:
    if not chat.request.logprobs:
        return None
    chat_format = chat.loaded.chat_format
    entries = [
        _token_logprob(chat_format, token, logprob)
        for token, logprob in zip(tokens, logprobs, strict=True)
        if token not in chat_format.stop_tokens
    ]
    return {"content": entries, "refusal": None}


def _token_logprob(chat_format: ChatFormat, token: int, logprob: float) -> Dict:
    """Return one token's entry; ``bytes`` is null for a token that is a part of a character."""
    text = chat_format.tokenizer.decode([token], skip_special_tokens=False)
    whole = "\ufffd" not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None, "top_logprobs": []}
