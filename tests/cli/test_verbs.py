"""What the verbs of `dlm` take and say, in this process."""

import json
import re
import sys

import pytest
from support.demo_runs import demo_runs
from support.submissions import prepend_to_path
from typer.testing import CliRunner

from dlm.cli import gather, verbs
from dlm.cli.options import CollectOptions, FitOptions, PredictOptions
from dlm.core.errors import TryAgainError, UserError
from dlm.fit import table
from dlm.fit.budgets import TOLERANCE
from dlm.fit.frozen import extended
from dlm.submit import follower

VERBS = {command.callback.__name__: command.callback for command in verbs.app.registered_commands}


def dlm(*arguments):
    return CliRunner().invoke(verbs.app, list(arguments), env={"COLUMNS": "80"})


def test_there_is_a_verb_for_each_step_of_the_flow():
    assert {"plan", "submit", "sweep", "status", "cancel", "logs", "collect", "sync", "fit", "report"} <= set(VERBS)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("prepare", "convert")])
def test_the_help_of_a_verb_fits_80_columns(verb):
    shown = dlm(verb, "--help")
    assert shown.exit_code == 0 and VERBS[verb].__doc__.split()[0] in shown.output
    assert all(len(line) <= 80 for line in shown.output.splitlines()) and "…" not in shown.output


def test_options_become_the_keywords_of_a_fit(tmp_path):
    given = FitOptions(runs=tmp_path, law="skaling", pin=["E=1.7", "k=1"], at=[1e12], weights=None)
    keywords = given.keywords()
    assert keywords["fixed"] == {"E": 1.7, "k": 1.0} and keywords["law"] == "skaling" and keywords["at"] == [1e12]
    assert not {"runs", "as_json", "pin", "weights", "objective"} & set(keywords)
    assert PredictOptions(runs=tmp_path, at=[1e12]).keywords().keys() == keywords.keys() - {
        "under_tuned", "curve", "axis"
    }  # fmt: skip


@pytest.mark.parametrize("pin", ["E", "E=", "E=x"])
def test_a_pin_without_a_number_is_refused(tmp_path, pin):
    with pytest.raises(UserError, match=f"--pin {pin}: write NAME=NUMBER"):
        FitOptions(runs=tmp_path, pin=[pin]).keywords()


def test_the_options_of_fit_reach_the_fit(tmp_path, monkeypatch):
    seen = []
    fit_runs = table.fit_runs
    monkeypatch.setattr(table, "fit_runs", lambda *given, **how: seen.append(how) or fit_runs(*given, **how))
    demo_runs().to_csv(tmp_path / "runs.csv", index=False)
    shown = dlm("fit", str(tmp_path / "runs.csv"), "--law", "isoflop", "--curve", "cubic", "--bootstrap", "0", "--json")
    assert shown.exit_code == 0, shown.output
    assert seen[0]["curve"] == "cubic" and json.loads(shown.output)["curve"] == "cubic"


def frozen_file(path, **changes):
    """A small file of frozen predictions that fits its hash, then changed."""
    content = extended({"format": 2, "dlm": "9.9", "made": "2026"})
    path.write_text(json.dumps({**content, **changes}))
    return path


