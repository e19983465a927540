"""The exit codes of dlm, and the errors that are a mistake of the user.

Any part of dlm raises them; the commands print them as one line.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from enum import IntEnum


class ExitCode(IntEnum):
    """What a dlm process tells the shell and SLURM."""

    DONE = 0
    BUG = 1
    USER_ERROR = 2
    DIVERGED = 3
    OUT_OF_MEMORY = 4
    PREEMPTED = 75  # EX_TEMPFAIL: to be continued later


NOTHING_TO_DO = 100  # the exit code of admit when the cell is finished; the batch script then ends with 0


class UserError(ValueError):
    """A mistake of the user: one line with the value, what is allowed and which key to change."""

    def __str__(self) -> str:
        """The line alone. DataLoader puts the traceback of a worker before the worker's error."""
        return super().__str__().rpartition(f"{UserError.__module__}.UserError: ")[2].rstrip("\n")


class TryAgainError(UserError):
    """A server does not answer at the moment, which is nobody's mistake. Ends with ExitCode.PREEMPTED."""


class DivergedError(RuntimeError):
    """The loss rose far or is no number any more. The cell ends with ExitCode.DIVERGED."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, the one behind it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def close_matches(value: object, allowed: Iterable[str], limit: int = 3) -> list[str]:
    """The allowed names most similar to ``value``, best first, without regard to case.

    Of two that are equally similar, the one that shares more of its beginning comes first.
    """
    wanted = str(value).lower()
    names = {name.lower(): name for name in allowed}

    def nearness(name: str) -> tuple[float, int]:
        return difflib.SequenceMatcher(a=name, b=wanted).ratio(), len(os.path.commonprefix([name, wanted]))  # noqa: RUF071 (letters, not paths)

    found = sorted(difflib.get_close_matches(wanted, names, n=max(len(names), 1), cutoff=0.5), key=nearness)
    return [names[name] for name in found[: -limit - 1 : -1]]


def hint(value: object, allowed: Iterable[str], *, otherwise: str | None = None) -> str:
    """What a user may have meant by ``value``: 'did you mean a or b?'.

    Args:
        value: The word that is not among ``allowed``.
        allowed: The words that are.
        otherwise: What to say when no word is near; by default the list of what is allowed.
    """
    names = list(allowed)
    near = close_matches(value, names)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"allowed: {', '.join(names)}" if otherwise is None else otherwise


def unknown(what: str, value: object, allowed: Iterable[str]) -> UserError:
    """A UserError for a name that is not among ``allowed``: the close matches, then everything that is allowed."""
    names = list(allowed)
    near = hint(value, names, otherwise="")
    return UserError(f"unknown {what} '{value}': {near + ' ' if near else ''}allowed: {', '.join(names)}")
