"""The verbs of the `dlm` command, in the order of the flow. Each verb imports slow modules only when it runs."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import dlm
from dlm.cli import debug, fitting_verbs, gather, options, report_verb, screen, table, targets
from dlm.cli.options import AsJson, Target, Yes, takes
from dlm.core import signals, terminal
from dlm.core.errors import ExitCode, TryAgainError, UserError, unknown
from dlm.core.files import complaint
from dlm.record.outcomes import State

if TYPE_CHECKING:
    from dlm.cli.start import Started
    from dlm.collect.upload import Arrival

FOR_ALL_VERBS = ("--version", "--debug")  # options that stand before the verb
MISUSE: Any = typer.BadParameter.__mro__[2]  # what all errors of typer derive from; its name differs between versions
LONGEST_WAIT_SEC = 30.0  # between two looks of `dlm status --watch`, which begins with 5 seconds


class _Verbs(TyperGroup):
    """The verbs. Errors and an end by Ctrl-C are shown as dlm shows them: typer draws a box, and says "Aborted."."""

    def make_context(self, *given: Any, **how: Any) -> Any:
        with _one_line():
            return super().make_context(*given, **how)

    def invoke(self, context: Any) -> Any:
        try:
            with _one_line():
                return super().invoke(context)
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Raise a UserError where typer cannot use the words of the command line."""
    try:
        yield
    except MISUSE as error:
        said = " ".join(error.format_message().split()).rstrip(".")
        if not said:  # `dlm` without any words has shown its help
            raise
        context = getattr(error, "ctx", None)
        verb = "" if context is None or context.parent is None else f" {context.info_name}"
        option = getattr(error, "option_name", "")
        if option in FOR_ALL_VERBS:
            raise UserError(f"{option} stands before the verb: dlm {option}{verb} ...") from error
        raise UserError(f"{said[0].lower()}{said[1:]} (`dlm{verb} --help` lists what is allowed)") from error


HELP = (
    "From a compute budget to a scaling law for diffusion language models.\n\n"
    "The flow: sweeps/*.yaml -> [bold]plan[/] -> [bold]submit[/] -> training -> [bold]collect[/] -> "
    "[bold]fit[/] -> [bold]report[/]. The verb [bold]sweep[/] does it all.\n\n"
    "A sweep lives in one folder, workdir/NAME. Every verb can be run alone, and again: what is done is not done "
    "twice. Start with `dlm sweep sweeps/smoke.yaml`; `dlm VERB --help` explains a verb."
)
# In a terminal narrower than this, the boxes that typer draws around the help cut words.
WIDTH = shutil.get_terminal_size().columns
HAS_ROOM = WIDTH >= 80
app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if HAS_ROOM else None,
    context_settings={} if HAS_ROOM else {"terminal_width": WIDTH},
    help=HELP if HAS_ROOM else HELP.replace("[bold]", "").replace("[/]", ""),
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"dlm {dlm.__version__}")
        raise typer.Exit


@app.callback()
def for_all_verbs(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    with_log: Annotated[
        bool, typer.Option("--debug", help=f"Write the log {debug.LOG}, and show the traceback of every error.")
    ] = False,
) -> None:
    """Obey the options that stand before the verb."""
    if with_log:
        debug.start()


@app.command()
@takes(options.DoctorOptions)
def doctor(given: options.DoctorOptions) -> None:
    """Check in a minute or two, with one job, whether dlm can run on this SLURM cluster."""
    from dlm.cli.doctor import doctor as check_cluster

    raise typer.Exit(check_cluster(given))


@app.command()
@takes(options.PlanOptions)
def plan(given: options.PlanOptions) -> None:
    """Turn a definition into cells: model sizes, tokens and costs. No cell is started."""
    from dlm.cli.tuned import warn_open_ends
    from dlm.plan.cost import estimated, with_estimates
    from dlm.plan.proof import expected_proof
    from dlm.plan.store import write_plan

    sweep = targets.planned(given)
    targets.check_classes(sweep.plan, given)
    priced = with_estimates(sweep.plan)
    targets.warn_unprepared(priced)
    warn_open_ends(sweep)
    if not given.dry_run and (targets.changes_definition(given) or not targets.is_sweep_dir(given.target)):
        write_plan(sweep.folder, priced)
    if given.as_json:
        print(json.dumps(priced.to_json(estimates=True), indent=2, allow_nan=False))
        return
    screen.show_plan(priced, proof=estimated(expected_proof(priced), priced.spec.hardware))
    if not given.dry_run:
        print(f"plan: {sweep.folder / 'plan.json'}")


