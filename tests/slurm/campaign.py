"""campaign: a sweep on a real SLURM under a hundred random faults, compared bit for bit with an undisturbed one.

    python tests/slurm/campaign.py [--faults 112] [--seed 0] [--out FILE.json]

Twelve cells, three at a time. Each fault hits a cell that is RUNNING, or the cluster while one is. Beside them
somebody types `dlm submit --then report` three times a minute, as a researcher (or cron) may, so that a follower looks
after the sweep too. Exit code 1 when a cell is not done,
was done twice, has a number in its loss curve that differs by a bit (in a row of a lost attempt too), or more than one
W&B run. As root, on Debian.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO

from sandbox import Sandbox, install, sandbox

from dlm.core.files import read_jsonl
from dlm.core.lease import live_holder
from dlm.core.paths import PACKAGE
from dlm.record.run import read_result, read_status
from dlm.submit.follower import read_following

SMOKE = PACKAGE.parent / "sweeps" / "smoke.yaml"
CELLS = ("name=campaign", "models=[4k,8k]", "seeds=[0,1,2,3,4,5]", "budgets=[5e11]", "tokens_per_param=[1,1e5]")
CURVE = ("train/loss", "val/loss", "val/loss_se", "grad_norm", "weight_norm", "lr")
SUBMIT_EVERY_SEC = 20
HAND_LOG = "by_hand.txt"
BANNER = "#!/bin/bash\necho 'Welcome, 12 jobs wait'\n{sbatch} \"$@\"; code=$?\necho 'Bye'; exit $code\n"
# What the environment of a job or a notebook on a cluster holds.
LEAKED = {"SLURM_MEM_PER_CPU": "500", "SLURM_CPU_BIND": "quiet", "SLURM_NTASKS": "7", "SRUN_DEBUG": "3",
          "SBATCH_PARTITION": "short", "SQUEUE_FORMAT": "%i"}  # fmt: skip
A_NODE_EACH = "hydra.launcher.cpus_per_task=4"


def submit_to(launcher: str, *arguments: str) -> list[str]:
    """The command line, as a person types it."""
    settings = [word for setting in CELLS for word in ("--set", setting)]
    return [sys.executable, "-m", "dlm.cli", "submit", str(SMOKE), *settings, "--launcher", launcher, "--yes",
            *arguments]  # fmt: skip


def rows(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, the numbers of the loss curve) of every row that was ever written, by attempts that were lost too."""
    return [(row["step"], {name: row[name] for name in CURVE if name in row})
            for row in read_jsonl(run_dir / "metrics.jsonl")]  # fmt: skip


def differing(run_dir: Path, undisturbed: Path) -> str | None:
    """The first number that is not what it is without faults, or a step that is missing; None when there is none."""
    truth: dict[int, dict[str, float]] = {}
    for step, numbers in rows(undisturbed):
        truth.setdefault(step, {}).update(numbers)
    for step, numbers in rows(run_dir):
        for name, number in numbers.items():
            if truth.get(step, {}).get(name) != number:
                return f"{name} at step {step} is {number!r}, not {truth.get(step, {}).get(name)!r}"
    missing = truth.keys() - {step for step, _ in rows(run_dir)}
    return f"steps {sorted(missing)[:3]} are missing" if missing else None


