"""The habits of real clusters: start-up files, banners, leaked variables, odd paths, slow exits, an absent disk."""

import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest
from support.slurm_sweep import LONG, SHORT, SMOKE, Sweep, curve, wait_for
from support.submissions import write_command

from dlm.core.files import read_json
from dlm.core.paths import PACKAGE
from dlm.record.run import read_result, read_status

pytestmark = pytest.mark.slurm

# The Python of these tests may lie in a folder of root's; that of the system can use the same packages.
PYTHONS = (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")

LEAKED = {  # as inside a job, or from the settings of a site
    "SLURM_MEM_PER_CPU": "500",
    "SLURM_CPU_BIND": "map_cpu:99",
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "7",
    "SRUN_CPUS_PER_TASK": "3",
    "SBATCH_PARTITION": "nopart",
    "SBATCH_MEM_PER_CPU": "77",
    "SBATCH_WAIT": "1",
    "SQUEUE_FORMAT": "%j",
}


def setup(*lines: str) -> list[str]:
    """Return the arguments of `dlm submit` that run shell lines before the cell."""
    listed = ",".join(f"'{line}'" for line in lines)
    return ["--override", f"hydra.launcher.setup=[{listed}]"]


def test_a_login_node_with_every_bad_habit(cluster, command, stdlib_data, tmp_path, monkeypatch):
    """A banner on sbatch, an enclosing job's variables, ~/.bashrc in the setup, a path with %, a umask for a group."""
    workdir = tmp_path / "50% of it"
    monkeypatch.setenv("DLM_WORKDIR", str(workdir))
    for name, value in LEAKED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SBATCH_COMMENT", "from the site")
    startup = tmp_path / "bashrc"
    startup.write_text('unset PS1\nPROMPT="$PS1 "\nexport FROM_STARTUP=yes\n')
    commands = tmp_path / "bin"
    commands.mkdir()
    real = shutil.which("sbatch")
    write_command(
        commands, "sbatch", f'echo "Welcome: 3 jobs of yours wait"; {real} "$@"; code=$?; echo Bye; exit $code'
    )
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    sweep = Sweep(cluster, command, workdir / "habits")
    before = os.umask(0o002)
    try:
        more = setup(f"source {startup}")
        ended = sweep.submit(SHORT, launcher="partition=low comment=ours", more=more)
    finally:
        os.umask(before)
    assert ended.code == 0, ended.err
    (job,) = sweep.job_ids()
    assert job.replace("_", "").isdigit()
    assert sweep.accounts() == [("COMPLETED", "0:0")], sweep.told()
    assert sweep.cell["state"] == "done" and "nats/token" in sweep.log
    assert (sweep.folder / "ledger" / f"{job}_0_log.out").is_file()
    files = (sweep.run_dir / "result.json", sweep.run_dir / "status.json", sweep.folder / "plan.json")
    assert {path.stat().st_mode & 0o777 for path in files} == {0o664}


def test_a_setup_that_fails_is_the_reason_of_the_failure(sweep):
    assert sweep.submit(SHORT, more=setup("echo module: cuda is unknown here", "exit 1")).code == 0
    assert sweep.accounts() == [("FAILED", "1:0")]
    assert sweep.cell["state"] == "failed" and "module: cuda is unknown here" in sweep.cell["reason"]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_that_leave_one_after_the_other_are_requeued(make_sweep, cluster, undisturbed, tmp_path, ranks):
    """One rank leaves at once and the others later than srun waits, so it kills them."""
    sweep, first = make_sweep(f"leaving-{ranks}"), random.randrange(ranks)
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, random, sys, time\n"
        "if 'dlm.launch' in sys.orig_argv:\n"
        f"    late = 0 if os.environ.get('SLURM_PROCID') == '{first}' else random.uniform(9, 12)\n"
        "    atexit.register(lambda: time.sleep(late))\n"
    )
    launcher = f"nodes=2 tasks_per_node={ranks // 2}"
    more = ["--override", "trainer.strategy=fsdp", *setup(f"export PYTHONPATH={tmp_path}:$PYTHONPATH")]
    assert sweep.submit(LONG, launcher=launcher, more=more).code == 0
    wait_for(sweep.trains)
    cluster("scancel", "--signal=USR1", sweep.job_ids()[0])
    wait_for(lambda: read_status(sweep.run_dir).attempts == 2 or not sweep.queued())
    assert sweep.accounts() == [("COMPLETED", "0:0")], sweep.told()
    status, result = read_status(sweep.run_dir), read_result(sweep.run_dir)
    assert (status.attempts, status.steps_redone, result.num_devices) == (2, 0, ranks), f"{first} first: {sweep.told()}"
    assert result.loss == pytest.approx(read_result(undisturbed).loss, abs=1e-4)


