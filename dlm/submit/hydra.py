"""Provide the launchers submitit_local and submitit_slurm for Hydra's `-m`; they submit jobs as `dlm submit` does.

Hydra creates the launchers from configs/hydra/launcher, after ``register`` has registered them. A job composes its
config where it runs, so only its list of overrides is passed to it. hydra-submitit-launcher is not needed. Where this
plugin is installed, it registers configs of the same two names, and the configs of dlm replace them.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from dlm.core.errors import ExitCode, unknown
from dlm.record.outcomes import OUTCOMES, State
from dlm.record.run import finished
from dlm.submit.cluster import Cluster, Event
from dlm.submit.job import Job, Resources, SlurmSettings, slurm_settings
from dlm.submit.local import LocalPool
from dlm.submit.slurm import Slurm
from dlm.submit.state import cells_now
from dlm.submit.submission import submit_jobs, submitting

# Overrides for the submitting Hydra process that must not be passed to a job: a job runs one cell in its own process.
_NOT_FOR_JOBS = re.compile(r"[+~]*hydra([/.]launcher|[/.]sweeper|\.sweep|\.mode)\b")


def register() -> None:
    """Register both launchers with Hydra, so that Hydra takes their configs from dlm."""
    plugins = Plugins.instance()  # loads the installed plugins and their configs
    for launcher in (LocalLauncher, SlurmLauncher):
        # Hydra 1.3 accepts plugins only from the package hydra_plugins, so each launcher gets a name in that package.
        plugins.class_name_to_class[f"hydra_plugins.dlm.{launcher.__name__}"] = launcher
    stored = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    # Without the next lines, Hydra would check the files of dlm against the schema of an installed launcher.
    for name in ("submitit_local", "submitit_slurm"):
        stored.pop(f"{name}.yaml", None)


class CoreLauncher(Launcher):
    """The base class of both launchers: compose each job, submit the jobs, wait, and report how each job ended."""

    def __init__(self, **params: Any) -> None:
        self.params = {key: _plain(value) for key, value in params.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what is needed to compose jobs, and create the cluster. Hydra calls this method."""
        self.config, self.hydra_context, self.cluster = config, hydra_context, self.make_cluster()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, and print a line on stderr for each job that failed. Hydra calls this method.

        Args:
            job_overrides: The overrides of each job.
            initial_job_idx: The number of the first job.

        Returns:
            For each job a JobReturn with its loss, or with the exit code with which the submitting process must end.
        """
        composed = [self._compose(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        jobs = {job.name: job for job, _ in composed}
        codes = self._run(jobs, composed[0][0].run_dir.parents[1])
        for name, job in jobs.items():
            if codes.get(name):
                _say(f"{name} failed with exit code {codes[name]}: see {job.run_dir / 'log.txt'}")
        return [_job_return(job, config, codes.get(job.name, 0)) for job, config in composed]

    def make_cluster(self) -> Cluster:
        """Create the cluster on which the jobs run. Raises UserError for a key of the launcher that is not allowed."""
        raise NotImplementedError

    def _run(self, jobs: Mapping[str, Job], sweep_dir: Path) -> dict[str, int]:
        """Submit the jobs that are worth starting, and wait for all jobs; return the known exit codes by job name."""
        cluster = self.cluster
        with submitting(cluster, sweep_dir):
            starting = _worth_starting(jobs, sweep_dir, cluster)
            done = submit_jobs(starting, cluster=cluster, sweep_dir=sweep_dir, on_event=_show)
        if not cluster.queues:
            not_run = (job.name for job in starting if done.interrupted)
            return dict.fromkeys(not_run, int(ExitCode.PREEMPTED)) | dict(done.exit_codes)
        arrays = sorted({job_id.split("_")[0] for job_id in done.job_ids.values()})
        _say(f"submitted {len(done.job_ids)} jobs" + (f" as {', '.join(arrays)}" if arrays else ""))
        if not cluster.settings.wait:
            return {}
        try:
            return _wait_for(list(jobs), sweep_dir, poll_sec=cluster.settings.poll_sec)
        except KeyboardInterrupt:
            _say(f"the jobs go on in {sweep_dir / 'runs'}; the same command waits for them again")
            raise SystemExit(130) from None

    def _compose(self, overrides: Sequence[str], index: int) -> tuple[Job, DictConfig]:
        """Return a job and its config.

        The config is composed here (90 ms) only to find the name, the run directory and the devices of the job, which
        composes its config again where it runs.
        """
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(index), index
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            name, run_dir = str(config.cell_id), Path(str(config.paths.run_dir)).absolute()
        finally:
            HydraConfig.instance().cfg = before
        hydra_overrides = [item for item in config.hydra.overrides.hydra if not _NOT_FOR_JOBS.match(item)]
        resources = job_resources(self.cluster.settings, config)
        return Job(name=name, overrides=(*hydra_overrides, *overrides), run_dir=run_dir, resources=resources), config


class LocalLauncher(CoreLauncher):
    """hydra/launcher=submitit_local: run jobs as processes on this machine, as many as its cores and GPUs allow."""

    def make_cluster(self) -> Cluster:
        """Return this machine as the cluster. The only resource that the launcher's keys set is the cores of a job."""
        allowed = ("cpus_per_task", "cores", "grace_sec")
        for key in self.params:
            if key not in allowed:
                raise unknown("key of hydra.launcher", key, allowed)
        return LocalPool(
            cores=self.params.get("cores"),
            grace_sec=self.params.get("grace_sec") or 120.0,
            settings=SlurmSettings(cpus_per_task=self.params.get("cpus_per_task"), tasks_per_node=1, allow_dirty=True),
        )


