"""cli: the `dlm` command, one verb per arrow of the flow. Everything slow is imported by the verb that needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from dlm.cli import gather, prepared, price, start, targets
from dlm.core.errors import ExitCode, TryAgainError, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "From a compute budget to a scaling law for diffusion language models.\n\n"
        "sweeps/*.yaml -> [bold]plan[/] -> [bold]submit[/] -> training -> [bold]collect[/] -> [bold]fit[/] -> "
        "[bold]report[/]; [bold]sweep[/] does it all.\n\n"
        "A sweep lives in one folder, workdir/NAME. Every verb can be run alone, and again: nothing is done twice. "
        "Start with: dlm sweep sweeps/smoke.yaml"
    ),
)


Target = Annotated[
    str, typer.Argument(help="A definition (sweeps/demo.yaml, or demo) or a sweep's folder (workdir/demo).")
]


Budgets = Annotated[
    list[str] | None, typer.Option("--budget", help="Target FLOPs of a cell; repeat it. Exactly these budgets.")
]


TopBudget = Annotated[
    str | None,
    typer.Option("--top-budget", help="The highest budget; the definition says which lower ones come with it."),
]


Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE: change a key of the definition, or a config key of every cell."),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


LauncherName = Annotated[
    str, typer.Option("--launcher", help="auto (SLURM where a controller answers), submitit_slurm or submitit_local.")
]


Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


Extra = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help="A Hydra override for every job that does not change its result, or hydra.launcher.KEY=VALUE.",
    ),
]


@app.command()
def plan(
    target: Target,
    budget: Budgets = None,
    top_budget: TopBudget = None,
    set_: Settings = None,
    as_json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show it; write nothing.")] = False,
) -> None:
    """Turn a definition into cells: which sizes, how many tokens, what they cost. Starts nothing."""
    from dlm.plan.store import write_plan

    chosen = targets.choose(target, budget, top_budget, set_)
    prepared.warn_unprepared(chosen.plan)
    if not dry_run and not targets.is_sweep_dir(target):
        write_plan(chosen.sweep_dir, chosen.plan)
    if as_json:
        print(json.dumps(chosen.plan.to_json(estimates=True), indent=2, allow_nan=False))
        return
    from dlm.cli.screen import show_plan

    show_plan(chosen.plan)
    if not dry_run:
        print(f"plan: {chosen.sweep_dir / 'plan.json'}")


RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Also cells that diverged, ran out of memory or failed often.")
]


AllowDirty = Annotated[
    bool,
    typer.Option("--allow-dirty", help="To SLURM even code that differs from the last commit; its diff is kept."),
]


MaxGpuHours = Annotated[
    float | None,
    typer.Option(
        "--max-gpu-hours",
        min=0,
        help="Refuse what costs more; on SLURM, start no cell once the sweep has used that much. "
        "By default max_gpu_hours of the definition.",
    ),
]


@app.command()
def submit(
    target: Target,
    budget: Budgets = None,
    top_budget: TopBudget = None,
    set_: Settings = None,
    launcher: LauncherName = "auto",
    yes: Yes = False,
    retry_failed: RetryFailed = False,
    allow_dirty: AllowDirty = False,
    max_gpu_hours: MaxGpuHours = None,
    override: Extra = None,
) -> None:
    """Start the cells that are not done: on SLURM it returns at once, on this machine it trains them."""
    how = price.How(
        launcher=launcher,
        yes=yes,
        retry_failed=retry_failed,
        allow_dirty=allow_dirty,
        max_gpu_hours=max_gpu_hours,
        extra=tuple(override or ()),
    )
    _, _, code = start.start(target, budget, top_budget, set_, how)
    raise typer.Exit(code)


@app.command()
def sweep(
    target: Target,
    budget: Budgets = None,
    top_budget: TopBudget = None,
    set_: Settings = None,
    launcher: LauncherName = "auto",
    yes: Yes = False,
    retry_failed: RetryFailed = False,
    allow_dirty: AllowDirty = False,
    max_gpu_hours: MaxGpuHours = None,
    override: Extra = None,
) -> None:
    """Plan, submit and, on this machine, train, collect, fit and report. Run again, it goes on."""
    how = price.How(
        launcher=launcher,
        yes=yes,
        retry_failed=retry_failed,
        allow_dirty=allow_dirty,
        max_gpu_hours=max_gpu_hours,
        extra=tuple(override or ()),
    )
    chosen, ran_here, code = start.start(target, budget, top_budget, set_, how)
    if ran_here:
        gather.report(chosen.sweep_dir)
    raise typer.Exit(code)


@app.command()
def status(
    target: Target,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again until nothing runs or waits.")] = False,
) -> None:
    """What every cell is doing: state, step, loss, speed, time left, reason of a failure."""
    import time

    from dlm.cli.screen import show_status
    from dlm.record.outcomes import State
    from dlm.submit.table import status_rows, status_values, summary_line, sweep_now

    chosen = targets.existing(target)
    while True:
        found, warnings = sweep_now(chosen.sweep_dir, chosen.plan)
        if as_json:
            print(json.dumps(status_values(found), indent=2, allow_nan=False))
        else:
            show_status(status_rows(found), summary_line(found, chosen.plan))
            for warning in warnings:
                targets.warn(warning)
        if not watch or not any(cell.state in (State.RUNNING, State.SUBMITTED) for cell in found):
            return
        time.sleep(5)
        if sys.stdout.isatty():
            print("\033[2J\033[H", end="")


@app.command()
def cancel(
    target: Target,
    cell: Annotated[list[str] | None, typer.Option("--cell", help="Only this cell; repeat it.")] = None,
    state: Annotated[
        list[str] | None, typer.Option("--state", help="Only cells in this state, submitted or running; repeat it.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Stop the cells that run or wait. They keep their checkpoints, and `dlm submit` goes on with them."""
    from dlm.core.errors import unknown
    from dlm.record.outcomes import State
    from dlm.submit.cells import cancel as cancel_cells

    chosen = targets.existing(target)
    names = [item.cell_id for item in chosen.plan.cells]
    for name in cell or ():
        if name not in names:
            raise unknown("cell", name, names)
    for name in state or ():
        if name not in (State.SUBMITTED, State.RUNNING):
            raise unknown("--state", name, (State.SUBMITTED, State.RUNNING))
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Stop what runs or waits of {chosen.sweep_dir}?", abort=True)
    done = cancel_cells(cell or names, chosen.sweep_dir, states=tuple(map(State, state or ())))
    for name, what in done.items():
        print(f"{name}: {what}")
    print(f"stopped {len(done)} cells" if done else "nothing runs or waits")


