"""The types of the values in a sweep definition: numbers that may be fractions, shares, and values of config keys."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Frozen(BaseModel):
    """A part of a definition, which has no keys but its own and does not change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def no_switch(value: object) -> object:
    """Refuse true and false, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("switch", "true and false are no numbers")
    return value


def _number(value: object) -> object:
    """Convert a fraction such as '1/3' to a float. Return other values unchanged, for pydantic to check."""
    if isinstance(value, str) and "/" in value:
        with contextlib.suppress(ValueError, ZeroDivisionError):
            return float(Fraction(value))
    return no_switch(value)


def _plain(value: Any) -> Any:
    """Refuse a value that plan.json cannot hold, such as an infinite number."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise PydanticCustomError("plain", "a key is no text")
            _plain(item)
    elif isinstance(value, list):
        for item in value:
            _plain(item)
    elif not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise PydanticCustomError("plain", "no plain value")
    return value


Extent = Annotated[float, BeforeValidator(_number)]  # may be infinite
Number = Annotated[Extent, Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(no_switch)]
Share = Annotated[Number, Field(gt=0, le=1)]
Factor = Annotated[Number, Field(ge=1e-3, le=1e3)]
Value = Annotated[Any, AfterValidator(_plain)]  # of a config key
