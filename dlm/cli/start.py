"""chain: target -> plan, price, question, jobs, and on this machine all the way to the report. Called by cli.

Everything slow is imported by the function that needs it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlm.cli.prepared import Stop, make_data_ready, prepare_own_data
from dlm.cli.price import How, agree_on_cost, left_to_do, price_here
from dlm.cli.targets import Chosen, choose, warn
from dlm.core.errors import ExitCode, UserError, unknown

if TYPE_CHECKING:
    from dlm.submit.slurm import Slurm


LAUNCHERS = ("auto", "submitit_slurm", "submitit_local")


LAUNCHER_KEY = "hydra.launcher."


def check_overrides(words: Sequence[str]) -> None:
    """Raise UserError for an override of every job that would change what a planned cell is, or how it is launched."""
    from dlm.plan.grid import DECIDING

    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key == "hydra/launcher":
            raise UserError(f"--override {word}: choose the launcher with --launcher")
        top = key.split(".")[0]
        decides = top in (*DECIDING, "training", "validation", "seed", "recipe") or key == "trainer.precision"
        if decides and key not in ("data.micro_batch_size", "data.num_workers", "data.data_dir"):
            raise UserError(f"--override {word} would change the result of planned cells: use --set {word.lstrip('+')}")


def _launcher(name: str) -> str:
    """submitit_slurm or submitit_local; auto asks for a controller."""
    if name not in LAUNCHERS:
        raise unknown("launcher", name, LAUNCHERS)
    if name != "auto":
        return name
    from dlm.submit.slurm import slurm_answers

    return "submitit_slurm" if slurm_answers() else "submitit_local"


def _slurm(how: How) -> Slurm:
    """The cluster of configs/hydra/launcher/submitit_slurm.yaml with ``hydra.launcher.KEY=VALUE`` over it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from dlm.core.configs import load_choice
    from dlm.submit.job import slurm_settings
    from dlm.submit.slurm import Slurm

    words = [word for word in how.extra if word.startswith(LAUNCHER_KEY)]
    try:
        given = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(words)}
    except HydraException as error:
        raise UserError(f"{' '.join(words)} is not in Hydra's grammar: {' '.join(str(error).split())}") from error
    facts = OmegaConf.create(dict(load_choice("hydra/launcher", "submitit_slurm")))
    for key, value in given.items():
        OmegaConf.update(facts, key.removeprefix(LAUNCHER_KEY), value)
    values: dict[str, Any] = OmegaConf.to_container(facts)  # type: ignore[assignment]
    return Slurm(slurm_settings({**values, **({"allow_dirty": True} if how.allow_dirty else {})}))


def _run_local(chosen: Chosen, how: How) -> int:
    """Train every cell here; the exit code of the first that did not end well. Raises Stop when interrupted."""
    from dlm.cli.screen import LocalProgress
    from dlm.core import paths
    from dlm.submit.cells import submit_plan
    from dlm.submit.local import LocalPool

    with LocalProgress(chosen.plan, chosen.sweep_dir) as progress:
        done = submit_plan(
            chosen.plan,
            chosen.sweep_dir,
            cluster=LocalPool(),
            data_dir=paths.data_dir(),
            extra=how.extra,
            retry_failed=how.retry_failed,
            on_event=progress.on_event,
            on_tick=progress.on_tick,
        )
    skipped = [f"{name}: {reason}" for name, reason in done.skipped.items() if reason != "done"]
    for line in skipped:
        warn(f"not started: {line}")
    for name, (state, reason) in done.failed.items():
        warn(f"{name} is {state}: {reason}")
    if done.interrupted:
        print("stopped; the same command goes on from the checkpoints", file=sys.stderr)
        raise Stop(ExitCode.PREEMPTED)
    code = next((code for code in done.exit_codes.values() if code), ExitCode.DONE)
    return code if code >= 0 else 128 - code


def _submit_slurm(chosen: Chosen, how: How, max_gpu_hours: float | None) -> int:
    from dlm.core import paths
    from dlm.submit.cells import submit_plan

    done = submit_plan(
        chosen.plan,
        chosen.sweep_dir,
        cluster=_slurm(how),
        data_dir=paths.data_dir(),
        extra=[word for word in how.extra if not word.startswith(LAUNCHER_KEY)],
        retry_failed=how.retry_failed,
        max_gpu_hours=max_gpu_hours,
    )
    for name, reason in done.skipped.items():
        print(f"not submitted: {name}: {reason}")
    arrays = sorted({int(job_id.split("_")[0]) for job_id in done.job_ids.values()})
    print(f"submitted {len(done.submitted)} cells{' as arrays ' + ', '.join(map(str, arrays)) if arrays else ''}")
    print(f"watch it with: dlm status {chosen.sweep_dir}; when it is done: dlm report {chosen.sweep_dir}")
    return ExitCode.DONE


def start(
    target: str,
    budget: Sequence[str] | None,
    top_budget: str | None,
    settings: Sequence[str] | None,
    how: How,
) -> tuple[Chosen, bool, int]:
    """Plan, show, price, ask, submit. Returns the sweep, whether it ran here, and the first bad exit code of a cell."""
    from dlm.cli.screen import show_plan
    from dlm.plan.store import write_plan

    check_overrides(how.extra)
    local = _launcher(how.launcher) == "submitit_local"
    extra = tuple(word.lstrip("+") if word.lstrip("+").startswith(LAUNCHER_KEY) else word for word in how.extra)
    for word in extra:
        if local and word.startswith(LAUNCHER_KEY):
            raise UserError(f"{word} is for SLURM, and this would run here: set the launcher to submitit_slurm")
    chosen = prepare_own_data(choose(target, budget, top_budget, settings))
    if not left_to_do(chosen):
        print(f"every cell of {chosen.sweep_dir} is done: nothing to train")
    elif local:
        chosen, on_cpu = price_here(chosen)
        extra = ("trainer=cpu", *extra) if on_cpu else extra
    else:
        show_plan(chosen.plan)
        chosen = make_data_ready(chosen)
    how = dataclasses.replace(how, extra=extra)
    max_gpu_hours = agree_on_cost(chosen, how) if left_to_do(chosen) else None
    chosen = Chosen(chosen.sweep_dir, write_plan(chosen.sweep_dir, chosen.plan))
    return chosen, local, _run_local(chosen, how) if local else _submit_slurm(chosen, how, max_gpu_hours)