@app.command()
def logs(
    cell: Annotated[str, typer.Argument(help="A cell's id, a part of it that no other has, or its run directory.")],
    target: Annotated[str | None, typer.Argument(help="The sweep, where several have such a cell.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many, from the end.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on showing what is added.")] = False,
) -> None:
    """The end of what a cell, and its batch job, said."""
    from dlm.submit.table import find_run, logs_of

    paths = logs_of(find_run(cell, None if target is None else targets.existing(target).sweep_dir))
    command = ["tail", f"--lines={lines}", "--verbose", *(["--follow=name"] if follow else []), *map(str, paths)]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@app.command()
def collect(
    target: Annotated[str | None, typer.Argument(help="A sweep: its definition or folder. Without one, --out.")] = None,
    wandb: Annotated[
        str | None, typer.Option("--wandb", metavar="ENTITY/PROJECT", help="Also what a W&B server has.")
    ] = None,
    filter_: Annotated[
        list[str] | None,
        typer.Option("--filter", help="KEY=VALUE in W&B's words (group, state, config.seed.value); repeat it."),
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option(help="What the runs of others call things: a YAML file, see dlm/mapping.py.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Without a sweep: where the tables go.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every history against W&B's, number by number.")
    ] = False,
) -> None:
    """Read run directories and offline W&B files, and a W&B server, into runs.csv, excluded.csv, history.parquet."""
    source = gather.Source(project=wandb, filters=filter_ or (), mapping=mapping, out=out)
    folder, collected = gather.collect(target, source, verify=verify)
    for warning in collected.warnings:
        targets.warn(warning)
    for row in collected.excluded.to_dict("records"):
        print(f"left out {row['run_id']}: {row['reason']}")
    print(f"{len(collected.runs)} runs: {folder / 'runs.csv'}")


