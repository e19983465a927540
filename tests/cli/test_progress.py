"""The bars of a sweep on this machine: what a running cell does, at any width."""

import os
import re
import sys
import time
from types import SimpleNamespace

import pytest
from support.stub_cell import result, status

from dlm.cli.progress import LocalProgress, fitting, phase_of
from dlm.cli.targets import Sweep
from dlm.record.outcomes import State
from dlm.record.run import run_directory, write_result, write_status

NAMES = ("mdm-110k-1.25e16-0a1b2c3d", "mdm-4k-2e10-00000000")


def cell_of(name, branch_step=None):
    own_share = 1 - (branch_step or 0) / 1000
    return SimpleNamespace(
        cell_id=name, steps=1000, tokens=1024000, flops={"full_masked_head": 1e9}, branch_step=branch_step,
        own_share=own_share,
    )  # fmt: skip


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys):
    """Run two cells on a terminal of some width, and return the last lines of the display by their first word."""

    def show(width, change, branch_step=None):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))
        cells = tuple(cell_of(name, branch_step if name == NAMES[0] else None) for name in NAMES)
        with LocalProgress(Sweep(tmp_path, SimpleNamespace(cells=cells)), {}) as progress:
            for name in NAMES:
                progress.on_event(SimpleNamespace(kind="started", job=SimpleNamespace(name=name)))
            change(run_directory(tmp_path, NAMES[0]))
            progress._looked = 0.0  # look again at once
            progress.on_tick()
        lines = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", capsys.readouterr().out).splitlines()
        assert max(len(line.rstrip()) for line in lines if not line.startswith("run directories")) <= width
        names = [at for at, line in enumerate(lines) if line.startswith(("all cells", *NAMES))]
        ends = [*names[1:], len(lines)]
        return {lines[at].split()[0]: " ".join(lines[at:end]) for at, end in zip(names, ends, strict=True)}

    return show


def running(run_dir, **changes):
    values = {"step": 250, "loss": 2.5, "tokens_per_sec": 25600.0, **changes}
    write_status(run_dir, status(State.RUNNING, **values))


@pytest.mark.parametrize(
    ("width", "there", "absent"),
    [
        (40, ["step 250/1,000", "loss 2.500", "30 s left"], ["tokens/s"]),
        (60, ["step 250/1,000", "loss 2.500"], ["tokens/s"]),
        (80, ["step 250/1,000", "loss 2.500", "30 s left", "25.6k tokens/s"], ["\N{BOX DRAWINGS HEAVY HORIZONTAL}"]),
        (200, ["\N{BOX DRAWINGS HEAVY HORIZONTAL}", "loss 2.500", "30 s left", "25.6k tokens/s"], []),
    ],
)
def test_a_running_cell_shows_what_fits_and_its_whole_id(shown, width, there, absent):
    lines = shown(width, running)
    line = lines[NAMES[0]]
    assert all(part in line for part in there) and not any(part in line for part in absent)
    assert "12 % of the FLOPs" in lines["all"]


def test_the_steps_of_a_trunk_do_not_count_for_its_branch(shown):
    assert "0 % of the FLOPs" in shown(80, running, branch_step=250)["all"]
    assert "18 % of the FLOPs" in shown(80, lambda at: running(at, step=520), branch_step=200)["all"]


def test_the_time_left_follows_from_the_flops_that_were_done_since_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = LocalProgress(Sweep(tmp_path, SimpleNamespace(cells=(cell_of("a"),))), {})
    progress._started["a"] = time.time()
    progress._begun = (time.monotonic() - 60.0, 5e8)  # half was done when this display began, a minute ago
    assert "60 s left" in progress._parts_of_all(7.5e8) and "60 s so far" in progress._parts_of_all(7.5e8)
    assert not any("left" in part for part in progress._parts_of_all(5.01e8))


def test_a_cell_that_ends_is_counted_with_its_loss_and_its_time(tmp_path, capsys):
    run_dir = run_directory(tmp_path, "a")
    write_result(run_dir, result("a", loss=2.34567))
    progress = LocalProgress(Sweep(tmp_path, SimpleNamespace(cells=(cell_of("a"), cell_of("b")))), {})
    job = SimpleNamespace(name="a", run_dir=run_dir)
    progress.on_event(SimpleNamespace(kind="ended", job=job, exit_code=0, wall_sec=41.6))
    assert capsys.readouterr().out == "[1/2] a: 2.3457 nats/token, 42 s\n"


def test_a_cell_says_what_it_does_before_its_first_step_and_while_it_validates(shown, tmp_path):
    run_dir = run_directory(tmp_path, NAMES[0])
    run_dir.mkdir(parents=True)
    begun = time.time()
    assert phase_of(run_dir, begun) == "starting torch"
    for name, phase in (("config.yaml", "building the model"), ("env.json", "waiting for data")):
        (run_dir / name).write_text("{}")
        assert phase_of(run_dir, begun) == phase
        assert phase in shown(80, lambda _: None)[NAMES[0]]
    for name in ("config.yaml", "env.json"):  # of an attempt yesterday
        os.utime(run_dir / name, (begun - 86400, begun - 86400))
    assert phase_of(run_dir, begun) == "starting torch"
    assert "first step" in shown(80, lambda at: write_status(at, status(State.RUNNING, step=0)))[NAMES[0]]
    assert "validating  loss 2.500" in shown(80, lambda at: running(at, phase="validating"))[NAMES[0]]


def test_the_bar_that_stays_says_how_the_sweep_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cell = SimpleNamespace(
        cell_id="a", steps=10, tokens=10240, flops={"full_masked_head": 1e9}, own_share=1.0, branch_step=None
    )
    job = SimpleNamespace(name="a", run_dir=run_directory(tmp_path, "a"))
    with LocalProgress(Sweep(tmp_path, SimpleNamespace(cells=(cell,))), {}) as progress:
        progress.on_event(SimpleNamespace(kind="started", job=job))
        progress._looked = time.monotonic() + 60  # it has just looked: the cell ends before the next time
        write_status(job.run_dir, status(State.DONE, step=10))
        progress.on_event(SimpleNamespace(kind="ended", job=job, exit_code=0, wall_sec=1.0))
    last = [line for line in capsys.readouterr().out.splitlines() if "all cells" in line][-1]
    assert "100 % of the FLOPs" in last and "left" not in last


def test_before_the_first_cell_is_started_the_whole_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cells = (cell_of("a"),)
    with LocalProgress(Sweep(tmp_path, SimpleNamespace(cells=cells)), {}):
        pass
    assert re.search(r"all cells.* starting torch  0/1 done", capsys.readouterr().out)


def test_the_status_of_an_earlier_attempt_is_not_shown(shown, tmp_path):
    write_status(run_directory(tmp_path, NAMES[0]), status(State.PREEMPTED, step=250, loss=2.5, updated=1.0))
    line = shown(80, lambda _: None)[NAMES[0]]
    assert "starting torch" in line and "loss" not in line


def test_parts_that_do_not_fit_are_dropped_from_the_end():
    parts = ["step 3/10", "loss 2.5", "3 s left"]
    assert fitting(parts, 5) == "step 3/10" and fitting(parts, 19) == "step 3/10  loss 2.5"
    assert fitting(parts, 29) == "  ".join(parts)
