"""Define what `dlm doctor` says of one thing that it has looked at."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, FAILED = "ok", "warning", "FAILED"


@dataclass(frozen=True)
class Check:
    """One line of `dlm doctor`."""

    name: str
    state: str  # OK, WARNING or FAILED
    found: str
    advice: str = ""  # the key or the command to change; empty if the state is OK


def ok(name: str, found: str) -> Check:
    return Check(name, OK, found)


def warning(name: str, found: str, advice: str) -> Check:
    return Check(name, WARNING, found, advice)


def failed(name: str, found: str, advice: str) -> Check:
    return Check(name, FAILED, found, advice)
