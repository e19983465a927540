"""Provide the launchers submitit_local and submitit_slurm for Hydra's `-m`; they submit jobs as `dlm submit` does.

They are subclasses of the launchers of hydra-submitit-launcher and take their place, also where a config file names
those. `hydra.launcher._target_=...` on the command line selects the original. A job composes its config where it runs,
so only its list of overrides is passed to it.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher import config as plugin_config
from hydra_plugins.hydra_submitit_launcher import submitit_launcher as plugin
from omegaconf import DictConfig, OmegaConf, open_dict

from dlm.core.errors import ExitCode, unknown
from dlm.core.files import OWNER_ONLY
from dlm.core.names import printable
from dlm.core.text import counted
from dlm.record.aside import RERUN, in_words, set_aside
from dlm.record.outcomes import OUTCOMES, State
from dlm.record.run import finished, read_status
from dlm.submit import config_files
from dlm.submit.cell_now import CellNow
from dlm.submit.cluster import Cluster, Event
from dlm.submit.job import LAUNCHERS, Job, Resources, SlurmSettings, slurm_settings
from dlm.submit.ledger import Ledger
from dlm.submit.local import LocalPool, LocalSettings, local_settings
from dlm.submit.slurm import Slurm
from dlm.submit.slurm_commands import JobLimitError
from dlm.submit.state import cells_now
from dlm.submit.submission import submit_jobs, submitting

# Overrides for the submitting Hydra process that must not be passed to a job: a job runs one cell in its own process.
_NOT_FOR_JOBS = re.compile(r"[+~]*hydra([/.]launcher|[/.]sweeper|\.sweep|\.mode)\b")
_ASKS_FOR_ORIGINAL = re.compile(r"[+~]*hydra\.launcher\._target_=")


def _config_node(name: str, base: type[Any], settings: type[Any], target: str) -> type[Any]:
    """Return a config node of the plugin with the keys of dlm's settings, whose defaults take precedence.

    The fields that the plugin types as int, such as ``nodes``, become optional: null leaves them to the plan.
    """
    types = typing.get_type_hints(settings)
    members: list[Any] = [("_target_", str, target)]
    for item in dataclasses.fields(settings):
        kind = _IN_CONFIGS.get(str(types[item.name]), types[item.name])
        has_factory = item.default is dataclasses.MISSING
        default = dataclasses.field(default_factory=dict) if has_factory else _list_or(item.default)
        members.append((item.name, kind, default))
    return dataclasses.make_dataclass(name, members, bases=(base,))


_IN_CONFIGS: dict[str, Any] = {
    str(Mapping[str, Any]): dict[str, Any] | None,
    str(Sequence[str]): list[str] | None,
}


def _list_or(default: Any) -> Any:
    return dataclasses.field(default_factory=list) if default == () else default


SlurmConf = _config_node("SlurmConf", plugin_config.SlurmQueueConf, SlurmSettings, "hydra_plugins.dlm.SlurmLauncher")
LocalConf = _config_node("LocalConf", plugin_config.LocalQueueConf, LocalSettings, "hydra_plugins.dlm.LocalLauncher")


def register(arguments: Sequence[str] = (), *, anew: bool = False) -> None:
    """Register both launchers, their config nodes and the reader of config files with Hydra.

    Args:
        arguments: The command line. If it names the class of a launcher, the launchers of the plugin stay as they are.
        anew: Whether the launchers train runs anew that are done.
    """
    CoreLauncher.anew = anew
    wants_original = any(_ASKS_FOR_ORIGINAL.match(word) for word in arguments)
    plugins = Plugins.instance()  # loads the installed plugins and their configs
    for name, own, original in (
        ("LocalLauncher", LocalLauncher, OriginalLocalLauncher),
        ("SlurmLauncher", SlurmLauncher, OriginalSlurmLauncher),
    ):
        # Hydra 1.3 accepts plugins only from the package hydra_plugins, so each launcher gets a name in that package.
        plugins.class_name_to_class[f"hydra_plugins.dlm.{name}"] = own
        plugins.class_name_to_class[f"{plugin.__name__}.{name}"] = original if wants_original else own
    config_files.register()
    store = ConfigStore.instance()
    for name, node in (("local", LocalConf), ("slurm", SlurmConf)):
        store.repo.get("hydra", {}).get("launcher", {}).pop(f"submitit_{name}.yaml", None)  # else it checks dlm's files
        store.store(group="hydra/launcher", name=f"dlm_{name}", node=node, provider="dlm")


class _Original(plugin.BaseSubmititLauncher):
    """A launcher of the plugin as it is, with its own defaults for the keys that are as dlm's file has them.

    Raises UserError for a key that the plugin does not know.
    """

    conf: type[Any]
    own: type[Any]  # dlm's config node
    params: dict[str, Any]

    def __init__(self, **params: Any) -> None:
        defaults, ours = ({k: v for k, v in vars(node()).items() if k != "_target_"} for node in (self.conf, self.own))
        given = {key: value for key, value in params.items() if value != ours.get(key)}
        for key in given:
            if key not in defaults:
                raise unknown("key of the plugin's own launcher", key, defaults)
        super().__init__(**{**defaults, **given})

    def setup(self, *, config: DictConfig, **others: Any) -> None:
        super().setup(config=config, **others)
        with open_dict(config.hydra.launcher):  # the defaults of the plugin refer to other keys of the config
            config.hydra.launcher = self.params
        resolved: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
        self.params = resolved


class OriginalLocalLauncher(_Original, plugin.LocalLauncher):
    """The plugin's launcher for this machine."""

    conf, own = plugin_config.LocalQueueConf, LocalConf


