"""Folders that cannot be written, and full disks: one line, exit code 2, before long work, and nothing half-written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.settled_sweep import settled_sweep

from dlm.cli import gather
from dlm.cli.entry import main
from dlm.core.errors import UserError
from dlm.core.paths import PACKAGE
from dlm.data.prepare import command

# Rights do not bind root: take away the capabilities that make the difference.
AS_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"] if os.geteuid() == 0 else []
needs_setpriv = pytest.mark.skipif(bool(AS_USER) and not shutil.which("setpriv"), reason="root, without setpriv")
MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]
needs_mounts = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*MOUNTS, "true"], check=False, capture_output=True).returncode,
    reason="this machine allows no mounts without root",
)
RUN = ("model=4k", "data=stdlib", "trainer=cpu", "logger=none", "training.steps=5", "training.budget=null")
FEW = ("proof=null", "models=[4k,8k]", "budgets=[1e10]")  # no law, so the report is quick
VERBS = (
    ("dlm.cli", "plan", "smoke"),
    ("dlm.cli", "sweep", "smoke", "--launcher", "submitit_local", "--yes"),
    ("dlm.launch", *RUN),
    ("dlm.cli", "prepare", "stdlib"),
)


def run(*words: str | Path, prefix: list[str] | None = None, **environ: str | Path) -> str:
    """Run `python -m ...`, assert that it ends with exit code 2 and one line on stderr, and return the line."""
    done = subprocess.run(
        [*(prefix or []), sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=False,
        cwd=PACKAGE.parent, env={**os.environ, **{name: str(value) for name, value in environ.items()}},
    )  # fmt: skip
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("dlm: "), done
    assert "measuring" not in done.stdout
    return lines[0]


def on_disk(folder: Path, options: str, command: str = ":") -> list[str]:
    """Return the prefix of a command that finds a small file system in `folder`, after `command` was run there."""
    return [*MOUNTS, "sh", "-c", f'mount -t tmpfs -o {options} none "$0" && {{ {command}; }} && exec "$@"', str(folder)]


@needs_setpriv
@pytest.mark.parametrize("words", VERBS, ids=lambda words: words[1].partition("=")[0])
def test_a_folder_of_somebody_else_is_refused_at_once(words, tmp_path, stdlib_data):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o555)
    where = {"DLM_DATA": folder} if "prepare" in words else {"DLM_WORKDIR": folder}
    assert f"{folder}" in (said := run(*words, prefix=AS_USER, **where)) and "permission denied" in said
    assert not list(folder.iterdir())


def test_data_that_cannot_be_written_are_refused_before_the_sources_are_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    source, out = str(tmp_path / "no_such_text"), str(tmp_path / "file" / "data")
    monkeypatch.setattr(command, "stdlib_documents", lambda _: pytest.fail("the sources were read"))
    text = ["text", source, "--tokenizer", source, "--out", out]
    for words in (text, ["packed", source, "--out", out], ["stdlib", out]):
        assert command.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"dlm: {tmp_path / 'file'} is no folder") and len(said.splitlines()) == 1


@pytest.mark.parametrize("variable", ["DLM_WORKDIR", "DLM_DATA"])
@pytest.mark.parametrize("words", [("dlm", "plan", "smoke"), ("dlm", "submit", "smoke"), ("dlm", "sync", "smoke")])
def test_a_file_in_place_of_a_folder_is_named_with_its_variable(words, variable, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path / "w"))
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    if (variable, words[1]) != ("DLM_DATA", "sync"):  # it reads no data
        assert said.startswith(f"dlm: {tmp_path / 'file'} is no folder: set {variable} to the folder of all")
    assert len(said.splitlines()) == 1 and not (tmp_path / "w").exists()


@needs_mounts
@pytest.mark.parametrize("words", [VERBS[1], VERBS[2]], ids=["sweep", "launch"])
def test_a_full_disk_is_refused_at_once_and_keeps_nothing(words, workdir, stdlib_data):
    full = on_disk(workdir, "size=16k", f"head -c 16k /dev/zero > {workdir}/fill; true")
    assert "no space left on device: make room" in run(*words, prefix=full)


@needs_mounts
def test_a_disk_that_fills_up_keeps_no_part_of_a_plan_or_of_data(tmp_path, workdir, stdlib_data):
    listed = tmp_path / "listed"
    for folder, words in ((workdir, ("plan", "smoke")), (tmp_path, ("prepare", "stdlib", tmp_path / "d" / "s"))):
        (tmp_path / "d").mkdir(exist_ok=True)
        place = folder if folder == workdir else tmp_path / "d"
        then = f'"$@"; code=$?; find "$0" -type f > {listed}; exit $code'
        mounted = [*MOUNTS, "sh", "-c", f'mount -t tmpfs -o size=20k none "$0" && {then}', str(place)]
        assert "no space left on device: make room" in run("dlm.cli", *words, prefix=mounted)
        left = [Path(line).name for line in listed.read_text().splitlines()]
        assert "plan.json" not in left and not any(name.startswith(".") or name.endswith(".bin") for name in left), left


def test_a_report_is_refused_before_the_fits_and_can_go_elsewhere(workdir, stdlib_data, tmp_path, monkeypatch, capsys):
    sweep = settled_sweep(*FEW)
    before = sorted(sweep.folder.rglob("*"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="--out FOLDER` writes the report elsewhere"):
        patch.setattr(gather, "_fit_and_write", lambda *_: pytest.fail("it was fitted"))
        (sweep.folder / "report").touch()  # a file where the folder belongs
        gather.report(sweep)
    (sweep.folder / "report").unlink()
    out = tmp_path / "mine"
    gather.report(sweep, out=out)
    assert f"report: {out / 'report' / 'report.html'}" in capsys.readouterr().out
    here = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {
        "runs.csv",
        "excluded.csv",
        "history.parquet",
        "fits.json",
        "report/report.html",
        "report/source.json",
    } <= here
    assert [path for path in sorted(sweep.folder.rglob("*")) if path not in before] == []
    with pytest.raises(UserError, match="folder of another sweep"):
        gather.report(sweep, out=settled_sweep(*FEW, "name=other").folder)
