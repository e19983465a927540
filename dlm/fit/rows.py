"""rows: any CSV or DataFrame -> the finished runs, every number checked. Called by table.

Columns: params, tokens, loss; optional: flops, budget, weight, run_id, parent, loss_se, loss_se_own, unique_tokens,
objective, convention, status.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dlm.core.errors import UserError, close_matches

REQUIRED = ("params", "tokens", "loss")


POSITIVE = (*REQUIRED, "flops", "budget")


Runs = str | Path | pd.DataFrame


def read_runs(source: Runs) -> pd.DataFrame:
    """The finished rows, numbers checked. Raises UserError with column and row; remarks are in
    `.attrs['warnings']`.
    """
    frame, where = _load(source)
    for name in REQUIRED:
        _require(frame, name, where)
    frame = frame.assign(row=[*range(2, len(frame) + 2)])  # the line in the file, the header being line 1
    if "status" in frame:
        frame = _finished(frame, where)
    for name in POSITIVE:
        if name in frame:
            frame[name] = _numbers(frame, name, where, optional=name == "budget")
    for name in ("weight", "loss_se", "loss_se_own"):
        if name in frame:
            frame[name] = _numbers(frame, name, where, least=0.0, optional=name != "weight")
    frame, warnings = _once(frame)
    frame = frame.drop(columns="row").reset_index(drop=True)
    frame.attrs["warnings"] = [*warnings, *_remarks(frame)]
    return frame


def _load(source: Runs) -> tuple[pd.DataFrame, str]:
    if isinstance(source, pd.DataFrame):
        return source.copy(), "the table"
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no file {path}: give a CSV with the columns {', '.join(REQUIRED)}")
    try:
        frame = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(f"{path} has rows with more fields than its header has names")
    return frame, str(path)


def _require(frame: pd.DataFrame, name: str, where: str) -> None:
    if name not in frame:
        columns = [str(column) for column in frame.columns]
        near = close_matches(name, columns)
        hint = f"is it {' or '.join(near)}?" if near else f"it has {', '.join(columns) or 'none'}"
        raise UserError(f"{where} has no column '{name}': {hint}; needed are {', '.join(REQUIRED)}")


def _finished(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    done = frame[frame["status"] == "done"].copy()
    if done.empty:
        states = ", ".join(f"{count} {state}" for state, count in frame["status"].value_counts().items())
        raise UserError(f"{where} has no run with status 'done' ({states or 'no rows'}): nothing to fit yet")
    return done


def _numbers(
    frame: pd.DataFrame, name: str, where: str, *, least: float | None = None, optional: bool = False
) -> pd.Series[float]:
    """The column as floats above zero (or not below `least`); the first bad row is named."""
    values = pd.to_numeric(frame[name], errors="coerce").astype(float)
    fine = values.gt(0) if least is None else values.ge(least)
    fine &= values.lt(float("inf"))
    if optional:
        fine |= frame[name].isna()
    if not fine.all():
        first = fine[~fine].index[0]
        kind = "a number above 0" if least is None else f"a number not below {least:g}"
        shown = frame.loc[first, name]
        shown = "empty" if pd.isna(shown) else repr(shown) if isinstance(shown, str) else shown
        more = f" ({int((~fine).sum())} such rows)" if (~fine).sum() > 1 else ""
        raise UserError(f"{where}, row {frame.loc[first, 'row']}: {name} is {shown}, not {kind}{more}")
    return values


def _once(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    keys = [name for name in ("run_id", "seed", "objective", *REQUIRED) if name in frame]
    repeated = frame.duplicated(subset=keys)
    if not repeated.any():
        return frame, []
    first = frame.loc[repeated, "row"].iloc[0]
    said = f"{int(repeated.sum())} rows repeat another exactly and count once (first: row {first})"
    return frame[~repeated].copy(), [said]


def _remarks(frame: pd.DataFrame) -> list[str]:
    """What a law does not know about these runs."""
    remarks = []
    epochs = pd.to_numeric(frame["epochs"], errors="coerce").max() if "epochs" in frame else 0.0
    if epochs > 1.05:
        said = "every law but data-constrained counts repeated tokens as new"
        remarks.append(f"runs read their data up to {epochs:.1f} times: {said}")
    return remarks