class OriginalSlurmLauncher(_Original, plugin.SlurmLauncher):
    """The plugin's launcher for SLURM."""

    conf, own = plugin_config.SlurmQueueConf, SlurmConf


def _reserve(multirun: Path) -> None:
    """Let only the owner read Hydra's file with the keys of the launcher, because ``setup`` may export a secret."""
    if multirun.is_file():
        multirun.chmod(OWNER_ONLY)


class CoreLauncher(plugin.BaseSubmititLauncher):
    """What both launchers do: compose each job, submit the jobs, wait, and report how each job ended.

    The launchers of the plugin wait for all jobs by sacct alone, take a failed job for a completed one, and give all
    jobs the same resources.
    """

    anew = False  # Hydra makes the launcher from the config, where this is not a key

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, and print a line on stderr for each job that failed. Hydra calls this method.

        Args:
            job_overrides: The overrides of each job.
            initial_job_idx: The number of the first job.

        Returns:
            For each job a JobReturn with its loss, or with the exit code with which the submitting process must end.
        """
        self.cluster = self.make_cluster()
        _reserve(Path(self.config.hydra.sweep.dir) / "multirun.yaml")
        composed = [self._compose(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        jobs = {job.name: job for job, _ in composed}
        codes = self._run(jobs, composed[0][0].run_dir.parents[1])
        for name, job in jobs.items():
            status = read_status(job.run_dir)
            if codes.get(name) == ExitCode.PREEMPTED and status is not None and status.reason:
                _say(f"{name} {status.reason}; the same command continues it")
            elif codes.get(name):
                _say(f"{name} failed with exit code {codes[name]}: see {job.run_dir / 'log.txt'}")
        return [_job_return(job, config, codes.get(job.name, 0)) for job, config in composed]

    def make_cluster(self) -> Cluster:
        """Create the cluster on which the jobs run. Raises UserError for a key of the launcher that is not allowed."""
        raise NotImplementedError

    def _run(self, jobs: Mapping[str, Job], sweep_dir: Path) -> dict[str, int]:
        """Submit the jobs that are worth starting, and wait for all jobs; return the known exit codes by job name."""
        cluster, codes, left = self.cluster, dict[str, int](), dict(jobs)
        before = Ledger(sweep_dir).cancelled_now()
        while left:
            try:
                with submitting(cluster, sweep_dir):
                    starting, live = _worth_starting(left, sweep_dir, cluster, anew=self.anew)
                    done = submit_jobs(starting, cluster=cluster, sweep_dir=sweep_dir, live=live, on_event=_show)
            except JobLimitError as error:  # other jobs of the user fill the queue
                if len(left) == len(jobs):  # nothing has run yet
                    raise
                _say(f"{error}: trying again in {cluster.settings.poll_sec:g} s")
                time.sleep(cluster.settings.poll_sec)
                continue
            if not cluster.queues:
                not_run = (job.name for job in starting if done.interrupted)
                return dict.fromkeys(not_run, int(ExitCode.PREEMPTED)) | dict(done.exit_codes)
            _say(
                f"submitted {counted(len(done.job_ids), 'job')}"
                + (f" as {', '.join(done.arrays)}" if done.arrays else "")
            )
            for name, why in done.postponed.items():
                _say(f"{name} is not submitted yet: {why}")
            if not cluster.settings.wait:
                return {}
            try:
                codes |= _wait_for(list(left.keys() - done.postponed), sweep_dir, poll_sec=cluster.settings.poll_sec)
            except KeyboardInterrupt:
                _say(f"the jobs go on in {sweep_dir / 'runs'}; the same command waits for them again")
                raise SystemExit(130) from None
            if not done.postponed:
                return codes
            cancelled = Ledger(sweep_dir).cancelled_now() - before
            left = {name: job for name, job in left.items() if name in done.postponed and name not in cancelled}
        return codes

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


class LocalLauncher(CoreLauncher, plugin.LocalLauncher):
    """hydra/launcher=submitit_local: run jobs as processes on this machine, as many as its cores and GPUs allow."""

    def make_cluster(self) -> Cluster:
        """Return this machine as the cluster."""
        return LocalPool.of(local_settings(self.params))


class SlurmLauncher(CoreLauncher, plugin.SlurmLauncher):
    """hydra/launcher=submitit_slurm: submit job arrays, and wait for them unless hydra.launcher.wait=false."""

    def make_cluster(self) -> Cluster:
        """Return a SLURM cluster that is configured with the launcher's keys."""
        chosen = self.config.hydra.runtime.choices["hydra/launcher"]
        return Slurm(slurm_settings(self.params), file=f"{LAUNCHERS}/{chosen}.yaml")


