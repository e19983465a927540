"""Parse JSON that anybody may have written: text that Python cannot read, or reads as no JSON, is a ValueError."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DIGITS = 300  # of a whole number: a longer one is beyond the range of a float, and Python refuses 4,300 digits


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Parse a JSON text.

    Args:
        text: The text, or its bytes.
        finite: Refuse NaN and infinite numbers, which JSON does not have; other programs than dlm write them.

    Raises:
        ValueError: The text is no JSON, is nested too deeply, or holds a number that is too large.
    """
    if not isinstance(text, str):
        text = text.decode(json.detect_encoding(text))
    try:
        return (_FINITE if finite else _ANY).decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, and at most {MAX_DIGITS} are allowed")
    return int(digits)


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        shown = word if len(word) <= 20 else f"{word[:17]}..."
        raise ValueError(f"{shown} is no finite number")
    return value


_ANY = json.JSONDecoder(parse_int=_whole)
_FINITE = json.JSONDecoder(parse_int=_whole, parse_float=_finite, parse_constant=_finite)
