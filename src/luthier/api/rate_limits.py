"""How many requests and tokens a key may have in a minute.

Each bound is a bucket that fills evenly and holds a minute's worth. How many tokens a request costs is known when it
is answered; so an estimate is taken before, and the difference is settled after, which can leave a debt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from luthier.api.requests import Exchange
from luthier.api.service import ADMISSION
from luthier.records.access import NO_RATES, Caller, Rates
from luthier.serve.api_error import ApiError

Header = tuple[bytes, bytes]


class Bucket:
    """What is left of one bound of one key."""

    def __init__(self, per_minute: int, moment: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._moment = moment

    def level(self, moment: float) -> float:
        """Return how much is left; below zero it is a debt."""
        gained = (moment - self._moment) * self.per_minute / 60
        self._level, self._moment = min(self.per_minute, self._level + gained), moment
        return self._level

    def seconds_until(self, amount: float, moment: float) -> float:
        """Return how long it takes until so much is there."""
        return max(0.0, amount - self.level(moment)) * 60 / self.per_minute

    def take(self, amount: float, moment: float) -> None:
        """Take an amount, or give it back where it is negative."""
        self._level = min(self.per_minute, self.level(moment) - amount)


@dataclass(frozen=True)
class Admission:
    """A request that was let in: the headers of its answer, and what it was estimated to cost."""

    headers: tuple[Header, ...] = ()
    tokens: Bucket | None = None
    estimate: int = 0


class RateLimiter:
    """The buckets of all keys, in memory: after a restart all are full. Belongs to one event loop.

    Args:
        default: The bounds of keys that have none of their own.
        clock: Seconds that never go back.
    """

    def __init__(self, default: Rates = NO_RATES, clock: Callable[[], float] = time.monotonic) -> None:
        self._default = default
        self._clock = clock
        self._buckets: dict[tuple[str | None, str], Bucket] = {}

    def admit(self, caller: Caller, estimate: int) -> Admission:
        """Let a request in, and take it and its estimated tokens from what its key has.

        Raises:
            ApiError: 429, saying when to come again.
        """
        moment = self._clock()
        requests = self._bucket(caller, "requests", moment)
        tokens = self._bucket(caller, "tokens", moment)
        for kind, bucket, amount in (("requests", requests, 1), ("tokens", tokens, max(1, estimate))):
            seconds = 0.0 if bucket is None else bucket.seconds_until(min(amount, bucket.per_minute), moment)
            if bucket is not None and seconds > 0:
                raise _too_many(kind, bucket.per_minute, seconds, _headers(requests, tokens, moment))
        if requests is not None:
            requests.take(1, moment)
        if tokens is not None:
            estimate = min(estimate, tokens.per_minute)
            tokens.take(estimate, moment)
        headers = _headers(requests, tokens, moment)
        return Admission(tuple((name.encode(), value.encode()) for name, value in headers.items()), tokens, estimate)

    def settle(self, admission: Admission, tokens: int) -> None:
        """Take what a request really cost."""
        if admission.tokens is not None:
            admission.tokens.take(tokens - admission.estimate, self._clock())

    def settle_exchange(self, exchange: Exchange) -> None:
        """Take what a request that is over has used of models."""
        admission: Admission | None = exchange.scope.get(ADMISSION)
        if admission is not None:
            self.settle(admission, exchange.usage.tokens)

    def _bucket(self, caller: Caller, kind: str, moment: float) -> Bucket | None:
        """Return a bucket of a key; callers without a key share one. A bound of 0 is none."""
        own, usual = getattr(caller.rates, f"{kind}_per_minute"), getattr(self._default, f"{kind}_per_minute")
        per_minute: int = (usual if own is None else own) or 0
        place = (caller.key, kind)
        if not per_minute:
            return None
        bucket = self._buckets.get(place)
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[place] = Bucket(per_minute, moment)
        return bucket


def duration(seconds: float) -> str:
    """Return a time as OpenAI writes it in headers: ``120ms``, ``1.5s``, ``6m0s``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 1000) / 1000:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"


def _too_many(kind: str, per_minute: int, seconds: float, headers: dict[str, str]) -> ApiError:
    return ApiError(
        429,
        f"Rate limit of this key reached: {per_minute} {kind} per minute. Try again in {duration(seconds)}.",
        type=kind,
        code="rate_limit_exceeded",
        retry_after_seconds=seconds,
        more_headers=headers,
    )


def _headers(requests: Bucket | None, tokens: Bucket | None, moment: float) -> dict[str, str]:
    headers = {}
    for kind, bucket in (("requests", requests), ("tokens", tokens)):
        if bucket is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level(moment))))
            headers[f"x-ratelimit-reset-{kind}"] = duration(bucket.seconds_until(bucket.per_minute, moment))
    return headers
