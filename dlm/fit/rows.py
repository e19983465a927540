"""Read the finished runs of a CSV file or DataFrame, check every number, and group the runs by budget.

Columns: params, tokens, loss; optional: flops, budget, weight, run_id, parent, loss_se, loss_se_own, unique_tokens,
objective, convention, status, role, and the other columns of `known.SETTINGS`, which tell replicates from other runs.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dlm.core import text
from dlm.core.errors import UserError, hint, shown, unknown
from dlm.fit import budgets
from dlm.fit.csv_file import read_csv
from dlm.fit.known import IDENTITY, SETTINGS, RunTable, as_text
from dlm.fit.points import Array

REQUIRED = ("params", "tokens", "loss")
POSITIVE = (*REQUIRED, "flops", "budget", "unique_tokens")
NOT_NEGATIVE = ("weight", "loss_se", "loss_se_own")
MAY_BE_EMPTY = ("budget", "unique_tokens", "loss_se", "loss_se_own")
PROOF = "proof"  # the role of a run that tests a law
MAX_BYTES = 256 * 1024**2  # of a CSV file, uncompressed: a million rows of dlm
REPEATS = "runs read their data up to"  # how the warning begins that does not concern laws of unique tokens
ONE_EPOCH = 1.05  # number of epochs up to which no data count as repeated
ROUNDED = 1.001  # ratio of unique tokens to tokens up to which a table is taken as rounded

Runs = str | Path | pd.DataFrame


def read_runs(source: Runs, *, proofs: bool = False) -> pd.DataFrame:
    """Read the finished runs. `.attrs` of the table that is returned holds `warnings` and `notes` about them.

    Args:
        source: A CSV file, a folder with a runs.csv, or a DataFrame.
        proofs: Whether to keep proof runs (`role` is 'proof'), to grade them. They test a law, so no law is fitted to
            them; if they are left out, a note says so.

    Raises:
        UserError: If the file cannot be read, a column is missing, no run is finished, or a value is not allowed; in
            the last case, the message names the row.
    """
    frame, where = load_table(source)
    lacking = [name for name in REQUIRED if name not in frame]
    if lacking:
        columns = [str(column) for column in frame.columns]
        has = hint(lacking[0], columns, otherwise=f"it has {', '.join(columns) or 'none'}")
        names = text.listed([f"'{name}'" for name in lacking])
        raise UserError(
            f"{where} has no column{'s' if len(lacking) > 1 else ''} {names}: {has}; needed are {', '.join(REQUIRED)}"
        )
    frame = frame.assign(row=[*range(2, len(frame) + 2)])  # the line in the file, whose header is line 1
    earlier = {name: frame.attrs.get(name, []) for name in ("warnings", "notes")}  # of runs that were read before
    notes: list[str] = []
    if "role" in frame and not proofs:
        frame, notes = _without_proofs(frame, where)
    if "status" in frame:
        frame = _finished(frame, where)
    frame, without_loss = _with_loss(frame, where)
    for name in (*POSITIVE, *NOT_NEGATIVE):
        if name in frame:
            frame[name] = _numbers(frame, name, where)
    frame, warnings = _once(frame)
    frame = frame.drop(columns="row").reset_index(drop=True)
    said = {"warnings": [*without_loss, *warnings, *_remarks(frame)], "notes": [*notes, *_unread(frame)]}
    frame.attrs = {name: [*dict.fromkeys([*earlier[name], *said[name]])] for name in said}
    return frame


def run_table(frame: pd.DataFrame) -> RunTable:
    """What tells the runs apart, and their losses as measured; columns without any value are left out."""
    names = [name for name in IDENTITY if name in frame and frame[name].notna().any()]
    texts = {name: ["" if pd.isna(v) else as_text(v, name) for v in frame[name].tolist()] for name in names}
    return {**texts, "loss": frame.get("measured_loss", frame["loss"]).tolist()}


def cells(frame: pd.DataFrame) -> pd.Series[int]:
    """The number of the cell of each run: the replicates of a cell are equal in all `SETTINGS` that the table has."""
    if "unique_tokens" in frame:
        frame = frame.assign(unique_tokens=unique_tokens(frame))
    table = run_table(frame)
    return (
        pd.DataFrame({name: table[name] for name in SETTINGS if name in table}, dtype=str)
        .groupby([name for name in SETTINGS if name in table], sort=False)
        .ngroup()
    )


def unique_tokens(frame: pd.DataFrame) -> pd.Series[float]:
    """The unique tokens among those that each run reads: at most its tokens."""
    return frame["unique_tokens"].clip(upper=frame["tokens"])


def spent_flops(frame: pd.DataFrame) -> pd.Series[float]:
    """C of each run, FLOPs; 6 N D if the table does not say."""
    return frame["flops"] if "flops" in frame else 6.0 * frame["params"] * frame["tokens"]


def check_convention(frame: pd.DataFrame) -> None:
    """Raise a UserError if the runs count their FLOPs in several conventions."""
    if "convention" in frame and frame["convention"].nunique() > 1:
        names = text.listed(sorted(frame["convention"].dropna().astype(str).unique()))
        raise UserError(
            f"the runs count FLOPs in several conventions ({names}): one law needs one, so keep the rows of one"
        )


def checkpoints(frame: pd.DataFrame) -> list[str]:
    """Warn if the rows look like checkpoints of a few runs, and nothing names the run of each row."""
    if "run_id" in frame and frame["run_id"].notna().any():
        return []
    settings = [name for name in (*IDENTITY, "budget") if name in frame and name != "tokens"]
    labels = [*frame[settings].itertuples(index=False, name=None)]
    columns = (frame["tokens"], frame["loss"], spent_flops(frame))
    tokens, loss, flops = (np.array(column, dtype=np.float64) for column in columns)
    rows, runs = budgets.checkpoint_rows(labels, tokens, loss, flops)
    if not rows:
        return []
    return [
        f"{rows} of {len(frame)} rows look like checkpoints of {runs} runs, one for each size and setting: the rows of "
        "a run share its noise, so the intervals are too narrow; add a column run_id that names the run of each row"
    ]


def with_budgets(frame: pd.DataFrame, law: str, tolerance: float) -> pd.DataFrame:
    """The rows with their budgets, where those within `tolerance` are one. A note says so if there are such.

    Without budgets, the FLOPs are the budgets of isoFLOP curves, and of a combined law if several runs share them.
    Other laws need none.
    """
    if not 0 <= tolerance < 1:
        raise UserError(f"budget tolerance is {tolerance}: give a share from 0 (only equal budgets are one) to below 1")
    known = frame["budget"].notna() if "budget" in frame else pd.Series(False, index=frame.index)
    name = "budget" if known.any() else "flops"
    if name == "flops":
        spent = spent_flops(frame)
        repeat = budgets.are_groups(budgets.group(np.array(spent.tolist()), tolerance))
        if law != "isoflop" and not (law == "combined" and repeat):
            return frame
        frame, known = frame.assign(budget=spent), ~known
    given = frame.loc[known, "budget"].to_numpy(dtype=float)
    grouped = budgets.group(given, tolerance)
    if law == "isoflop":
        _check_groups(grouped, name, tolerance)
    before, after = set(given.tolist()), set(grouped.tolist())
    if len(after) == len(before):
        return frame
    frame = frame.copy()
    frame.loc[known, "budget"] = grouped
    levels = "1 budget" if len(after) == 1 else f"{len(after)} budgets"
    said = (
        f"{len(before)} values of {name} count as {levels}, because those within {_percent(tolerance)} are one budget"
    )
    frame.attrs["notes"].append(f"{said} (--budget-tolerance)")
    return frame


def _check_groups(grouped: Array, name: str, tolerance: float) -> None:
    """Raise a UserError if these budgets of the runs, (n,), do not repeat, so that there are no isoFLOP curves."""
    levels, rows = len(set(grouped.tolist())), len(grouped)
    near = f", where those within {_percent(tolerance)} count as one" if tolerance else ""
    change = "raise --budget-tolerance, or fit another law, which needs no budgets"
    if name == "budget" and levels == rows > 1:
        raise UserError(f"isoFLOP curves need several sizes at a budget: all {rows} budgets differ{near}; {change}")
    if name == "flops" and not budgets.are_groups(grouped):
        raise UserError(
            f"isoFLOP curves need a column 'budget': {levels} distinct flops in {rows} rows are no groups{near}; add "
            f"the FLOPs that each run aimed at, {change}"
        )


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def objectives_of(frame: pd.DataFrame) -> list[str]:
    return sorted(frame["objective"].dropna().astype(str).unique()) if "objective" in frame else []


def one_objective(frame: pd.DataFrame, objective: str | None) -> pd.DataFrame:
    """Select the runs of one objective. An unknown objective is a UserError, as is None if the table has several."""
    names = objectives_of(frame)
    if objective is not None and objective not in names:
        raise unknown("objective", objective, names)
    if objective is None and len(names) > 1:
        raise UserError(
            f"the runs have several objectives ({text.listed(names)}): choose one with --objective, or objective="
        )
    chosen = frame if objective is None else frame[frame["objective"] == objective].reset_index(drop=True)
    chosen.attrs = {name: list(lines) for name, lines in frame.attrs.items()}
    return chosen


def load_table(source: Runs) -> tuple[pd.DataFrame, str]:
    """Read all rows of a table as they are, and return them with a name of the table for messages."""
    if isinstance(source, pd.DataFrame):
        return source.copy(), "the table"
    path = Path(source)
    if path.is_dir():  # the folder of a sweep, or of runs that were collected from a server
        path = path / "runs.csv"
    if not path.is_file():
        raise UserError(f"no file {path}: give a CSV with the columns {', '.join(REQUIRED)}")
    try:
        frame = read_csv(io.BytesIO(_content(path)))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        kinds = "is not a CSV file, plain or compressed as .gz, .bz2 or .xz"
        raise UserError(f"{path} {kinds}: {error}") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(f"{path} has rows with more fields than its header has names")
    return frame, str(path)


def _content(path: Path) -> bytes:
    """Return the text of a CSV file, which may be compressed. Raises UserError if there is more of it than allowed."""
    opens: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    try:
        with opens.get(path.suffix.lower(), open)(path, "rb") as stream:
            content: bytes = stream.read(MAX_BYTES + 1)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:  # of the file system
            raise
        raise UserError(f"{path} is damaged or no {path.suffix} file: {error}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} holds more than {MAX_BYTES // 1024**2} MiB, too much for a table of runs: divide it")
    return content


def _without_proofs(frame: pd.DataFrame, where: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows that are no proof runs, and a note on the others."""
    is_proof = frame["role"] == PROOF
    if not is_proof.any():
        return frame, []
    if is_proof.all():
        raise UserError(f"{where} holds proof runs only (role is '{PROOF}'), and no law is fitted to them")
    count = int(is_proof.sum())
    said = f"{count} proof run{'s' if count > 1 else ''} left out: a proof run tests the law and never enters a fit"
    return frame[~is_proof].copy(), [said]