class SlurmLauncher(CoreLauncher):
    """hydra/launcher=submitit_slurm: submit job arrays, and wait for them unless hydra.launcher.wait=false."""

    def make_cluster(self) -> Cluster:
        """Return a SLURM cluster that is configured with the launcher's keys."""
        return Slurm(slurm_settings(self.params))


def _worth_starting(jobs: Mapping[str, Job], sweep_dir: Path, cluster: Cluster) -> list[Job]:
    """Return the jobs whose cells are not done and, on a cluster with a queue, neither wait nor run."""
    now, _ = cells_now([(name, None) for name in jobs], sweep_dir, repair=cluster.queues)
    skip = {name for name, cell in now.items() if cell.state is State.DONE or (cluster.queues and cell.is_live)}
    for name in sorted(skip):
        _say(f"{name} is {now[name].state}: not started again")
    return [job for name, job in jobs.items() if name not in skip]


def _wait_for(names: Sequence[str], sweep_dir: Path, *, poll_sec: float) -> dict[str, int]:
    """Poll until no cell waits or runs any more, and return the exit code of each cell."""
    while True:
        now, warnings = cells_now([(name, None) for name in names], sweep_dir)
        if not any(cell.is_live for cell in now.values()):
            codes = {name: OUTCOMES[cell.state].exit_code for name, cell in now.items()}
            return {name: int(ExitCode.BUG if code is None else code) for name, code in codes.items()}
        for warning in warnings:
            _say(f"{warning}: asking again in {poll_sec:g} s")
        time.sleep(poll_sec)


def job_resources(settings: SlurmSettings, config: Mapping[str, Any]) -> Resources:
    """Return the resources that a job requests: the launcher's keys where they are set, else what its config uses."""
    trainer, data = (config.get(group) or {} for group in ("trainer", "data"))
    devices = trainer.get("devices")
    devices = devices if isinstance(devices, int) else 1
    on_gpu = trainer.get("accelerator") in ("gpu", "cuda")
    gpus = settings.gpus_per_node if settings.gpus_per_node is not None else devices * on_gpu
    return Resources(
        nodes=settings.nodes or trainer.get("num_nodes") or 1,
        tasks_per_node=settings.tasks_per_node or devices,
        gpus_per_node=gpus,
        cpus_per_task=settings.cpus_per_task or 1 + (data.get("num_workers") or 0),
        mem_gib=settings.mem_gb,
        time_min=settings.timeout_min,
    )


def _job_return(job: Job, config: DictConfig, exit_code: int) -> JobReturn:
    """Return the outcome of a job for Hydra's sweepers.

    The return value is the loss. If the job failed, it is a SystemExit with the exit code of the job, which is raised
    when the sweeper reads the value.
    """
    result = finished(job.run_dir, job.name, None)
    answer = JobReturn(
        overrides=list(config.hydra.overrides.task),
        cfg=OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]),
        hydra_cfg=OmegaConf.masked_copy(config, "hydra"),
        working_dir=str(job.run_dir),
        task_name=config.hydra.job.name,
        status=JobStatus.FAILED if exit_code else JobStatus.COMPLETED,
    )
    shell_code = exit_code if exit_code >= 0 else 128 - exit_code
    answer.return_value = SystemExit(shell_code) if exit_code else (result.loss if result else None)
    return answer


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _show(event: Event) -> None:
    words = {
        "started": "started",
        "ended": f"ended with exit code {event.exit_code} after {event.wall_sec or 0:.0f} s",
        "deferred": "is run by another process: waiting for it",
        "skipped": "was finished elsewhere",
    }
    _say(f"{event.job.name} {words[event.kind]}")


def _say(line: str) -> None:
    print(f"dlm: {line}", file=sys.stderr, flush=True)
