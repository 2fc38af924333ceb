"""OpenAI's chat completions on a loaded model, independent of HTTP: a request comes in, plain dicts go out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import InputError
from luthier.records.completion import Sampling
from luthier.serve.answers import Question, answer_all
from luthier.serve.api_error import ApiError
from luthier.serve.chat_choice import ChatChoice, Part
from luthier.serve.chat_request import ChatRequest
from luthier.serve.chat_tools import ToolUse, constraint_of, tool_use
from luthier.serve.pool import LoadedModel
from luthier.serve.sampling_options import check_engine, several
from luthier.serve.wire_json import encode_json

LONG_CHARACTERS = 20_000
Dict = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A request that is ready to run: rendered, bounded, and sure to fit the model's context."""

    request: ChatRequest
    loaded: LoadedModel
    prompt_tokens: list[int]
    samplings: list[Sampling]
    tools: ToolUse | None = None
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def choices(self) -> list[ChatChoice]:
        """Return the answers, of which nothing has come yet."""
        return [ChatChoice(self.loaded.chat_format, self.request, self.tools, index) for index in range(self.answers)]

    @property
    def answers(self) -> int:
        """How many answers are asked for."""
        return len(self.samplings)

    async def parts(self, choices: list[ChatChoice]) -> AsyncGenerator[Part, None]:
        """Yield what is new of each answer as it comes; closing it cancels them all.

        Raises:
            EngineError: the engine refused the prompt, died, or broke what the answer is bound to.
            ApiError: 400, where the engine does not tell what is asked of it.
        """
        with_special = self.tools is not None
        questions = [Question(self.prompt_tokens, sampling, with_special) for sampling in self.samplings]
        unfinished = len(choices)
        async with aclosing(answer_all(self.loaded, questions)) as deltas:
            async for index, delta in deltas:
                choice = choices[index]
                if choice.finish_reason is not None:
                    continue  # it has called the one function that it may call
                for part in choice.add(delta):
                    yield part
                unfinished -= choice.finish_reason is not None
                if not unfinished:
                    return


def prepare_chat(request: ChatRequest, loaded: LoadedModel) -> Chat:
    """Render a request's prompt and settle its sampling.

    An answer may be as long as the context allows where no limit is given, and never longer.

    Raises:
        ApiError: 400, where the prompt leaves no room for an answer, the chat template refuses it, or the model's
            engine cannot honour an option.
    """
    chat_format = loaded.chat_format
    tools = tool_use(request, chat_format)
    constraint = constraint_of(request, tools)
    try:
        messages = [message.as_message() for message in request.messages]
        prompt = chat_format.prompt_tokens(messages, tools.shown if tools else ())
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from error
    room = chat_format.context_length - len(prompt)
    if room <= 0:
        raise ApiError(
            400,
            f"This model's context is {chat_format.context_length} tokens, and the messages have {len(prompt)} tokens, "
            "which leaves no room for an answer.",
            param="messages",
            code="context_length_exceeded",
        )
    limit = request.max_completion_tokens or request.max_tokens or room
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    sampling = request.sampling(min(limit, room), chat_format.tokenizer.get_vocab_size(), logprobs, constraint)
    bound_by = "response_format" if request.response_format else "tool_choice"
    check_engine(sampling, loaded.engine.options, logprobs="top_logprobs", constraint=bound_by)
    return Chat(request, loaded, prompt, several(sampling, request.n or 1), tools)


async def prepared_chat(request: ChatRequest, loaded: LoadedModel) -> Chat:
    """Prepare a chat as :func:`prepare_chat` does; what may take long, in a thread, so that nobody else waits for it.

    Raises:
        ApiError: as :func:`prepare_chat`.
    """
    takes_long = bool(request.tools) or request.response_format is not None
    takes_long = takes_long or sum(len(message.text) for message in request.messages) > LONG_CHARACTERS
    return await asyncio.to_thread(prepare_chat, request, loaded) if takes_long else prepare_chat(request, loaded)


async def complete_chat(chat: Chat) -> Dict:
    """Return a ``chat.completion``.

    Raises:
        EngineError: the engine died.
    """
    choices = chat.choices()
    async with aclosing(chat.parts(choices)) as parts:
        async for _ in parts:
            pass
    return {
        "id": chat.id,
        "object": "chat.completion",
        "created": chat.created,
        "model": chat.request.model,
        "choices": [choice.completed for choice in choices],
        "usage": _usage(chat, choices),
        "system_fingerprint": None,
        **_service_tier(chat),
    }


async def stream_chat(chat: Chat) -> AsyncGenerator[Dict, None]:
    """Yield ``chat.completion.chunk`` dicts: the role, pieces of text, the finish reason, and the usage if asked.

    Raises:
        EngineError: the engine died.
    """
    choices = chat.choices()
    envelope = _envelope(chat)
    for part in _openings(chat):
        yield envelope | {"choices": [part]}
    async with aclosing(chat.parts(choices)) as parts:
        async for part in parts:
            yield envelope | {"choices": [part]}
    if chat.request.include_usage:
        yield envelope | {"choices": [], "usage": _usage(chat, choices)}


async def stream_chat_text(chat: Chat) -> AsyncGenerator[str, None]:
    """Yield the JSON texts of :func:`stream_chat`'s dicts, for a third of the time that these take.

    Raises:
        EngineError: the engine died.
    """
    choices = chat.choices()
    envelope = _envelope(chat)
    before, after = encode_json(envelope | {"choices": []})[:-2], "]}"
    for part in _openings(chat):
        yield f"{before}{encode_json(part)}{after}"
    async with aclosing(chat.parts(choices)) as parts:
        async for part in parts:
            yield f"{before}{_part_text(part)}{after}"
    if chat.request.include_usage:
        yield encode_json(envelope | {"choices": [], "usage": _usage(chat, choices)})


def _part_text(part: Part) -> str:
    """Return a part as JSON; a piece of text, which most parts are, without the encoder's ado."""
    text = part["delta"].get("content")
    if text is None or part["logprobs"] is not None:
        return encode_json(part)
    return f'{{"index":{part["index"]},"delta":{{"content":{encode_json(text)}}},"logprobs":null,"finish_reason":null}}'


def _openings(chat: Chat) -> Iterator[Part]:
    for index in range(chat.answers):
        delta = {"role": "assistant", "content": "", "refusal": None}
        yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _envelope(chat: Chat) -> Dict:
    return {
        "id": chat.id,
        "object": "chat.completion.chunk",
        "created": chat.created,
        "model": chat.request.model,
        "system_fingerprint": None,
        **_service_tier(chat),
        **({"usage": None} if chat.request.include_usage else {}),
    }


def _service_tier(chat: Chat) -> Dict:
    """Return the tier that served the request, where one was asked for: there is one."""
    return {} if chat.request.service_tier is None else {"service_tier": "default"}


def _usage(chat: Chat, choices: list[ChatChoice]) -> Dict:
    """Count tokens; an answer's end-of-turn token counts, as it was generated."""
    prompt_tokens = len(chat.prompt_tokens)
    completion_tokens = sum(choice.token_count for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
