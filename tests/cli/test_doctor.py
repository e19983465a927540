"""`dlm doctor` with commands that stand in for SLURM's: what each failure makes it say."""

import pytest
from support import slurm_stand_in
from support.submissions import prepend_to_path, write_command
from typer.testing import CliRunner

from dlm.cli import compute_node, doctor, login_node, screen
from dlm.cli.check import FAILED, OK, WARNING
from dlm.cli.compute_node import node_checks
from dlm.cli.verbs import app
from dlm.core.errors import UserError
from dlm.core.git import Origin
from dlm.submit import check_job
from dlm.submit.check_job import num_gpus, with_gpus
from dlm.submit.job import SlurmSettings
from dlm.submit.partitions import partitions

SINFO = """
    case "$*" in
        *%G*) printf '%s\\n' "cpu*|up|infinite|4|(null)" "gpu|up|1-00:00:00|2|gpu:a100:8(S:0-1),nvme:1" \\
                             "gpu|up|1-00:00:00|1|gpu:2" "old|down|30:00|1|gpu:1";;
        *) echo "gpu|1-00:00:00";;
    esac
"""
SCONTROL = (
    'case "$1" in ping) echo "Slurmctld(primary) at here is UP";; *) echo "MaxArraySize            = 1001";; esac'
)
# A job that runs at once, on this machine.
SBATCH = """
    [ "$1" = --version ] && {{ echo "slurm 23.11.4"; exit; }}
    [ -f {db}/refuse ] && {{ echo "sbatch: error: invalid account or partition" >&2; exit 1; }}
    cp "$2" {db}/7.script; echo 7
    [ -f {db}/wait ] && {{ echo PENDING > {db}/7.live; echo Resources > {db}/7.why; exit; }}
    log=$(grep -oP '#SBATCH --output=\\K.*' "$2")
    bash "$2" > "$log" 2>&1; code=$?
    [ $code = 0 ] && echo "COMPLETED|0:0" > {db}/7.ended || echo "FAILED|$code:0" > {db}/7.ended
"""
SRUN = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
FOUND = {
    "host": "n1", "token": "t", "clock_ahead_sec": 0.1, "num_cpus": 4, "omp_threads": "4", "sbatch": "/usr/bin/sbatch",
    "setup_trouble": "", "python": "3.12",
    "modules": {name: {"found": "2.0"} for name in ("torch", "lightning", "wandb")},
    "cuda": {"found": {"built_for": "12.8", "gpus": [{"name": "H100", "memory_gib": 79.6}], "bf16": True}},
}  # fmt: skip


@pytest.fixture
def slurm(tmp_path, workdir, monkeypatch):
    """The state of a cluster whose jobs run at once; returns the folder of its state."""
    db = tmp_path / "db"
    prepend_to_path(tmp_path / "bin", monkeypatch)
    slurm_stand_in.install(tmp_path / "bin", db)
    more = {"sinfo": SINFO, "scontrol": SCONTROL, "sbatch": SBATCH.format(db=db), "srun": SRUN}
    more["sacctmgr"] = 'echo "lab||normal,long|10|20"'
    for name, body in more.items():
        write_command(tmp_path / "bin", name, body)
    monkeypatch.setattr(login_node, "code_origin", lambda **_: Origin(sha="0123456789"))
    monkeypatch.setattr(login_node, "LITTLE_GIB", 0.0)
    monkeypatch.setattr(check_job, "POLL_SEC", 0.05)
    monkeypatch.setattr(doctor, "LATE_SEC", 0.0)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    return db


def run(*words: str):
    """Run the command; return (its exit code, its output with each space only once, what it raised)."""
    ended = CliRunner().invoke(app, ["doctor", *words])
    return ended.exit_code, " ".join(ended.output.split()), ended.exception


@pytest.mark.slow
def test_a_job_finds_what_is_on_its_node(slurm, workdir):
    code, said, _ = run("--gpus", "0", "--override", "hydra.launcher.cpus_per_task=1")
    assert code == 0, said
    assert "ok SLURM the controller answers; slurm 23.11.4" in said
    assert "ok node workdir the node reads and writes it" in said and "ok node torch torch 2" in said
    assert "ok account lab: QOS normal, long, MaxJobs 10, MaxSubmitJobs 20" in said
    assert "ok code commit 01234567" in said and "an API key is in WANDB_API_KEY" in said
    script = (slurm / "7.script").read_text()
    assert "#SBATCH --mem=2GB" in script and "--gpus-per-node" not in script and "OMP_NUM_THREADS=1" in script


def test_without_slurm_it_is_one_line(monkeypatch, workdir):
    monkeypatch.setattr("dlm.submit.slurm.shutil.which", lambda name: None)
    code, said, error = run()
    assert code and said == "" and isinstance(error, UserError) and "sbatch is not on PATH" in str(error)


