"""The exit codes of dlm, and the errors that end a run or a command.

Any part of dlm raises a UserError for a mistake of the user; the commands print it as one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of a dlm process, for the shell and SLURM."""

    DONE = 0
    BUG = 1
    USER_ERROR = 2
    DIVERGED = 3
    OUT_OF_MEMORY = 4
    PREEMPTED = 75  # EX_TEMPFAIL: to be continued later
    INTERRUPTED = 130  # a command that Ctrl-C stopped; a shell says 128 + SIGINT too


NOTHING_TO_DO = 100  # the exit code of admit when the cell is finished; the batch script then ends with 0


class UserError(ValueError):
    """A mistake of the user, in one line: the wrong value, the allowed values and the key to change."""

    def __str__(self) -> str:
        """Return the line without the traceback that DataLoader puts before the error of a worker."""
        return super().__str__().rpartition(f"{UserError.__module__}.UserError: ")[2].rstrip("\n")


class TryAgainError(UserError):
    """A server does not answer at the moment, though the input is right. Ends with ExitCode.PREEMPTED."""


class DivergedError(RuntimeError):
    """The loss rose too far or is not finite. The cell ends with ExitCode.DIVERGED."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, then its cause or context, then the cause of that exception, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def close_matches(value: object, allowed: Iterable[str], limit: int = 3) -> list[str]:
    """Return the allowed names most similar to ``value``, at most ``limit``, best first, ignoring case.

    Of two equally similar names, the one with the longer common prefix comes first.
    """
    import difflib  # late, because dlm.core.signals imports this file before it answers to Ctrl-C

    wanted = str(value).lower()
    names = {name.lower(): name for name in allowed}

    def nearness(name: str) -> tuple[float, int]:
        return difflib.SequenceMatcher(a=name, b=wanted).ratio(), len(os.path.commonprefix([name, wanted]))  # noqa: RUF071 (letters, not paths)

    found = sorted(difflib.get_close_matches(wanted, names, n=max(len(names), 1), cutoff=0.5), key=nearness)
    return [names[name] for name in found[: -limit - 1 : -1]]


def hint(value: object, allowed: Iterable[str], *, otherwise: str | None = None) -> str:
    """Suggest what a user may have meant by ``value``: 'did you mean a or b?'.

    Args:
        value: The word that is not among ``allowed``.
        allowed: The allowed words.
        otherwise: The text to return when no word is similar; by default the list of the allowed words.
    """
    names = list(allowed)
    near = close_matches(value, names)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"allowed: {', '.join(names)}" if otherwise is None else otherwise


def unknown(what: str, value: object, allowed: Iterable[str], *, listed_in: str | None = None) -> UserError:
    """Make a UserError for a name that is not among ``allowed``.

    Args:
        what: What the name is, such as 'key of trainer'.
        value: The name.
        allowed: The allowed names.
        listed_in: Where a user finds a long list of the allowed names; None: the message lists them.

    Returns:
        The error, which names the close matches, and then all allowed names or where they are listed.
    """
    names = list(allowed)
    near = hint(value, names, otherwise="") if isinstance(value, str) else ""
    rest = f"allowed: {', '.join(names)}" if listed_in is None else f"{listed_in} lists all"
    return UserError(f"unknown {what} {shown(value)}: {near + ' ' if near else ''}{rest}")


def without_passwords(words: str) -> str:
    """Return a text with *** for the user name and the password of every URL, because messages end up in logs."""
    import re  # late, as difflib

    return re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#]+@", r"\1***@", words)


def shown(value: object) -> str:
    """Write a value for a message in one line of at most 60 characters, as YAML does: null, true, 'text', [1, null]."""
    import json  # late, as difflib

    if value is None or isinstance(value, bool | list | dict):
        line = json.dumps(value, default=str, ensure_ascii=False)
    else:
        line = repr(str(value) if isinstance(value, str) else value)
    line = line.encode(errors="backslashreplace").decode()  # half of a character cannot be printed
    return line if len(line) <= 60 else f"{line[:57]}..."
