"""errors: the user's mistakes and every exit code. Raised everywhere, shown by cli and launch."""

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
    PREEMPTED = 75  # EX_TEMPFAIL: to be continued


NOTHING_TO_DO = 100  # what admit tells a batch script, which then ends with 0


class UserError(ValueError):
    """A mistake of the user: one line with the value, what is allowed and which key to change."""

    def __str__(self) -> str:
        """The line alone: a DataLoader hands on what a worker raised with that worker's traceback as its words."""
        return super().__str__().rpartition(f"{UserError.__module__}.UserError: ")[2].rstrip("\n")


class TryAgainError(UserError):
    """Nobody's mistake: what was asked, a server, does not answer just now. Ends with ExitCode.PREEMPTED."""


class DivergedError(RuntimeError):
    """The loss stopped being a number: the cell ends with ExitCode.DIVERGED."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, the one behind it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def close_matches(value: object, allowed: Iterable[str], limit: int = 3) -> list[str]:
    """The allowed names nearest to ``value``, best first, letter case aside; of equals, the one that begins alike."""
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
    """A UserError for a name that is not among ``allowed``, with the close matches first."""
    names = list(allowed)
    near = hint(value, names, otherwise="")
    return UserError(f"unknown {what} '{value}': {near + ' ' if near else ''}allowed: {', '.join(names)}")