def test_a_controller_that_does_not_answer(slurm, tmp_path):
    write_command(tmp_path / "bin", "scontrol", "exit 1")
    code, said, _ = run()
    assert code == 2 and "FAILED SLURM sbatch exists, but no controller answers to do: run `scontrol ping`" in said
    assert "no job was submitted" in said and "ok workdir" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--launcher", "submitit_slrm"], "unknown launcher 'submitit_slrm': did you mean submitit_slurm"),
        (["--launcher", "submitit_local"], "runs cells on this machine"),
        (["--override", "hydra.launcher.partitio=x"], "unknown key of hydra.launcher 'partitio'"),
        (["--override", "optimizer.lr=1"], "takes hydra.launcher.KEY=VALUE only"),
        (["--gpus", "2", "--override", "hydra.launcher.gres='gpu:a100:8'"], "hydra.launcher.gres is gpu:a100:8"),
    ],
)
def test_a_mistake_is_one_line(slurm, words, line):
    code, said, error = run(*words)
    assert code and said == "" and isinstance(error, UserError) and line in str(error)


@pytest.mark.parametrize(
    ("command", "body", "line"),
    [
        ("sacctmgr", "echo no accounting >&2; exit 1", "warning account sacctmgr failed: no accounting"),
        ("sacctmgr", "true", "warning account sacctmgr knows no account of"),
        ("sacct", "echo disabled >&2; exit 1", "warning sacct sacct failed: disabled to do: dlm goes on with squeue"),
        ("sinfo", "echo down >&2; exit 1", "warning partitions sinfo failed: down"),
    ],
)
def test_a_command_that_fails_is_a_warning(slurm, tmp_path, command, body, line):
    write_command(tmp_path / "bin", command, body)
    code, said, _ = run("--no-job", "--override", "hydra.launcher.partition=gpu")
    assert code == 0 and line in said, said


@pytest.mark.parametrize(
    ("keys", "code", "line"),
    [
        (["partition=gpus"], 2, "there is no partition gpus to do: set hydra.launcher.partition; did you mean gpu"),
        (["partition=old"], 2, "FAILED partition old takes no jobs now"),
        (["partition=gpu", "timeout_min=3000"], 2, "timeout_min is 3000, and the partition allows 1440 minutes"),
        (["account=lib"], 0, "warning account lab: QOS normal, long, MaxJobs 10, MaxSubmitJobs 20 "
                             "to do: hydra.launcher.account is lib: did you mean lab"),
        (["qos=lang"], 0, "hydra.launcher.qos is lang: did you mean long"),
    ],
)  # fmt: skip
def test_a_key_that_does_not_fit_the_cluster(slurm, keys, code, line):
    ended, said, _ = run("--no-job", *(word for key in keys for word in ("--override", f"hydra.launcher.{key}")))
    assert ended == code and line in said, said


def test_a_work_directory_that_cannot_be_written(slurm, workdir, monkeypatch):
    (workdir / "doctor").write_text("a file")
    code, said, _ = run("--no-job")
    assert code == 2 and "FAILED workdir" in said and "DLM_WORKDIR" in said


def test_code_that_is_not_committed_and_little_space(slurm, monkeypatch):
    monkeypatch.setattr(login_node, "code_origin", lambda **_: Origin(sha="0", changed=("a", "b", "c", "d")))
    monkeypatch.setattr(login_node, "LITTLE_GIB", 1e9)
    code, said, _ = run("--no-job")
    assert code == 0 and "warning code not committed: a, b, c and 1 more to do: commit before `dlm submit`" in said
    assert "warning workdir" in said and "make room" in said
    _, said, _ = run("--no-job", "--override", "hydra.launcher.allow_dirty=true")
    assert "ok code commit 0, with changes" in said


def test_where_a_key_of_wandb_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert login_node.wandb_check().state == WARNING  # offline: `dlm sync` needs a key later
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    found = login_node.wandb_check()
    assert found.state == OK and str(tmp_path / "netrc") in found.found and "secret" not in found.found
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.lab.org")
    assert login_node.wandb_check().state == WARNING
    monkeypatch.setattr(login_node, "load_choice", lambda *_: {"_target_": "x", "offline": False})
    assert login_node.wandb_check().state == FAILED


def test_sbatch_refuses(slurm):
    (slurm / "refuse").touch()
    code, said, _ = run("--gpus", "0")
    assert code == 2 and "FAILED job sbatch refused" in said and "hydra.launcher.account" in said