@pytest.mark.long
def test_a_disk_that_is_away_for_seconds_fails_no_cell(sweep, undisturbed):
    assert sweep.submit(LONG).code == 0
    wait_for(sweep.trains)
    away = sweep.folder.with_name("away")
    sweep.folder.rename(away)
    time.sleep(4)  # heartbeats, metrics and checkpoints fall due meanwhile
    assert not sweep.folder.exists(), list(sweep.folder.rglob("*"))
    away.rename(sweep.folder)
    assert sweep.accounts() == [("COMPLETED", "0:0")], sweep.told()
    assert sweep.cell["state"] == "done" and sweep.cell["attempts"] == 1
    assert curve(sweep.run_dir) == curve(undisturbed)


@pytest.fixture
def public():
    """A folder that everybody may write to; those of pytest are closed to all but root."""
    folder = Path(tempfile.mkdtemp(prefix="dlm-public-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_somebody_who_is_not_root_submits_and_their_cell_runs(cluster, public):
    nobody = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    packages = f"{PACKAGE.parent}:{sysconfig.get_path('purelib')}"
    python = next((path for path in PYTHONS if subprocess.run(["test", "-x", path], **nobody).returncode == 0), None)
    if python is None:
        pytest.skip(f"only root can run {' and '.join(PYTHONS)}")

    def dlm(*words: str, workdir: str) -> subprocess.CompletedProcess[str]:
        own = {
            "HOME": str(public),
            "DLM_WORKDIR": f"{public}/{workdir}",
            "DLM_DATA": f"{public}/data",
            "PYTHONPATH": packages,
        }
        return subprocess.run(
            [python, "-m", "dlm.cli", *words], cwd=PACKAGE.parent, **nobody, env={**os.environ, **own},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    (public / "closed").mkdir(mode=0o755)
    words = ("submit", str(SMOKE), "--launcher", "submitit_slurm", "--yes", "--allow-dirty",
             "--set", "models=[4k]", "--set", "tokens_per_param=[1,1e5]", "--set", SHORT,
             "--set", "name=theirs")  # fmt: skip
    closed = dlm(*words, workdir="closed")
    said = closed.stderr.strip().splitlines()
    assert closed.returncode == 2 and said[-1].startswith("dlm: cannot read or write"), closed.stderr
    assert "Traceback" not in closed.stderr
    follow = ("--then", "report", "--override", "hydra.launcher.follow_min=1")
    submitted = dlm(*words, *follow, workdir="swept")
    assert submitted.returncode == 0, submitted.stderr
    wait_for(lambda: not cluster("squeue", "-h", "--user=nobody").strip())
    ended = read_json(public / "swept/theirs/ledger/follower.json")["ended"]
    assert ended == f"report: {public}/swept/theirs/report/report.html"
    (run_dir,) = (public / "swept/theirs/runs").iterdir()
    assert read_result(run_dir) is not None, (run_dir / "log.txt").read_text()
    assert (run_dir / "result.json").owner() == "nobody"
    if PACKAGE.parent.joinpath(".git").exists() and PACKAGE.owner() != "nobody":
        assert "belongs to somebody else" in submitted.stderr  # the commit of these runs is not known, and dlm says so