@app.command()
def sync(
    target: Target,
    wandb: Annotated[
        str | None,
        typer.Option("--wandb", metavar="ENTITY/PROJECT", help="Where to; by default your own entity, project dlm."),
    ] = None,
) -> None:
    """Upload runs that were logged offline, or lost W&B on the way, and say what did not arrive."""
    from dlm.collect.upload import sync as sync_runs

    arrivals = sync_runs(targets.run_folder(target), project=wandb)
    for one in arrivals:
        if one.skipped is not None:
            print(f"not looked at: {one.run_id}: {one.skipped}")
        elif one.nothing:
            print(f"nothing to upload: {one.run_id}: it logged nothing")
        elif one.to_upload and not one.known:
            what = f"{len(one.lacking)} of {len(one.rows)} rows" if one.lacking else "its result"
            targets.warn("; ".join([f"{one.run_id}: {what} did not arrive", *one.trouble, *one.lost]))
        elif not one.whole:
            targets.warn(f"{one.run_id}: what can be read of it has arrived, not all of it: {'; '.join(one.lost)}")
    some = [one for one in arrivals if not one.nothing]
    whole = [one for one in some if one.whole]
    print(f"{len(whole)} of {len(some)} runs are whole on W&B, {sum(one.uploaded for one in arrivals)} rows new")
    raise typer.Exit(ExitCode.DONE if len(whole) == len(some) else ExitCode.PREEMPTED)


RunsFile = Annotated[
    Path, typer.Argument(help="Any CSV with columns params, tokens, loss (flops, budget, weight, run_id).")
]


LawName = Annotated[str, typer.Option(help="chinchilla, skaling, tied, data-constrained, isoflop or envelope.")]


NormName = Annotated[str, typer.Option(help="The norm of the surface fit: huber, mse or l1.")]


Delta = Annotated[float, typer.Option(help="Huber's corner, in units of the residual.")]


Space = Annotated[str, typer.Option(help="Residuals of log or raw loss.")]


Replicates = Annotated[int, typer.Option(help="Replicates behind the intervals; 0 for none.")]


Seed = Annotated[int, typer.Option(help="Of the bootstrap.")]


At = Annotated[list[float] | None, typer.Option("--at", help="FLOPs to give N*, D*, L* at; repeat it.")]


Pins = Annotated[list[str] | None, typer.Option(help="A parameter to hold, E=1.7; repeat it.")]


Objective = Annotated[str | None, typer.Option(help="Which one, where the runs have several.")]


@app.command()
def fit(
    runs: RunsFile,
    law: LawName = "chinchilla",
    loss: NormName = "huber",
    delta: Delta = 1e-3,
    space: Space = "log",
    bootstrap: Replicates = 4000,
    seed: Seed = 0,
    at: At = None,
    objective: Objective = None,
    pin: Pins = None,
    under_tuned: Annotated[float, typer.Option(help="Below 1, points above the law count by so much less.")] = 1.0,
    weights: Annotated[str | None, typer.Option(help="'compute' weighs each run by its C.")] = None,
    curve: Annotated[str, typer.Option(help="Of isoflop: parabola, cubic or akima.")] = "parabola",
    axis: Annotated[str, typer.Option(help="Of isoflop: minima over log 'params' or log 'tokens'.")] = "params",
    as_json: AsJson = False,
) -> None:
    """Fit a law to a table of runs, dlm's own or any other, and say how far it may be believed."""
    from dlm.fit.table import fit_runs

    result = fit_runs(
        runs,
        law=law,
        loss=loss,
        delta=delta,
        space=space,
        bootstrap=bootstrap,
        seed=seed,
        at=at or (),
        objective=objective,
        fixed=_pinned(pin or []),
        under_tuned=under_tuned,
        weights=weights,
        curve=curve,
        axis=axis,
    )
    if result.status == "refused":
        raise UserError(f"{law}: {'; '.join(result.warnings)}")
    print(json.dumps(result.to_dict(), indent=2, allow_nan=False) if as_json else result.report())


