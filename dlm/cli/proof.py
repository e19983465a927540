"""Freeze the forecast of a sweep's proof run when its other cells are done, and find out how the proof run ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlm.cli.table import say
from dlm.cli.targets import Sweep
from dlm.cli.tuned import recipe_notes
from dlm.core import text
from dlm.core.configs import load_mapping
from dlm.core.errors import UserError
from dlm.plan.proof import (
    PROOF_FILE,
    build_proof,
    proof_budget,
    proof_seed,
    read_forecasts,
    write_forecasts,
)
from dlm.plan.store import write_plan
from dlm.record.outcomes import State
from dlm.record.run import read_result, run_directory
from dlm.submit.retry import why_not

if TYPE_CHECKING:
    import pandas as pd

    from dlm.fit.proof import Proof
    from dlm.fit.result import FitResult
    from dlm.submit.cell_now import CellNow


def waits_for(
    sweep: Sweep, now: Mapping[str, CellNow], *, retry_failed: bool = False, unattended: bool = False
) -> list[str]:
    """Return the cells that have to end before the proof run: those that are not done and are started again.

    Args:
        sweep: The sweep.
        now: The current states of its cells.
        retry_failed: Whether failed cells are started again whatever the cause.
        unattended: As in ``why_not``.
    """
    return [
        cell.cell_id
        for cell in sweep.plan.grid
        if (one := now[cell.cell_id]).state is not State.DONE
        and (
            one.is_live
            or (why_not(one, retry_failed=retry_failed, unattended=unattended) is None and not _is_too_large(one))
        )
    ]


def _is_too_large(now: CellNow) -> bool:
    """Whether a cell has run out of memory with one sequence at a time, so that it is not started again."""
    return now.state is State.OUT_OF_MEMORY and now.record.micro_batch == 1


def missing_forecasts(sweep: Sweep) -> list[str]:
    """Return the objectives whose proof run is asked for and whose forecast is not frozen yet."""
    if sweep.plan.spec.proof is None or sweep.plan.waits_for_recipe:
        return []
    known = [one["label"] for one in read_forecasts(sweep.folder)]
    return [name for name in sweep.plan.spec.objectives if name not in known]


def with_proof(sweep: Sweep, now: Mapping[str, CellNow]) -> Sweep:
    """Freeze the forecasts of a sweep whose other cells have ended, and return the sweep with its proof runs.

    A forecast that is frozen is never frozen again. Cells that have failed do not hinder the proof run if every budget
    still has a usable fit. If there is no forecast, the reason is printed.

    Args:
        sweep: The sweep.
        now: The current states of its cells.
    """
    from dlm.fit.frozen import checked

    frozen, missing = read_forecasts(sweep.folder), missing_forecasts(sweep)
    if not missing:
        return sweep
    for one in frozen:
        checked(one, sweep.folder / PROOF_FILE)
    failed = [cell.cell_id for cell in sweep.plan.grid if now[cell.cell_id].result is None]
    made = _forecasts(sweep, missing, failed)
    if not made:
        return sweep
    try:
        write_forecasts(sweep.folder, [*frozen, *made], before=len(frozen))
    except FileExistsError:
        say(f"another command has frozen {sweep.folder / PROOF_FILE} meanwhile: its forecast counts")
    else:
        for one in made:
            say(f"frozen in {sweep.folder / PROOF_FILE}: sha256 {one['sha256']}, made {one['made']}")
    return Sweep(sweep.folder, write_plan(sweep.folder, sweep.plan))


def _forecasts(sweep: Sweep, objectives: Sequence[str], failed: Sequence[str]) -> list[dict[str, Any]]:
    """Collect the runs, fit them, and return a forecast for each objective whose fits determine N*."""
    from dlm.cli.fits import fits_of
    from dlm.collect.tables import collect
    from dlm.fit.proof import best_size, freeze_proof

    runs, flops = collect(sweep.folder).runs, proof_budget(sweep.plan.spec)
    say("fitting, to predict the proof run ...")
    fits = {} if runs.empty else fits_of(runs)
    made = []
    for objective in objectives:
        own = [fit for fit in fits.values() if fit.label == objective]
        best, why = best_size(own, flops)
        why = _failure(own, failed) or why
        if why or best is None:
            say(f"no proof run of {objective}: {why}")
            continue
        varied = _best_varied(sweep, runs, objective)
        try:
            cells, notes = build_proof(sweep.plan, objective=objective, best=best.N, varied=varied)
        except UserError as error:  # the other objectives and the report do not depend on it
            say(f"no proof run of {objective}: {error}")
            continue
        known = [cell.cell_id for cell in cells if read_result(run_directory(sweep.folder, cell.cell_id)) is not None]
        if known:
            say(f"no proof run of {objective}: {known[0]} was trained before there was a forecast of it")
            continue
        assert sweep.plan.spec.proof is not None
        asked, notes = sweep.plan.spec.proof.sizes, [*notes, *_notes(sweep, varied), *recipe_notes(sweep.plan, own)]
        decisions = [cell.decisions() for cell in cells]
        made.append(freeze_proof(own, flops, decisions, asked_sizes=asked, notes=notes))
    return made


def _failure(fits: Sequence[FitResult], failed: Sequence[str]) -> str:
    """Return why cells without a result leave no proof run; empty if every budget has a usable minimum without them."""
    from dlm.fit.proof import open_budgets

    unusable = open_budgets(fits)
    if not failed or not unusable:
        return ""
    return f"{len(failed)} of the cells have no result ({failed[0]} is the first), and {unusable[0]}"


def _notes(sweep: Sweep, varied: Mapping[str, Any]) -> list[str]:
    """State the choices that a reader could not guess: the seed of the proof run and its value of each varied key."""
    notes = [f"the proof run has seed {proof_seed(sweep.plan.spec)}, which no run of the sweep has"]
    if varied:
        values = ", ".join(f"{key} {value}" for key, value in varied.items())
        notes.append(f"of the values that the sweep varies, it uses those of the best run at the top budget: {values}")
    return notes


def _best_varied(sweep: Sweep, runs: pd.DataFrame, objective: str) -> dict[str, Any]:
    """Return the values of the keys that the definition varies, as the lowest loss at the top budget has them."""
    if not sweep.plan.spec.vary:
        return {}
    own = runs[(runs["objective"] == objective) & runs["role"].isna()]
    best = own.loc[own[own["budget"] == own["budget"].max()]["loss"].idxmin()]
    (cell,) = [cell for cell in sweep.plan.grid if cell.cell_id == best["run_id"]]
    return {key: {**cell.groups, **cell.overrides}[key] for key in sweep.plan.spec.vary}


def outcomes(
    sweep: Sweep, runs: pd.DataFrame, excluded: pd.DataFrame, fits: Mapping[str, FitResult]
) -> dict[str, Proof]:
    """Return the proof run of each objective, scored if it has ended; {} if the sweep neither has nor asks for one.

    Args:
        sweep: The sweep.
        runs: The rows of its runs.csv.
        excluded: The rows of its excluded.csv.
        fits: The fits of its runs.

    Raises:
        UserError: proof.json is no file of forecasts.
    """
    from dlm.fit.proof import Proof, best_size

    frozen = {one["label"]: one for one in read_forecasts(sweep.folder)}
    failed = [cell.cell_id for cell in sweep.plan.grid if cell.cell_id not in set(runs["run_id"])]
    asked = () if sweep.plan.spec.proof is None else sweep.plan.spec.objectives
    found = {}
    for label in dict.fromkeys([*asked, *frozen]):
        own = [fit for fit in fits.values() if fit.label == label]
        if label in frozen:
            found[label] = _scored(sweep, frozen[label], runs, excluded, own)
        else:
            why = _failure(own, failed) or best_size(own, proof_budget(sweep.plan.spec))[1]
            found[label] = Proof(label=label, why=why or "it follows when the other cells are done")
    return found


def _scored(
    sweep: Sweep, forecast: Mapping[str, Any], runs: pd.DataFrame, excluded: pd.DataFrame, fits: Sequence[FitResult]
) -> Proof:
    from dlm.fit.frozen import checked
    from dlm.fit.proof import NOT_YET, Proof
    from dlm.fit.table import score_forecast

    try:
        checked(forecast, sweep.folder / PROOF_FILE)
    except UserError as error:
        return Proof(label=forecast["label"], why=str(error))
    names = [cell["cell_id"] for cell in forecast["proof"]["cells"]]
    for name in names:
        config = run_directory(sweep.folder, name) / "config.yaml"
        tested = load_mapping(config).get("forecast") if config.is_file() else forecast["sha256"]
        if tested != forecast["sha256"]:
            why = f"{name} was started under another forecast (SHA-256 {str(tested)[:12]}), so it tests nothing"
            return Proof(label=forecast["label"], forecast=forecast, why=why)
    own = runs[runs["run_id"].isin(names)]
    notes = [*forecast["proof"]["notes"], *_changes(sweep, forecast, fits)]
    proof = Proof(label=forecast["label"], forecast=forecast, why=NOT_YET, notes=notes)
    missing = excluded[excluded["run_id"].isin(names)]
    if len(missing):
        why = f"{NOT_YET} ({missing.iloc[0]['run_id']}: {missing.iloc[0]['reason']})"
        proof = dataclasses.replace(proof, why=why)
    if own.empty:
        return proof
    score = score_forecast(forecast, own)
    return dataclasses.replace(
        proof, rows=score.rows, sizes=score.sizes, why="" if len(own) == len(names) else proof.why
    )


def _changes(sweep: Sweep, forecast: Mapping[str, Any], fits: Sequence[FitResult]) -> list[str]:
    """State what has changed since the forecast was frozen: the definition, or the runs that it was made from."""
    from dlm.fit.frozen import matched
    from dlm.fit.proof import headline

    changes, proof = [], forecast["proof"]
    asked = sweep.plan.spec.proof
    if asked is None:
        changes.append("the definition asks for no proof run any more")
    elif proof_budget(sweep.plan.spec) != proof["budget"]:
        now = text.flops(proof_budget(sweep.plan.spec))
        changes.append(f"the definition now asks for a proof run at {now} FLOPs")
    elif asked.sizes != proof["asked_sizes"]:
        changes.append(f"the definition now asks for proof runs of {asked.sizes} sizes")
    main = headline(fits)
    if main is not None and main.runs:
        found = matched(forecast, main.runs)
        if found.new.any() or found.lost or found.changes:
            changes.append("the runs that the law is fitted to have changed")
    made = forecast["made"]
    return [
        f"{change}; the forecast of {made} stands, because a frozen forecast is never replaced" for change in changes
    ]