def _finished(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    done = frame[frame["status"] == "done"].copy()
    if done.empty:
        states = ", ".join(f"{count} {state}" for state, count in frame["status"].value_counts().items())
        raise UserError(f"{where} has no run with status 'done' ({states or 'no rows'}): nothing to fit yet")
    return done


def _with_loss(frame: pd.DataFrame, where: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows with a loss, and a warning that counts the others: the loss is empty, NaN or infinite there."""
    loss = pd.to_numeric(frame["loss"], errors="coerce").astype(float)
    without = frame["loss"].isna() | loss.isin([float("inf"), float("-inf")])  # _numbers refuses words
    if not without.any():
        return frame, []
    if without.all():
        raise UserError(f"{where} has no row with a loss: all {len(frame)} are empty, NaN or infinite")
    rows = "1 row has" if without.sum() == 1 else f"{int(without.sum())} rows have"
    first = frame.loc[without, "row"].iloc[0]
    said = f"{rows} no finite loss (empty, NaN or infinite) and {'is' if without.sum() == 1 else 'are'} left out"
    return frame[~without].copy(), [f"{said} (first: row {first})"]


def _numbers(frame: pd.DataFrame, name: str, where: str) -> pd.Series[float]:
    """The column as floats; a UserError names the first bad row."""
    values = pd.to_numeric(frame[name], errors="coerce").astype(float)
    fine = values.gt(0) if name in POSITIVE else values.ge(0)
    fine &= values.lt(float("inf"))
    if name in MAY_BE_EMPTY:
        fine |= frame[name].isna()
    if not fine.all():
        first = fine[~fine].index[0]
        kind = "a number above 0" if name in POSITIVE else "a number not below 0"
        value = frame.loc[first, name]
        said = "empty" if pd.isna(value) else shown(value) if isinstance(value, str) else value
        more = f" ({int((~fine).sum())} such rows)" if (~fine).sum() > 1 else ""
        raise UserError(f"{where}, row {frame.loc[first, 'row']}: {name} is {said}, not {kind}{more}")
    return values


def _once(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows without exact duplicates, and a warning about the duplicates."""
    keys = [name for name in ("run_id", "seed", "objective", *REQUIRED) if name in frame]
    repeated = frame.duplicated(subset=keys)
    if not repeated.any():
        return frame, []
    first = frame.loc[repeated, "row"].iloc[0]
    said = f"{int(repeated.sum())} rows repeat another exactly and count once (first: row {first})"
    return frame[~repeated].copy(), [said]


def _remarks(frame: pd.DataFrame) -> list[str]:
    """A warning if the runs repeat their data, which most laws ignore."""
    epochs = pd.to_numeric(frame["epochs"], errors="coerce").max() if "epochs" in frame else 0.0
    if "unique_tokens" in frame and not epochs > ONE_EPOCH:
        epochs = (frame["tokens"] / frame["unique_tokens"]).max()
    if not epochs > ONE_EPOCH:
        return []
    said = "laws without unique tokens count repeated text as new, and --law repeated fits those that do not"
    return [f"{REPEATS} {epochs:.1f} times: {said}"]


def _unread(frame: pd.DataFrame) -> list[str]:
    """A note if runs have more unique tokens than they read, as where the column holds the size of the data set."""
    if "unique_tokens" not in frame:
        return []
    count = int((frame["unique_tokens"] > ROUNDED * frame["tokens"]).sum())
    if not count:
        return []
    rows = "1 row has" if count == 1 else f"{count} rows have"
    return [f"{rows} more unique_tokens than tokens: as many as tokens count, because a run reads no more of its text"]
