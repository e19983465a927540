"""Submitting to a real SLURM: what is asked for, what is refused, and that nothing can make it happen twice."""

import json
import os
import shutil
import signal
import stat

import pytest
from support.slurm_sweep import LONG, SHORT, wait_for

from dlm.core.files import read_jsonl
from dlm.record.run import read_result
from dlm.submit.job import Job, Resources, SlurmSettings
from dlm.submit.ledger import Ledger
from dlm.submit.slurm import Slurm
from dlm.submit.submission import submit_jobs, submitting

pytestmark = pytest.mark.slurm


def test_submit_returns_and_the_cells_are_done(sweep):
    ended = sweep.submit("budgets=[2e10,4e10]")
    assert ended.code == 0, ended.err
    assert {cell["state"] for cell in sweep.status()} <= {"submitted", "running"}
    assert sweep.accounts() == [("COMPLETED", "0:0")] * 2
    cells = sweep.status()
    assert [(cell["state"], cell["attempts"], cell["steps_redone"]) for cell in cells] == [("done", 1, 0)] * 2
    again = sweep.submit("budgets=[2e10,4e10]")
    assert again.code == 0 and "submitted 0 cells" in again.out and len(sweep.job_ids()) == 2
    logs = sweep.command("dlm.cli", "logs", cells[0]["cell_id"], "-n", "3")
    assert logs.code == 0 and "nats/token after" in logs.out and "log.txt" in logs.out
    attempt = json.loads((sweep.run_dirs[0] / "env.json").read_text())["attempts"][0]
    assert attempt["slurm"]["ARRAY_JOB_ID"] in sweep.job_ids()[0] and attempt["slurm"]["JOB_PARTITION"] == "low"
    modes = [path.stat().st_mode & 0o777 for path in (sweep.run_dirs[0] / "result.json", sweep.folder / "plan.json")]
    assert modes == [0o644, 0o644]  # a colleague can read them
    assert attempt["submission"] and (sweep.folder / "code" / attempt["code"] / "dlm" / "launch.py").is_file()
    assert len(attempt["git_sha"]) == 40 and attempt["packages"]["torch"]


def test_mixed_resource_classes_become_arrays_and_a_cell_spans_two_nodes_by_fsdp2(
    cluster, command, stdlib_data, workdir
):
    short = ("experiment=debug", "logger=none", f"paths.data_dir={stdlib_data}")
    on_two = ("trainer=fsdp2", "trainer.accelerator=cpu", "trainer.threads=1", "trainer.compile=false")
    jobs = [
        Job(
            name=name,
            overrides=(*short, f"paths.run_dir={workdir}/mixed/runs/{name}", *words),
            run_dir=workdir / "mixed/runs" / name,
            resources=resources,
        )
        for name, resources, words in [
            ("alone", Resources(), ()),
            ("fsdp2", Resources(nodes=2), (*on_two, "trainer.devices=1", "trainer.num_nodes=2")),
            ("beside", Resources(tasks_per_node=2), ("trainer.devices=2", "trainer.strategy=ddp")),
        ]
    ]
    slurm = Slurm(SlurmSettings(allow_dirty=True))
    with submitting(slurm, workdir / "mixed"):
        done = submit_jobs(jobs, cluster=slurm, sweep_dir=workdir / "mixed")
    assert len({job_id.split("_")[0] for job_id in done.job_ids.values()}) == 3
    arrays = ",".join(job_id.split("_")[0] for job_id in done.job_ids.values())
    wait_for(lambda: not cluster("squeue", "-h", f"--jobs={arrays}").strip())
    results = [read_result(job.run_dir) for job in jobs]
    said = "\n".join((job.run_dir / "log.txt").read_text() for job in jobs)
    assert all(results), said
    assert [result.num_devices for result in results] == [1, 2, 2]
    assert [result.loss for result in results[1:]] == pytest.approx([results[0].loss] * 2, abs=1e-5)
    (attempt,) = json.loads((jobs[1].run_dir / "env.json").read_text())["attempts"]
    assert attempt["slurm"]["JOB_NODELIST"].count("[1-2]") == 1 or "," in attempt["slurm"]["JOB_NODELIST"]