@app.command()
def predict(
    runs: RunsFile,
    at: Annotated[list[float], typer.Option("--at", help="FLOPs to predict N*, D*, L* at; repeat it.")],
    freeze: Annotated[Path | None, typer.Option(help="Write them, dated and hashed, to this new file.")] = None,
    law: LawName = "chinchilla",
    loss: NormName = "huber",
    delta: Delta = 1e-3,
    space: Space = "log",
    bootstrap: Replicates = 4000,
    seed: Seed = 0,
    objective: Objective = None,
    pin: Pins = None,
    as_json: AsJson = False,
) -> None:
    """Say what larger runs will give before they exist; `dlm score` grades it afterwards."""
    from dlm.fit.table import predict_runs

    how = {"law": law, "loss": loss, "delta": delta, "space": space, "fixed": _pinned(pin or [])}
    result, written = predict_runs(
        runs, at=at, freeze=freeze, bootstrap=bootstrap, seed=seed, objective=objective, **how
    )
    print(json.dumps(result.to_dict(), indent=2, allow_nan=False) if as_json else result.report())
    if written and not as_json:
        print(f"frozen in {freeze}: sha256 {written['sha256']}, made {written['made']}")


@app.command()
def score(
    frozen: Annotated[Path, typer.Argument(help="What `dlm predict --freeze` wrote.")],
    runs: RunsFile,
    as_json: AsJson = False,
) -> None:
    """Grade frozen predictions by the runs that have come since."""
    from dlm.fit.table import score_runs

    graded = score_runs(frozen, runs)
    print(json.dumps(graded.to_dict(), indent=2, allow_nan=False) if as_json else graded.report())


def _pinned(words: list[str]) -> dict[str, float]:
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UserError(f"--pin {word}: write NAME=NUMBER, for example --pin E=1.7") from None
    return found


@app.command()
def compare(
    runs: Annotated[Path, typer.Argument(help="A CSV of runs, as for dlm fit.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second one; without it, two objectives of the first are compared.")
    ] = None,
    law: Annotated[str, typer.Option(help="chinchilla, skaling or isoflop.")] = "chinchilla",
    objective: Annotated[
        list[str] | None, typer.Option("--objective", help="Give it twice: for the first runs, for the second.")
    ] = None,
    bootstrap: Annotated[int, typer.Option(help="Replicates behind the intervals; 0 for none.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: AsJson = False,
) -> None:
    """How many times the compute of the first runs the second need, at equal loss."""
    from dlm.fit.table import compare_runs

    names = list(objective or ())
    if len(names) == 1 and other is not None:
        names *= 2
    if len(names) not in (0, 2):
        raise UserError(f"--objective is given {len(names)} times: name two, that of the first runs and of the second")
    one, two = names or (None, None)
    found = compare_runs(runs, other, first=one, second=two, law=law, bootstrap=bootstrap, seed=seed)
    print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else found.report())


@app.command()
def report(target: Target) -> None:
    """Collect, fit and write report/report.html with its figures."""
    gather.report(targets.existing(target).sweep_dir)


OF_THE_TRAINING_HALF = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=OF_THE_TRAINING_HALF)
def prepare(context: typer.Context) -> None:
    """Turn text into packed tokens with a manifest: dlm prepare text SOURCE --out DIR, stdlib, packed DIR."""
    raise typer.Exit(prepared.training_command("dlm.data.prepare.command", context.args or ["--help"]))


@app.command(context_settings=OF_THE_TRAINING_HALF)
def convert(context: typer.Context) -> None:
    """Turn a checkpoint (SMDM's too) into one file of weights: dlm convert SOURCE TARGET.safetensors|.pt."""
    raise typer.Exit(prepared.training_command("dlm.convert", context.args or ["--help"]))


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2, a server that is away one line and 75."""
    try:
        app()
    except UserError as error:
        print(f"dlm: {error}", file=sys.stderr)
        sys.exit(ExitCode.PREEMPTED if isinstance(error, TryAgainError) else ExitCode.USER_ERROR)
    except prepared.Stop as stop:
        sys.exit(stop.code)