BAD_INPUT = {
    "an edited file": (["score", "edited.json", "runs.csv"], "edited.json has been changed since it was written"),
    "a newer format": (["score", "newer.json", "runs.csv"], "newer.json has format 3, and this dlm"),
    "two conventions": (["fit", "mixed.csv"], r"several conventions \(6n and full\)"),
    "no unique tokens": (["fit", "runs.csv", "--law", "data-constrained"], "add a column unique_tokens"),
    "no loss": (["fit", "lossless.csv"], "lossless.csv has no column 'loss'"),
    "all budgets differ": (
        ["fit", "single.csv", "--law", "isoflop"],
        "all 24 budgets differ.* raise --budget-tolerance",
    ),
    "a bad tolerance": (["fit", "runs.csv", "--budget-tolerance", "2"], "budget tolerance is 2.0: give a share"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_of_fits_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    runs = demo_runs().drop(columns="unique_tokens")
    tables = {"runs": runs, "lossless": runs.drop(columns="loss")}
    tables["mixed"] = runs.assign(convention=["6n", "full"] * (len(runs) // 2))
    tables["single"] = runs.assign(budget=[1e12 * 2.0**k for k in range(len(runs))])
    for stem, frame in tables.items():
        frame.to_csv(f"{stem}.csv", index=False)
    frozen_file(tmp_path / "edited.json", made="2025")
    frozen_file(tmp_path / "newer.json", format=3)
    words, said = BAD_INPUT[name]
    monkeypatch.setattr(sys, "argv", ["dlm", *words])
    with pytest.raises(SystemExit) as stop:
        verbs.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("dlm: ") and re.search(said, line), line


def test_a_tolerance_reaches_the_fit(tmp_path):
    assert FitOptions(runs=tmp_path).budget_tolerance == TOLERANCE
    runs = demo_runs()
    runs.assign(budget=runs["budget"] * ([1.0, 1.02] * (len(runs) // 2))).to_csv(tmp_path / "runs.csv", index=False)
    common = [str(tmp_path / "runs.csv"), "--bootstrap", "0", "--json"]
    for verb, more in (("fit", ["--law", "isoflop"]), ("predict", ["--at", "1e13"])):
        near, apart = (json.loads(dlm(verb, *common, *more, *tolerance).output)["notes"]
                       for tolerance in ([], ["--budget-tolerance", "0"]))  # fmt: skip
        assert any("6 values of budget count as 3 budgets" in note for note in near)
        assert not any("count as" in note for note in apart)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give a sweep, or --wandb ENTITY/PROJECT with --out DIR"),
        ({"target": "smoke", "mapping": "m.yaml"}, "--mapping is for the runs of a W&B project"),
        ({"target": "smoke", "filter": ["a=b"]}, "--filter is for the runs of a W&B project"),
        ({"wandb": "a/b", "out": "x", "mapping": "m.yaml", "verify": True}, "--verify is for runs that dlm launched"),
        ({"wandb": "a/b", "target": "smoke", "out": "x"}, "give a sweep, or --wandb"),
    ],
)
def test_options_of_collect_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        gather.collect(CollectOptions(**options))


@pytest.mark.parametrize(("error", "code"), [(UserError("a mistake"), 2), (TryAgainError("a server is away"), 75)])
def test_a_mistake_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(verbs.targets, "planned", fail)
    monkeypatch.setattr(sys, "argv", ["dlm", "plan", "smoke"])
    with pytest.raises(SystemExit) as stop:
        verbs.main()
    assert stop.value.code == code
    assert capsys.readouterr().err == f"dlm: {error}\n"


def test_prepare_runs_in_this_process_and_returns_its_exit_code(tmp_path):
    packed = dlm("prepare", "packed", str(tmp_path))
    assert packed.exit_code == 2
    assert dlm("prepare").exit_code == 0  # its help


def test_watching_stops_when_no_cell_runs_or_waits(workdir, stdlib_data):
    assert dlm("plan", "smoke").exit_code == 0
    shown = dlm("status", "smoke", "--watch")
    assert shown.exit_code == 0 and "10 planned" in shown.output


def test_watching_goes_on_less_and_less_often_while_a_job_looks_after_the_sweep(workdir, stdlib_data, monkeypatch):
    assert dlm("plan", "smoke").exit_code == 0
    waits, looks = [], iter([True] * 12 + [False])
    monkeypatch.setattr(verbs.time, "sleep", waits.append)
    monkeypatch.setattr(follower, "is_looked_after", lambda folder: next(looks))
    assert dlm("status", "smoke", "--watch").output.count("10 planned") == 13
    assert waits[0] == 5 and waits == sorted(waits) and waits[-1] == 30


def test_an_unknown_sweep_is_answered_with_the_users_own_sweeps(workdir):
    (workdir / "my_sweep").mkdir()
    (workdir / "my_sweep/plan.json").write_text("{}")
    (workdir / "adhoc/runs").mkdir(parents=True)
    for verb in ("status", "report", "plan"):
        with pytest.raises(UserError) as error:
            raise dlm(verb, "my_sweeep").exception
        assert "unknown sweep 'my_sweeep': did you mean my_sweep?" in str(error.value)
        assert "allowed: adhoc, my_sweep, " in str(error.value)


def test_the_log_of_a_job_commands_no_terminal(workdir):
    run = workdir / "s/runs/mdm-4k-1e9-00000000"
    run.mkdir(parents=True)
    (run / "log.txt").write_bytes(b"early\n1 %\r2 %\n\x1b[31mred\x1b[0m \x1b]0;title\x07 \xff\n")
    shown = dlm("logs", "mdm-4k", "--lines", "2")
    assert shown.exit_code == 0 and shown.output.endswith("\n2 %\nred \\x1b]0;title\\x07 \\xff\n")
    assert "log.txt" in shown.output and "early" not in shown.output


def test_the_exit_code_of_tail_is_kept_and_a_character_that_is_cut_off_is_shown(workdir, tmp_path, monkeypatch):
    """A process closes its output before it ends; here it takes its time in between."""
    run = workdir / "s/runs/mdm-4k-1e9-00000000"
    run.mkdir(parents=True)
    (run / "log.txt").write_text("a")
    (tmp_path / "tail").write_text("#!/bin/bash\nprintf 'a\\xe2\\x82'\nexec >&-\nsleep 0.3\nexit 3\n")
    (tmp_path / "tail").chmod(0o755)
    prepend_to_path(tmp_path, monkeypatch)
    shown = dlm("logs", "mdm-4k")
    assert (shown.exit_code, shown.output) == (3, "a\\xe2\\x82")