def test_multirun_through_the_launcher_waits_or_does_not(cluster, command, stdlib_data, workdir):
    words = ("-m", "experiment=debug", "logger=none", "hydra/launcher=submitit_slurm", "hydra.launcher.poll_sec=1",
             "hydra.launcher.allow_dirty=true", "training.steps=40")  # fmt: skip
    waited = command("dlm.launch", *words, "optimizer.lr=1e-3,2e-3")
    assert waited.code == 0 and "submitted 2 jobs" in waited.err, waited.err
    assert [read_result(run).step for run in (workdir / "adhoc/runs").glob("mdm-*")] == [40, 40]
    wrong = command("dlm.launch", *words, "trainer.attention=cudnn")  # which only a GPU has
    assert wrong.code == 2 and "failed with exit code 2" in wrong.err
    at_once = command("dlm.launch", *words, "optimizer.lr=3e-3", "hydra.launcher.wait=false")
    assert (
        at_once.code == 0 and len(list((workdir / "adhoc/runs").glob("mdm-*"))) == 3
    )  # 3e-3 is the default, that was wrong
    cells = json.loads(command("dlm.cli", "status", "adhoc", "--json").out)  # no definition planned these runs
    assert sorted(cell["state"] for cell in cells)[:2] == ["done", "done"] and len(cells) == 3
    assert {cell["steps"] for cell in cells if cell["state"] == "done"} == {40} and all(cell["job"] for cell in cells)
    cancelled = command("dlm.cli", "cancel", "adhoc", "--yes")
    assert cancelled.code == 0 and "cancelled job" in cancelled.out, cancelled.out
    wait_for(lambda: "1 cancelled" in (said := command("dlm.cli", "status", "adhoc").out) and "2 done" in said)
    reported = command("dlm.cli", "report", "adhoc")
    assert reported.out.count("did not learn") == 2 and "no run of" in reported.complaint  # in 40 steps


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ("partition=nopart", ["invalid partition specified: nopart", "hydra.launcher.partition"]),
        ("gpus_per_node=4 mem_gb=4", ["Requested node configuration is not available", "hydra.launcher.gpus_per_node"]),
        ("constraint=h100", ["Invalid feature specification", "hydra.launcher.constraint"]),
        ("mem_gb=999", ["Memory specification can not be satisfied", "hydra.launcher.mem_gb"]),
        ("partition=short timeout_min=600", ["timeout_min is 600, the partition short allows 2 minutes"]),
        ("nodes=2.5", ["hydra.launcher.nodes"]),
        ("parttition=low", ["did you mean partition"]),
    ],
)
def test_a_refusal_is_one_line_in_slurms_words_with_the_key_behind_it(sweep, launcher, said):
    more = ["--override", "trainer=cpu"] if "gpus" in launcher else []
    line = sweep.submit(SHORT, launcher=launcher, more=more).complaint
    assert all(words in line for words in said), line
    assert sweep.job_ids() == []
    assert not sweep.folder.is_dir() or sweep.cell["state"] == "planned"  # a wrong key is refused before planning ends


