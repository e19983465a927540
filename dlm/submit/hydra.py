"""launchers: Hydra's `-m` on the submission core: hydra/launcher=submitit_local and submitit_slurm.

Hydra makes the classes from configs/hydra/launcher; launch calls ``register`` first. Each job composes its own
config where it runs, so what travels is its override list. hydra-submitit-launcher is not needed; where it is
installed it announces configs of the same two names, and ours count.
"""

from __future__ import annotations

import copy
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from dlm.core.errors import ExitCode, unknown
from dlm.record.outcomes import State
from dlm.record.run import finished
from dlm.submit.job import Job, Resources, SlurmSettings, slurm_settings
from dlm.submit.local import Event, LocalPool
from dlm.submit.slurm import Slurm
from dlm.submit.state import cells_now
from dlm.submit.submission import Submission, submit_jobs, submitting

# Hydra 1.3 makes plugins only under this name; it looks them up in a table that ``register`` fills.
PLUGINS = "hydra_plugins.dlm"


NAMES = ("submitit_local", "submitit_slurm")


# What the submitting Hydra is told and a job must not be: it runs one cell, in its own process.
_NOT_FOR_JOBS = re.compile(r"[+~]*hydra([/.]launcher|[/.]sweeper|\.sweep|\.mode)\b")


def register() -> None:
    """Make both launchers known to Hydra, and their configs the ones that count."""
    plugins = Plugins.instance()  # loads installed plugins, with their configs
    for launcher in (LocalLauncher, SlurmLauncher):
        plugins.class_name_to_class[f"{PLUGINS}.{launcher.__name__}"] = launcher
    stored = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for name in NAMES:  # else Hydra would check our files against their schema
        stored.pop(f"{name}.yaml", None)


@dataclass(frozen=True, kw_only=True)
class Composed:
    """One job of a multirun, as composed here to learn its name and directory."""

    job: Job
    config: DictConfig


