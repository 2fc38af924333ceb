"""Batches: a file of requests, how far its execution has come, and what is wrong with its lines."""

from __future__ import annotations

from typing import Literal, get_args

from luthier.records.record import Record

BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
BatchOutcome = Literal["completed", "expired", "cancelled", "failed"]

BATCH_ENDPOINTS: tuple[BatchEndpoint, ...] = get_args(BatchEndpoint)


class BatchRequest(Record):
    """What a batch is to do. ``output_expires_after_seconds`` is for its files of answers."""

    input_file_id: str
    endpoint: BatchEndpoint
    output_expires_after_seconds: int | None = None


class BatchProblem(Record):
    """Why a batch cannot be executed: a line of its file (from 1) that breaks a rule, or the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchState(Record):
    """How far a batch has come; it lies in the folder of its run. Times are Unix seconds.

    ``completed`` and ``failed`` count requests. ``model`` is the one that all lines name, if they do. The ids of the
    files are chosen before the files are made; they are there once the run has ended with an ``outcome``. A batch that
    failed has files of what was answered; resumed, it goes on, and makes others.
    """

    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    model: str | None = None
    problems: tuple[BatchProblem, ...] = ()
    in_progress_at: int | None = None
    cancelling_at: int | None = None
    finalizing_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    outcome: BatchOutcome | None = None