def test_the_same_sweep_submitted_twice_at_once_is_submitted_once(sweep):
    both = [sweep.start(SHORT) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("submitted 1 cell" in text for text in said) == [False, True], said
    assert len(sweep.job_ids()) == 1 and sweep.accounts() == [("COMPLETED", "0:0")]


# What kills the submitting process stands in for a command that it calls.
KILLERS = {
    "before its intent": ("scontrol", "kill -9 $PPID"),
    "before sbatch": ("sbatch", "kill -9 $PPID"),
    "after sbatch": ("sbatch", '{real} "$@"; kill -9 $PPID'),
}


def test_a_submitter_killed_at_any_step_is_repaired_and_nothing_runs_twice(make_sweep, cluster, tmp_path):
    cluster("scontrol", "update", "partition=low", "state=DOWN")  # no cell is done before its submission is repaired
    sweeps = {moment: make_sweep(moment.replace(" ", "-")) for moment in (*KILLERS, "halfway")}
    for moment, (name, body) in KILLERS.items():
        script = tmp_path / moment / name
        script.parent.mkdir()
        script.write_text("#!/bin/bash\n" + body.format(real=shutil.which(name)) + "\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        sweep = sweeps[moment]
        killed = sweep.start(SHORT, env={"PATH": f"{script.parent}:{os.environ['PATH']}"})
        killed.communicate(timeout=60)
        assert killed.returncode == -signal.SIGKILL and sweep.job_ids() == [], moment
        assert (sweep.cell["state"] == "planned") is (moment != "after sbatch")
    halfway = sweeps["halfway"]  # killed while it wrote the ids to the ledger
    assert halfway.submit(SHORT).code == 0
    path = Ledger(halfway.folder).path
    path.write_bytes(path.read_bytes()[:-20])
    assert halfway.cell["state"] in ("submitted", "running") and halfway.job_ids() == []
    for moment, sweep in sweeps.items():
        assert sweep.submit(SHORT).code == 0 and len(sweep.job_ids()) == 1, moment
    assert [line["event"] for line in read_jsonl(path)] == ["intent", "submitted"]
    cluster("scontrol", "update", "partition=low", "state=UP")
    for moment, sweep in sweeps.items():
        assert sweep.accounts() == [("COMPLETED", "0:0")] and sweep.cell["state"] == "done", moment
        assert len(sweep.job_ids()) == 1 and sweep.cell["attempts"] == 1, moment


def test_a_sweep_that_has_spent_its_gpu_hours_starts_no_more(sweep):
    priced = ("budgets=[2e10,4e10,8e10]", "hardware={device: H100, gpus_per_node: 1}", "max_gpu_hours=1")
    cpu = ["--override", "trainer=cpu"]
    refused = sweep.submit(*priced, more=[*cpu, "--max-gpu-hours", "1e-12"])
    assert "are more than --max-gpu-hours 1e-12" in refused.complaint
    started = sweep.submit(*priced, launcher="array_parallelism=1", more=[*cpu, "--max-gpu-hours", "1e-4"])
    assert started.code == 0, started.err
    assert sweep.accounts() == [("COMPLETED", "0:0")] * 3
    cells = sweep.status()
    assert [cell["state"] for cell in cells] == ["done", "cancelled", "cancelled"]
    assert cells[0]["gpu_hours"] > 1e-4 and "of its 0.0001 GPU-hours" in cells[1]["reason"]
    table = sweep.command("dlm.cli", "status", sweep.folder).out
    assert "GPU-hours: " in table and " used of " in table


@pytest.mark.long  # tests/train/test_topology.py resumes with other numbers of processes
def test_a_resume_with_another_world_size_gives_the_same_losses(sweep, undisturbed):
    assert sweep.submit(LONG).code == 0
    wait_for(sweep.trains)
    assert sweep.command("dlm.cli", "cancel", sweep.folder, "--state", "running", "--yes").code == 0
    sweep.accounts()
    assert sweep.cell["state"] == "cancelled"
    ddp = ["--override", "trainer.strategy=ddp"]
    assert sweep.submit(LONG, launcher="tasks_per_node=2", more=ddp).code == 0, sweep.log
    sweep.accounts()
    alone, moved = read_result(undisturbed), read_result(sweep.run_dir)
    assert moved is not None, sweep.log
    assert (alone.num_devices, moved.num_devices) == (1, 2) and sweep.cell["attempts"] == 2
    assert moved.loss == pytest.approx(alone.loss, abs=1e-4)  # rounding, over 1,900 steps