@app.command()
@takes(options.StartOptions)
def submit(given: options.StartOptions) -> None:
    """Start the cells that are not done. On SLURM the command returns at once; on this machine it waits for them."""
    print(f"planning {given.target} ...", flush=True)  # at once: the imports of a start take a second
    raise typer.Exit(_started(given, then=given.then is not None).code)


def _started(given: options.StartOptions, *, then: bool) -> Started:
    """Start a sweep; if it was submitted to SLURM, and with ``then``, have it looked after until its report."""
    from dlm.cli import follow
    from dlm.cli.start import start

    follow.check(given, then=then)
    reserved: list[Path] = []

    def reserve(folder: Path) -> None:
        reserved.append(folder)
        follow.reserve(given, folder)

    try:
        started = start(given, before_first=reserve if then else lambda folder: None)
    except UserError:
        for folder in reserved:
            with contextlib.suppress(UserError):  # the first error is the one to tell
                follow.dismiss(folder)
        raise
    if then and not started.ran_here:
        follow.arrange(started, given)
    elif given.webhook or given.mail:
        targets.warn("nothing is sent to --webhook or --mail, because the cells ran on this machine")
    return started


@app.command()
@takes(options.StartOptions)
def sweep(given: options.StartOptions) -> None:
    """Plan and submit; on this machine also train, collect, fit and report. When run again, it continues."""
    print(f"planning {given.target} ...", flush=True)  # at once: the imports of a start take a second
    started = _started(given, then=not given.no_then)
    if started.ran_here:
        gather.report(started.sweep, anew=False)
    raise typer.Exit(started.code)


@app.command()
def status(
    target: Target,
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Repeat until no cell runs or waits and no job looks after the sweep.")
    ] = False,
    summary: Annotated[
        bool, typer.Option("--summary", help="Only the sums: cells, FLOPs, hours and the time until the end.")
    ] = False,
) -> None:
    """Sum up a sweep, then show the state, step, loss, speed and time left of every cell, and why it failed."""
    from dlm.submit.follower import follower_line, is_under_way
    from dlm.submit.progress import progress_of
    from dlm.submit.table import status_rows, status_values, sweep_now

    sweep = targets.existing(target)
    wait_sec = 5.0
    while True:
        cells, warnings = sweep_now(sweep.folder, sweep.plan)
        progress = progress_of(cells, sweep.plan)
        if as_json:
            values = progress.values() if summary else status_values(cells)
            print(json.dumps(values, indent=2, allow_nan=False))
        else:
            screen.show_status([] if summary else status_rows(cells), progress.lines(sweep.folder.name))
            if looked_after := follower_line(sweep.folder):
                table.say(looked_after)
            for warning in warnings:
                targets.warn(warning)
        if not watch or not is_under_way(cells, sweep.folder):
            return
        time.sleep(wait_sec)
        wait_sec = min(1.2 * wait_sec, LONGEST_WAIT_SEC)
        terminal.console().clear()  # on a terminal only


