"""OpenAI's embeddings on a loaded encoder, independent of HTTP: a request comes in, the JSON of the answer goes out."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from luthier.llm.embedding_format import EmbeddingFormat
from luthier.serve.api_error import ApiError
from luthier.serve.pool import LoadedEncoder
from luthier.serve.text_input import Texts

MAX_TOKENS_PER_REQUEST = 300_000
EncodingFormat = Literal["float", "base64"]


class EmbeddingRequest(BaseModel):
    """A request for one vector per text. Tokens are those of the model's own tokenizer, special ones included."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: Texts
    dimensions: int | None = Field(None, ge=1)
    encoding_format: EncodingFormat | None = None
    user: str | None = None


async def embed(request: EmbeddingRequest, loaded: LoadedEncoder, encoding: EncodingFormat) -> bytes:
    """Return the JSON of OpenAI's ``CreateEmbeddingResponse``; large ones are read and written in a thread.

    Raises:
        ApiError: 400, where a text is empty, too long, or no text of this model; or where it has fewer dimensions.
        EngineError: the encoder died.
    """
    most = loaded.embedding_format.dimensions
    if request.dimensions is not None and request.dimensions > most:
        raise ApiError(400, f"dimensions: {request.dimensions} are more than the model's {most}.", param="dimensions")
    tokens = await asyncio.to_thread(input_tokens, request, loaded.embedding_format)
    vectors = await loaded.engine.embed(tokens)
    if request.dimensions is not None:
        vectors = shortened(vectors, request.dimensions)
    return await asyncio.to_thread(_answer, request.model, vectors, encoding, sum(map(len, tokens)))


def input_tokens(request: EmbeddingRequest, embedding_format: EmbeddingFormat) -> list[list[int]]:
    """Return the tokens of each text of a request.

    Raises:
        ApiError: 400, where a text is empty, too long, or not of the model's vocabulary.
    """
    texts = [text for text in request.input if isinstance(text, str)]
    if "" in texts:
        raise _refused(texts.index(""), "is empty; there is nothing to embed")
    tokens = [text for text in request.input if not isinstance(text, str)] or embedding_format.tokens(texts)
    most = embedding_format.max_tokens
    for index, text in enumerate(tokens):
        if len(text) > most:
            message = f"has {len(text)} tokens, special ones included, and this model reads {most} at most"
            raise _refused(index, message, code="context_length_exceeded")
        if max(text) >= embedding_format.vocabulary:
            raise _refused(
                index, f"has the token {max(text)}; those of this model are below {embedding_format.vocabulary}"
            )
    total = sum(map(len, tokens))
    if total > MAX_TOKENS_PER_REQUEST:
        message = f"input: {total} tokens in all, and a request has {MAX_TOKENS_PER_REQUEST} at most."
        raise ApiError(400, message, param="input", code="max_tokens_per_request")
    return tokens


def shortened(vectors: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """Return the first numbers of each vector, brought back to the length 1; a vector of zeros stays."""
    short = vectors[:, :dimensions]
    norms = np.linalg.norm(short, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = short / np.maximum(norms, np.finfo(np.float32).tiny)
    return scaled


def _answer(model: str, vectors: NDArray[np.float32], encoding: EncodingFormat, prompt_tokens: int) -> bytes:
    """Write the answer a vector at a time, so that other threads get their turn in between."""
    data = ",".join(
        f'{{"object":"embedding","index":{index},"embedding":{_written(vector, encoding)}}}'
        for index, vector in enumerate(vectors)
    )
    usage = json.dumps({"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens})
    return f'{{"object":"list","data":[{data}],"model":{json.dumps(model)},"usage":{usage}}}'.encode()


def _written(vector: NDArray[np.float32], encoding: EncodingFormat) -> str:
    if encoding == "base64":
        return f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"'
    return json.dumps(vector.tolist())


def _refused(index: int, what: str, code: str | None = None) -> ApiError:
    return ApiError(400, f"input[{index}] {what}.", param="input", code=code or "invalid_value")
