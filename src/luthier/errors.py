"""Every error that Luthier raises on purpose, and how a name that is almost right is suggested.

A message says what is wrong, which value, and which rule it breaks; a hint is a command or a change that
mends it. A :class:`LuthierError` never shows a traceback to a user; anything else always does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MAX_PROBLEMS_SHOWN = 20
PROBLEMS_KEPT = 10_000  # of data that memory cannot hold: an error has no more findings than these


class LuthierError(Exception):
    """The root of all expected errors.

    Args:
        message: What is wrong, the value, and the rule.
        hint: A command or a change that mends it.
        problems: Single findings (such as bad rows), all collected before raising.
    """

    def __init__(self, message: str, *, hint: str | None = None, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  - {problem}" for problem in self.problems[:MAX_PROBLEMS_SHOWN]]
        if len(self.problems) > MAX_PROBLEMS_SHOWN:
            lines.append(f"  … and {len(self.problems) - MAX_PROBLEMS_SHOWN} more")
        if self.hint:
            lines.append(f"Hint: {self.hint}")
        return "\n".join(lines)


class InputError(LuthierError):
    """A value, file or option given by the user breaks a rule."""


class NothingToLearnError(InputError):
    """None of the examples given can be learned from."""


class NotFoundError(LuthierError):
    """A named thing does not exist."""


class ConflictError(LuthierError):
    """The state of a thing does not allow the request."""


class IntegrityError(LuthierError):
    """Bytes are not what their recorded hash says."""


class CapacityError(LuthierError):
    """Memory, disk or context length does not suffice."""


class BusyError(CapacityError):
    """There is room, but not now: it is worth asking again."""


class DiskFullError(CapacityError):
    """The disk is full; what was finished stays, and the work can go on once there is space."""


class EngineError(LuthierError):
    """A model engine failed, died, or cannot run a model."""


class DivergedError(EngineError):
    """Training gives no finite numbers any more; its last good state stays, and it can go on from there."""


class ParityError(LuthierError):
    """Two forms of one model (adapter, merged, exported, served) do not agree."""


class MissingDependencyError(LuthierError):
    """A feature needs a package that is not installed."""


class RunStopped(LuthierError):
    """A run was asked to pause or cancel and stopped at a safe point."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or the list of names, or an empty string."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(map(repr, names[:12]))}." if names else ""