@app.command()
def cancel(
    target: Target,
    cell: Annotated[list[str] | None, typer.Option(help="Only the cell with this id. Repeatable.")] = None,
    state: Annotated[
        list[str] | None, typer.Option(help="Only cells in this state: submitted or running. Repeatable.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Stop cells that run or wait. Their checkpoints are kept, and `dlm submit` continues them."""
    from dlm.submit.cells import cancel as cancel_cells
    from dlm.submit.follower import stop_following

    sweep = targets.existing(target)
    names = [planned.cell_id for planned in sweep.plan.cells]
    for what, given, allowed in (("cell", cell, names), ("--state", state, (State.SUBMITTED, State.RUNNING))):
        for name in given or ():
            if name not in allowed:
                raise unknown(what, name, allowed)
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Stop what runs or waits of {sweep.folder}?", abort=True)
    if not cell and not state and (stopped := stop_following(sweep.folder)):
        print(stopped)
    done = cancel_cells(cell or names, sweep.folder, states=[State(one) for one in state or ()], by_name=bool(cell))
    for name, what in done.items():
        print(f"{name}: {what}")
    if not done:
        print("nothing runs or waits")


@app.command(hidden=True)
def follow(
    folder: Annotated[Path, typer.Argument(help="The folder of a sweep that was submitted with --then.")],
) -> None:
    """Look after a sweep on SLURM once; the job that `--then report` puts into the queue calls this."""
    from dlm.cli.follow import follow as follow_sweep

    follow_sweep(folder)


@app.command()
def logs(
    cell: Annotated[str, typer.Argument(help="A cell's id, a part of it that no other id has, or a run directory.")],
    target: Annotated[str | None, typer.Argument(help="The sweep, if several have such a cell.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many lines of each log to show.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on showing what is added.")] = False,
) -> None:
    """Show the last lines that a cell and its batch job wrote."""
    from dlm.submit.logs import find_run, logs_of

    paths = logs_of(find_run(cell, None if target is None else targets.existing(target).folder))
    following = ["--follow=name"] if follow else []
    command = ["tail", f"--lines={lines}", "--verbose", *following, *map(str, paths)]
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=-1) as tail:
        assert isinstance(tail.stdout, io.BufferedReader)
        try:
            while part := tail.stdout.read1():
                print(terminal.shown_log(decoder.decode(part)), end="", flush=True)
        except BaseException:
            tail.terminate()
            raise
    print(terminal.shown_log(decoder.decode(b"", final=True)), end="")  # of a character that is cut off
    raise typer.Exit(tail.returncode)


@app.command()
@takes(options.CollectOptions)
def collect(given: options.CollectOptions) -> None:
    """Collect the runs of a sweep or a W&B project into runs.csv, excluded.csv and history.parquet."""
    folder, collected = gather.collect(given)
    gather.show_collected(collected, folder)


@app.command()
def sync(
    target: Target,
    wandb: Annotated[
        str | None,
        typer.Option(metavar="ENTITY/PROJECT", help="The project to upload to, in place of the one in the configs."),
    ] = None,
) -> None:
    """Upload runs that were logged offline or lost their connection to W&B, and report what did not arrive."""
    from dlm.collect.upload import sync as sync_runs

    arrivals = sync_runs(targets.run_folder(target), project=wandb)
    for arrival in arrivals:
        _show_arrival(arrival)
    logged = [arrival for arrival in arrivals if not arrival.nothing]
    whole = [arrival for arrival in logged if arrival.whole]
    rows = sum(arrival.uploaded for arrival in arrivals)
    print(f"{len(whole)} of {len(logged)} runs are whole on W&B, {rows} rows new")
    raise typer.Exit(ExitCode.DONE if len(whole) == len(logged) else ExitCode.PREEMPTED)


def _show_arrival(arrival: Arrival) -> None:
    run_id = arrival.run_id
    if arrival.skipped is not None:
        print(f"not looked at: {run_id}: {arrival.skipped}")
    elif arrival.nothing:
        print(f"nothing to upload: {run_id}: it logged nothing")
    elif arrival.to_upload and not arrival.known:
        what = f"{len(arrival.lacking)} of {len(arrival.rows)} rows" if arrival.lacking else "its result"
        targets.warn("; ".join([f"{run_id}: {what} did not arrive", *arrival.trouble, *arrival.lost]))
    elif not arrival.whole:
        lost = "; ".join(arrival.lost)
        targets.warn(f"{run_id}: what can be read of it has arrived, but a part of it is lost: {lost}")


fitting_verbs.add_to(app)


app.command()(report_verb.report)


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON)
def prepare(context: typer.Context) -> None:
    """Turn text into the packed tokens that training reads: dlm prepare text SOURCE --out DIR."""
    targets.run_prepare(context.args or ["--help"])


@app.command(context_settings=PASSED_ON)
def convert(context: typer.Context) -> None:
    """Turn a checkpoint of dlm or SMDM into one file of weights: dlm convert SOURCE TARGET.safetensors."""
    # Runs in a separate process, because it needs torch, which the `dlm` command itself never imports.
    command = [sys.executable, "-m", "dlm.convert", *(context.args or ["--help"])]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def main() -> None:
    """Run the `dlm` command.

    A mistake of the user ends it with one line on stderr and exit code 2; a server that does not answer, with one line
    and exit code 75; Ctrl-C with exit code 130.
    """
    with signals.interrupted_by_ctrl_c():
        try:
            app()
        except BaseException as error:
            if signals.is_end_by_ctrl_c(error):
                sys.exit(ExitCode.INTERRUPTED)
            line = complaint(error)
            debug.note(error, is_mistake=line is not None)
            if line is None:
                raise
            table.say(*f"dlm: {line}".split("\n"), to=sys.stderr)
            sys.exit(ExitCode.PREEMPTED if isinstance(error, TryAgainError) else ExitCode.USER_ERROR)