class CoreLauncher(Launcher):
    """What both launchers share: compose each job, submit, wait, and say how each ended."""

    def __init__(self, **params: Any) -> None:
        self.params = {key: _plain(value) for key, value in params.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook: keep what composing a job takes."""
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; one line on stderr for each that failed, whose code the process then exits with."""
        composed = [self._compose(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        jobs = {item.job.name: item.job for item in composed}
        sweep_dir = composed[0].job.run_dir.parents[1]
        codes = self.run(jobs, sweep_dir)
        for name, job in jobs.items():
            if codes.get(name):
                _say(f"{name} failed with exit code {codes[name]}: see {job.run_dir / 'log.txt'}")
        return [_job_return(item, codes.get(item.job.name, 0)) for item in composed]

    def run(self, jobs: Mapping[str, Job], sweep_dir: Path) -> dict[str, int]:
        """Submit those of ``jobs`` that are to start, wait for all; the exit code of each that ran."""
        raise NotImplementedError

    def worth_starting(self, jobs: Mapping[str, Job], sweep_dir: Path, *, live: Sequence[State] = ()) -> list[Job]:
        """The jobs that are neither done nor in one of the ``live`` states."""
        now, _ = cells_now([(name, None) for name in jobs], sweep_dir)
        skip = {name for name, cell in now.items() if cell.state in (State.DONE, *live)}
        for name in sorted(skip):
            _say(f"{name} is {now[name].state}: not started again")
        return [job for name, job in jobs.items() if name not in skip]

    def settings(self) -> SlurmSettings:
        """The launcher's keys; what both launchers share has the same names."""
        return slurm_settings(self.params)

    def _compose(self, overrides: Sequence[str], index: int) -> Composed:
        """Compose one job here, about 90 ms, for its name, directory and devices."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(index), index
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            cell_id, run_dir = str(config.cell_id), Path(str(config.paths.run_dir)).absolute()
        finally:
            HydraConfig.instance().cfg = before
        hydra_overrides = [item for item in config.hydra.overrides.hydra if not _NOT_FOR_JOBS.match(item)]
        return Composed(
            config=config,
            job=Job(
                name=cell_id,
                overrides=(*hydra_overrides, *overrides),
                run_dir=run_dir,
                resources=job_resources(self.settings(), config.get("trainer") or {}),
            ),
        )


class LocalLauncher(CoreLauncher):
    """hydra/launcher=submitit_local: as many jobs at once as cores and GPUs allow, waited for."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        allowed = ("cpus_per_task", "cores", "grace_sec")
        for key in self.params:
            if key not in allowed:
                raise unknown("key of hydra.launcher", key, allowed)

    def settings(self) -> SlurmSettings:
        """Only the cores of a job are asked for here."""
        return SlurmSettings(cpus_per_task=self.params.get("cpus_per_task"), tasks_per_node=1)

    def run(self, jobs: Mapping[str, Job], sweep_dir: Path) -> dict[str, int]:
        """Run them as processes of this machine."""
        pool = LocalPool(cores=self.params.get("cores"), grace_sec=self.params.get("grace_sec") or 120.0)
        started = self.worth_starting(jobs, sweep_dir)
        done = submit_jobs(started, cluster=pool, sweep_dir=sweep_dir, on_event=_show)
        never = dict.fromkeys((job.name for job in started), int(ExitCode.PREEMPTED)) if done.interrupted else {}
        return never | dict(done.exit_codes)


class SlurmLauncher(CoreLauncher):
    """hydra/launcher=submitit_slurm: job arrays; waits for them unless hydra.launcher.wait=false."""

    def run(self, jobs: Mapping[str, Job], sweep_dir: Path) -> dict[str, int]:
        """Submit them, and poll squeue and sacct until each has ended."""
        settings, names = self.settings(), list(jobs)
        cluster = Slurm(settings)
        with submitting(cluster, sweep_dir, names):
            starting = self.worth_starting(jobs, sweep_dir, live=(State.RUNNING, State.SUBMITTED))
            done = submit_jobs(starting, cluster=cluster, sweep_dir=sweep_dir)
        _say(submitted_line(done))
        if not settings.wait:
            return {}
        try:
            return wait_for(names, sweep_dir, poll_sec=settings.poll_sec)
        except KeyboardInterrupt:
            _say(f"the jobs go on in {sweep_dir / 'runs'}; the same command waits for them again")
            raise SystemExit(130) from None


def submitted_line(done: Submission) -> str:
    """What SLURM took, in one line."""
    arrays = sorted({job_id.split("_")[0] for job_id in done.job_ids.values()})
    return f"submitted {len(done.job_ids)} jobs" + (f" as {', '.join(arrays)}" if arrays else "")


def wait_for(names: Sequence[str], sweep_dir: Path, *, poll_sec: float) -> dict[str, int]:
    """Poll until every job has ended; an exit code for each that is not done."""
    codes = {
        State.BAD_CONFIG: ExitCode.USER_ERROR,
        State.DIVERGED: ExitCode.DIVERGED,
        State.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
        State.PREEMPTED: ExitCode.PREEMPTED,
        State.DONE: ExitCode.DONE,
    }
    while True:
        now, warnings = cells_now([(name, None) for name in names], sweep_dir)
        if not any(cell.state in (State.RUNNING, State.SUBMITTED) for cell in now.values()):
            return {name: int(codes.get(cell.state, ExitCode.BUG)) for name, cell in now.items()}
        for warning in warnings:
            _say(f"{warning}: asking again in {poll_sec:g} s")
        time.sleep(poll_sec)


def job_resources(settings: SlurmSettings, trainer: Mapping[str, Any]) -> Resources:
    """The launcher's keys where they are set, else what the composed trainer will use."""
    devices = trainer.get("devices")
    devices = devices if isinstance(devices, int) else 1
    on_gpu = trainer.get("accelerator") in ("gpu", "cuda")
    gpus = settings.gpus_per_node if settings.gpus_per_node is not None else devices * on_gpu
    return Resources(
        nodes=settings.nodes or trainer.get("num_nodes") or 1,
        tasks_per_node=settings.tasks_per_node or devices,
        gpus_per_node=gpus,
        cpus_per_task=settings.cpus_per_task or 1,
        mem_gib=settings.mem_gb,
        time_min=settings.timeout_min,
    )


def _job_return(item: Composed, exit_code: int) -> JobReturn:
    """What Hydra's sweepers read: the loss, or an exit with the job's own code when it is looked at."""
    result = finished(item.job.run_dir, item.job.name, None)
    task_config = copy.deepcopy(item.config)
    with read_write(task_config), open_dict(task_config):
        del task_config["hydra"]
    answer = JobReturn(
        overrides=list(item.config.hydra.overrides.task),
        cfg=task_config,
        hydra_cfg=OmegaConf.masked_copy(item.config, "hydra"),
        working_dir=str(item.job.run_dir),
        task_name=item.config.hydra.job.name,
        status=JobStatus.FAILED if exit_code else JobStatus.COMPLETED,
    )
    shell_code = exit_code if exit_code >= 0 else 128 - exit_code
    answer.return_value = SystemExit(shell_code) if exit_code else (result.loss if result else None)
    return answer


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _show(event: Event) -> None:
    words = {"deferred": "is run by another process: waiting for it", "skipped": "was finished elsewhere"}
    if event.kind == "ended":
        _say(f"{event.job.name} ended with exit code {event.exit_code} after {event.wall_sec or 0:.0f} s")
    else:
        _say(f"{event.job.name} {words.get(event.kind, event.kind)}")


def _say(line: str) -> None:
    print(f"dlm: {line}", file=sys.stderr, flush=True)