class Campaign:
    """The sweep, the cluster, and what is done to them."""

    def __init__(self, cluster: Sandbox, workdir: Path, dice: random.Random) -> None:
        self.cluster, self.dice = cluster, dice
        self.folder = workdir / "campaign"
        self.env = {**cluster.env, "DLM_WORKDIR": str(workdir)}
        self.beside: list[subprocess.Popen[bytes]] = []
        self.given_up = 0

    def submit_command(self) -> list[str]:
        partition = f"hydra.launcher.partition={self.dice.choice(['low', 'grace'])}"
        return submit_to("submitit_slurm", "--allow-dirty", "--override", A_NODE_EACH, "--override", partition,
                         "--then", "report", "--override", "hydra.launcher.follow_min=1")  # fmt: skip

    def submit_in(self, **environment: str) -> None:
        """Submit with other environment variables, to its end."""
        done = subprocess.run(self.submit_command(), env={**self.env, **environment}, cwd=PACKAGE.parent,
                              capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            print("submit:", done.stderr.strip(), flush=True)

    def submit(self) -> None:
        """To its end. Cells that failed three times without getting further are tried again, and counted."""
        done = subprocess.run(self.submit_command(), env=self.env, cwd=PACKAGE.parent, capture_output=True, text=True)
        if done.returncode:
            print("submit:", done.stderr.strip(), flush=True)
        if "failed 3 times" in done.stdout:
            self.given_up += 1
            subprocess.run([*self.submit_command(), "--retry-failed"], env=self.env, cwd=PACKAGE.parent)

    def start(self, command: list[str], log: IO[bytes] | int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, env=self.env, cwd=PACKAGE.parent,
                                   stdout=log, stderr=log)  # fmt: skip
        self.beside.append(process)
        return process

    def running(self) -> list[tuple[str, str, Path, int]]:
        """(job id, node, run directory, pid) of cells that SLURM calls RUNNING and whose process trains."""
        rows = self.cluster("squeue", "-h", "--array", "-t", "RUNNING", "-O", "JobArrayID:|,NodeList:|",
                            check=False).splitlines()  # fmt: skip
        tasks = {row.split("|")[0].strip(): row.split("|")[1] for row in rows}
        lines = read_jsonl(self.folder / "ledger" / "ledger.jsonl")
        owner = {task: cell for line in lines if line["event"] == "submitted" for cell, task in line["ids"].items()}
        found = []
        for task, node in tasks.items():
            run_dir = self.folder / "runs" / owner.get(task, "none")
            holder, status = live_holder(run_dir), read_status(run_dir)
            if holder is not None and status is not None and status.exit_code is None and status.step > 0:
                found.append((task, node.strip(), run_dir, int(holder["pid"])))
        return found

    # --- the faults: each gets a cell that runs ---

    def kill_process(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def kill_in_a_checkpoint(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """As soon as one is being written, or after a second."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and not list((run_dir / "checkpoints").glob(".step_*")):
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)

    def kill_and_tear_a_checkpoint(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        newest = max((run_dir / "checkpoints").glob("step_*/state.ckpt"), default=None)
        if newest is not None and len(list((run_dir / "checkpoints").glob("step_*"))) > 1:
            os.truncate(newest, newest.stat().st_size // 2)

    def terminate_process(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)

    def user_signal(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """What comes before a time limit."""
        self.start(["scancel", "--signal=USR1", task])  # which tries for a minute where a job is about to end

    def preempt(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """In partition low at once, in grace with 20 s of warning."""
        self.cluster("sbatch", "-p", "high", "-w", node, "--exclusive", "-J", "rival", "-o", "/dev/null",
                     "--wrap", "sleep 1")  # fmt: skip

    def requeue(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        self.cluster("scontrol", "requeue", task, check=False)

    def scancel(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        self.cluster("scancel", task, check=False)

    def kill_node_daemon(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """The cell trains on; SLURM gives the node up after ten seconds, and gets it back."""
        self.cluster.stop(node, how=signal.SIGKILL)
        time.sleep(self.dice.choice([1, 14]))
        self.cluster.start(node)

    def kill_controller(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        self.cluster.stop("slurmctld", how=signal.SIGKILL)
        time.sleep(2)
        self.cluster.start("slurmctld")

    def accounting_down(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """And a submission meanwhile."""
        self.cluster.stop("slurmdbd", how=signal.SIGKILL)
        self.submit()
        self.cluster.start("slurmdbd")

    def kill_submitter(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        process = self.start(self.submit_command())
        time.sleep(self.dice.uniform(0.5, 3))
        process.kill()

    def submit_twice_at_once(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        for process in [self.start(self.submit_command()) for _ in range(2)]:
            process.wait(180)

    def run_it_by_hand_too(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """A second process for a live cell: it must refuse, unless the cell has ended when it is ready."""
        command = [sys.executable, "-m", "dlm.launch", f"+cell={run_dir.name}", "sweep=campaign",
                   f"hydra.searchpath=[file://{self.folder}]"]  # fmt: skip
        with open(run_dir / HAND_LOG, "ab") as log:
            self.start(command, log)

    def drain_node(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """The cell goes on; nothing else starts there for a while."""
        self.cluster("scontrol", "update", f"node={node}", "state=DRAIN", "reason=campaign", check=False)
        time.sleep(self.dice.choice([1, 10]))
        self.cluster("scontrol", "update", f"node={node}", "state=RESUME", check=False)

    def node_down(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """SLURM takes the cell off the node and puts it into the queue again."""
        self.cluster("scontrol", "update", f"node={node}", "state=DOWN", "reason=campaign", check=False)
        time.sleep(self.dice.choice([1, 10]))
        self.cluster("scontrol", "update", f"node={node}", "state=RESUME", check=False)

    def suspend(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """Longer than the lease of the cell lives without a heartbeat, now and then."""
        self.cluster("scontrol", "suspend", task, check=False)
        time.sleep(self.dice.choice([2, 45]))
        self.cluster("scontrol", "resume", task, check=False)

    def requeue_and_hold(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        self.cluster("scontrol", "requeuehold", task, check=False)
        time.sleep(self.dice.choice([2, 10]))
        self.cluster("scontrol", "release", task, check=False)

    def cut_time_limit(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        self.cluster("scontrol", "update", f"jobid={task}", "timelimit=1", check=False)

    def partition_down(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """No cell starts, and submissions are taken."""
        for state in ("DOWN", "UP"):
            for partition in ("low", "grace"):
                self.cluster("scontrol", "update", f"partition={partition}", f"state={state}", check=False)
            if state == "DOWN":
                self.submit()

    def kill_controller_in_a_submission(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        process = self.start(self.submit_command())
        time.sleep(self.dice.uniform(1, 4))
        self.cluster.stop("slurmctld", how=signal.SIGKILL)
        time.sleep(self.dice.choice([1, 8]))
        self.cluster.start("slurmctld")
        process.wait(300)

    def banner_of_the_site(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """sbatch prints more than the id of the job. The cell is cancelled first, so that there is one to submit."""
        folder = self.folder.parent / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "sbatch").write_text(BANNER.format(sbatch=shutil.which("sbatch", path=self.env["PATH"])))
        (folder / "sbatch").chmod(0o755)
        self.cluster("scancel", task, check=False)
        self.submit_in(PATH=f"{folder}:{self.env['PATH']}")

    def leaked_environment(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        """Somebody submits from inside a job."""
        self.cluster("scancel", task, check=False)
        self.submit_in(**LEAKED)

    def kill_follower(self, task: str, node: str, run_dir: Path, pid: int) -> None:
        following = read_following(self.folder)
        if following is not None and following.job_id is not None:
            self.cluster("scancel", self.dice.choice(["--signal=KILL", "--full"]), following.job_id, check=False)

    @classmethod
    def kinds(cls) -> list[Callable[..., None]]:
        """Every fault."""
        return [cls.kill_process, cls.kill_in_a_checkpoint, cls.kill_and_tear_a_checkpoint, cls.terminate_process,
                cls.user_signal, cls.preempt, cls.requeue, cls.scancel, cls.kill_node_daemon, cls.kill_controller,
                cls.accounting_down, cls.kill_submitter, cls.submit_twice_at_once, cls.run_it_by_hand_too,
                cls.drain_node, cls.node_down, cls.suspend, cls.requeue_and_hold, cls.cut_time_limit,
                cls.partition_down, cls.kill_controller_in_a_submission, cls.banner_of_the_site,
                cls.leaked_environment, cls.kill_follower]  # fmt: skip

    # --- the run ---

    def left(self) -> int:
        """Cells without a result."""
        plan = json.loads((self.folder / "plan.json").read_text())
        return sum(read_result(self.folder / "runs" / cell["cell_id"]) is None for cell in plan["cells"])

    def run(self, count: int, *, pause_sec: float, limit_sec: float) -> list[dict[str, object]]:
        """All faults, in random order, then on to the end of the sweep. What was done, to whom, when."""
        kinds = self.kinds()
        todo = [kinds[place % len(kinds)] for place in range(count)]
        self.dice.shuffle(todo)
        began, submitted, faults = time.monotonic(), 0.0, list[dict[str, object]]()
        self.submit()
        while self.left():
            assert time.monotonic() - began < limit_sec, f"{self.left()} cells are not done"
            live = self.running()
            if todo and live:
                target = self.dice.choice(live)
                fault = todo.pop()
                step = read_status(target[2])
                faults.append({"kind": fault.__name__, "cell": target[2].name, "step": step.step if step else None,
                               "sec": round(time.monotonic() - began, 1)})  # fmt: skip
                print(f"{len(faults)}: {faults[-1]}; {self.left()} cells left", flush=True)
                try:
                    fault(self, *target)
                except (subprocess.TimeoutExpired, ProcessLookupError) as error:  # too late, or SLURM too busy
                    print(f"not done: {error}", flush=True)
                    todo.insert(0, fault)
                    faults.pop()
                time.sleep(self.dice.uniform(0, pause_sec))
            if time.monotonic() - submitted > SUBMIT_EVERY_SEC:
                self.submit()
                submitted = time.monotonic()
            time.sleep(0.3)
        for process in self.beside:
            process.wait(180)
        assert not todo, f"the sweep was done after {len(faults)} of {count} faults: take longer cells"
        return faults


def verdict(folder: Path, undisturbed: Path) -> dict[str, object]:
    """What became of every cell, and what it took."""
    wrong: list[str] = []
    attempts = restarts = redone = numbers = refused = crashes = 0
    for cell in json.loads((folder / "plan.json").read_text())["cells"]:
        name = cell["cell_id"]
        run, other = folder / "runs" / name, undisturbed / "runs" / name
        result, expected = read_result(run), read_result(other)
        assert result is not None and expected is not None
        logs = [run / log for log in ("log.txt", HAND_LOG) if (run / log).is_file()]
        said = sum(log.read_text().count("nats/token after") for log in logs)
        refused += sum(log.read_text().count("is being run by process") for log in logs)
        crashes += sum(log.read_text().count("Error executing job") for log in logs)
        if said != 1:
            wrong.append(f"{name} was finished {said} times")
        if (difference := differing(run, other)) is not None:
            wrong.append(f"{name}: {difference}")
        if (result.loss, result.loss_se) != (expected.loss, expected.loss_se):
            wrong.append(f"{name} ends with {result.loss!r}, not {expected.loss!r}")
        ids = {path.name.split("-", 3)[3] for path in (run / "wandb").glob("offline-run-*")}
        if ids != {f"{folder.name}-{name}"}:
            wrong.append(f"{name} has the W&B runs {ids}")
        numbers += sum(len(of_step) for _, of_step in rows(run))
        started = json.loads((run / "env.json").read_text())["attempts"]
        attempts += len(started)
        restarts += sum("RESTART_COUNT" in attempt["slurm"] for attempt in started)
        redone += result.steps_redone
    return {"wrong": wrong, "cells": len(list((folder / "runs").iterdir())), "attempts": attempts,
            "requeued": restarts, "second_processes_refused": refused,
            "ended_by_an_exception": crashes, "steps_redone": redone, "numbers_compared": numbers}  # fmt: skip


def main() -> int:
    """Undisturbed first, then the campaign; its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=112)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=4.0, help="seconds between faults, at most")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which it is given up")
    parser.add_argument("--undisturbed", type=Path, help="a work directory of an earlier one, to be gone on with")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="dlm-campaign-"))
    before, alone = time.monotonic(), given.undisturbed or base / "undisturbed"
    subprocess.run(submit_to("submitit_local"), env={**os.environ, "DLM_WORKDIR": str(alone)}, cwd=PACKAGE.parent,
                   check=True)  # fmt: skip
    undisturbed_sec = time.monotonic() - before
    install()
    with sandbox() as cluster:
        campaign = Campaign(cluster, base / "work", random.Random(given.seed))
        before = time.monotonic()
        faults = campaign.run(given.faults, pause_sec=given.pause, limit_sec=given.limit)
        wall_sec = time.monotonic() - before
    figures = {
        "faults": dict(sorted(Counter(str(fault["kind"]) for fault in faults).items())),
        "seed": given.seed,
        "undisturbed_sec": round(undisturbed_sec),
        "wall_sec": round(wall_sec),
        "retry_failed_needed": campaign.given_up,
        **verdict(base / "work" / "campaign", alone / "campaign"),
    }
    print(json.dumps(figures, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps({**figures, "list": faults}, indent=2) + "\n")
    print(f"{base} is kept" if figures["wrong"] else "as undisturbed, bit for bit")
    return int(bool(figures["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