def _worth_starting(
    jobs: Mapping[str, Job], sweep_dir: Path, cluster: Cluster, *, anew: bool
) -> tuple[list[Job], list[CellNow]]:
    """Return (the jobs to start, the cells that wait or run).

    To start are the jobs whose cells are not done and, on a cluster with a queue, neither wait nor run. With ``anew``,
    the cells that are done are moved away first.
    """
    now, _ = cells_now([(name, None) for name in jobs], sweep_dir, repair=cluster.queues)
    for name, cell in now.items():
        if anew and cell.result is not None:
            _say(in_words(set_aside(jobs[name].run_dir), cell.result))
            now[name] = CellNow(state=State.PLANNED)
    skip = {name for name, cell in now.items() if cell.state is State.DONE or (cluster.queues and cell.is_live)}
    for name in sorted(skip):
        how = f"; {RERUN} trains it anew" if now[name].state is State.DONE else ""
        _say(f"{name} is {now[name].state}: not started again{how}")
    live = [cell for cell in now.values() if cell.is_live]
    return [job for name, job in jobs.items() if name not in skip], live


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


def _show(event: Event) -> None:
    words = {
        "started": "started",
        "ended": f"ended with exit code {event.exit_code} after {event.wall_sec or 0:.0f} s",
        "deferred": "is run by another process: waiting for it",
        "skipped": "was finished elsewhere",
    }
    _say(f"{event.job.name} {words[event.kind]}")


def _say(line: str) -> None:
    print(f"dlm: {printable(line)}", file=sys.stderr, flush=True)