def test_a_job_that_waits_too_long_is_cancelled(slurm):
    (slurm / "wait").touch()
    code, said, _ = run("--gpus", "0", "--timeout", "0.05")
    assert code == 2 and "job 7: SLURM says PENDING (Resources)" in said
    assert "not done after 3 s: SLURM says PENDING (Resources); job 7 is cancelled" in said
    assert (slurm / "7.ended").read_text().startswith("CANCELLED")


@pytest.mark.parametrize(
    ("setup", "line"),
    [
        ("echo bad; exit 7", "FAILED job SLURM says FAILED 7:0; its last line: bad to do: mend hydra.launcher.setup"),
        ('rm "$DLM_WORKDIR"/doctor/*.token', "FAILED node workdir the node does not see"),
        ("python=gone", ""),
    ],
)
def test_a_job_that_finds_nothing_says_why(slurm, monkeypatch, setup, line):
    if setup == "python=gone":
        monkeypatch.setattr(check_job.sys, "executable", "/gone/python")
        setup, line = "true", "does not see /gone/python to do: install dlm in a folder that all nodes share"
    code, said, _ = run("--gpus", "0", "--override", f"hydra.launcher.setup=['{setup}']")
    assert code == 2 and line in said, said


def test_a_job_that_could_not_write_its_log(slurm, tmp_path):
    write_command(tmp_path / "bin", "srun", "true")
    write_command(tmp_path / "bin", "sacct", 'case "$*" in *JobID,State*) echo "7|FAILED|0:53|None|x";; esac')
    code, said, _ = run("--gpus", "0")
    assert code == 2 and "FAILED node workdir the node does not see" in said and "DLM_WORKDIR" in said


@pytest.mark.parametrize(
    ("changes", "name", "state", "line"),
    [
        ({"token": "other"}, "node workdir", FAILED, "another folder of the same name"),
        ({"clock_ahead_sec": -60.0}, "node clock", WARNING, "60.0 s behind the clock"),
        ({"omp_threads": "8"}, "node", WARNING, "OMP_NUM_THREADS=8"),
        ({"setup_trouble": "module load x (exit code 1)"}, "node setup", WARNING, "module load x (exit code 1)"),
        ({"sbatch": None}, "node sbatch", WARNING, "not on PATH in jobs"),
        ({"modules": {"wandb": {"error": "ImportError: x"}}}, "node wandb", FAILED, "ImportError: x"),
        ({"cuda": {"error": "RuntimeError: no kernel image"}}, "node GPU", FAILED, "no kernel image"),
        ({"cuda": {"found": {"built_for": None, "gpus": [], "bf16": False}}}, "node GPU", FAILED, "without CUDA"),
        ({"cuda": {"found": {"built_for": "12.8", "gpus": [{"name": "V100", "memory_gib": 32.0}], "bf16": False}}},
         "node GPU", WARNING, "1 x V100, 32 GiB; torch is built for CUDA 12.8; no bf16"),
    ],
)  # fmt: skip
def test_what_a_job_has_found(changes, name, state, line):
    healthy = node_checks(FOUND, token="t", gpus=1)
    assert {check.state for check in healthy} == {OK} and not any(check.advice for check in healthy)
    (found,) = [check for check in node_checks({**FOUND, **changes}, token="t", gpus=1) if check.state != OK]
    assert (found.name, found.state) == (name, state) and line in found.found and found.advice


def test_partitions_with_several_kinds_of_nodes(slurm):
    cpu, gpu, old = partitions()
    assert (gpu.num_nodes, gpu.num_gpus) == (3, 18) and str(gpu) == "gpu: 3 nodes, 18 GPUs, at most 24 h"
    assert cpu.is_default and str(cpu) == "cpu (default): 4 nodes, no GPU, no time limit" and not old.is_up


def test_the_gpus_of_the_job():
    plain, fixed = SlurmSettings(), SlurmSettings(gres="gpu:a100:8", mem_per_gpu="80G")
    assert [num_gpus(plain, None, has_gpus=has) for has in (False, True)] == [0, 1]
    assert num_gpus(SlurmSettings(gpus_per_node=8), None, has_gpus=True) == 1
    assert num_gpus(SlurmSettings(gpus_per_node=0), None, has_gpus=True) == 0
    assert num_gpus(plain, 4, has_gpus=False) == 4 and num_gpus(fixed, None, has_gpus=False) == 1
    without = with_gpus(fixed, 0)
    assert without.gres is None and without.mem_per_gpu is None


def test_a_line_fits_80_columns(monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setattr(screen, "console", lambda: Console(width=80, highlight=False))
    long = "/a/very/long/path" * 9
    screen.show_check(compute_node.failed("node lightning", f"[bold] {long}", "word " * 40))
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines()) and "[bold]" in shown
    assert "".join(shown.split()).count("/a/very/long/path") == 9
