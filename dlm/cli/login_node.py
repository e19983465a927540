"""Look at a cluster from its login node, for `dlm doctor`: SLURM, its partitions and limits, folders, code and W&B."""

from __future__ import annotations

import netrc
import os
import pwd
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from dlm.cli.check import Check, failed, ok, warning
from dlm.core import paths
from dlm.core.configs import load_choice, load_mapping
from dlm.core.errors import UserError, hint
from dlm.core.files import explain_os_error, write_atomic
from dlm.core.git import code_origin
from dlm.submit.job import SlurmSettings
from dlm.submit.partitions import Association, Partition, associations, controllers_array_limit, partitions
from dlm.submit.slurm import Slurm, slurm_answers
from dlm.submit.slurm_commands import output
from dlm.submit.snapshot import uncommitted

MANY_PARTITIONS = 8  # more are not listed
LITTLE_GIB = 20.0  # of free space; the checkpoints of a small sweep
GIB = 2**30


def slurm_check() -> Check:
    """Whether the controller answers, and SLURM's version."""
    if not slurm_answers():
        return failed("SLURM", "sbatch exists, but no controller answers", "run `scontrol ping`; set SLURM_CONF")
    return ok("SLURM", f"the controller answers; {output(['sbatch', '--version']).strip()}")


def read_partitions() -> tuple[list[Partition], Check]:
    """Return the partitions, and the check that names them."""
    try:
        found = partitions()
    except UserError as error:
        return [], warning("partitions", str(error), "run `sinfo`")
    if not found:
        return [], warning("partitions", "sinfo shows none", "ask for access to a partition")
    more = [f"and {len(found) - MANY_PARTITIONS} more"] if len(found) > MANY_PARTITIONS else []
    return found, ok("partitions", "; ".join([*map(str, found[:MANY_PARTITIONS]), *more]))


def chosen_partitions(settings: SlurmSettings, known: Sequence[Partition]) -> list[Partition]:
    """Return the partitions to which the jobs of a launcher go, as far as they exist."""
    names = _named(settings)
    return [part for part in known if part.name in names or (not names and part.is_default)]


def _named(settings: SlurmSettings) -> list[str]:
    given = settings.additional_parameters.get("partition") or settings.partition or os.environ.get("SBATCH_PARTITION")
    return str(given).split(",") if given else []


def partition_check(slurm: Slurm, known: Sequence[Partition]) -> Check:
    """Whether the launcher's partition exists, is up and allows the launcher's time limit."""
    names, chosen = _named(slurm.settings), chosen_partitions(slurm.settings, known)
    every = [part.name for part in known]
    for name in names:
        if name not in every:
            near = hint(name, every)
            return failed("partition", f"there is no partition {name}", f"set hydra.launcher.partition; {near}")
    if not chosen:
        allowed = ", ".join(every[:MANY_PARTITIONS])
        return warning("partition", "the cluster has no default", f"set hydra.launcher.partition to one of {allowed}")
    if down := [part.name for part in chosen if not part.is_up]:
        return failed("partition", f"{', '.join(down)} takes no jobs now", "set hydra.launcher.partition")
    asked, allowed_min = slurm.settings.timeout_min, slurm.max_time_min(slurm.settings)
    if asked is not None and allowed_min is not None and asked > allowed_min:
        found = f"hydra.launcher.timeout_min is {asked}, and the partition allows {allowed_min} minutes"
        return failed("partition", found, f"set hydra.launcher.timeout_min to {allowed_min} at most")
    return ok("partition", f"jobs go to {', '.join(part.name for part in chosen)}")


def arrays_check(settings: SlurmSettings) -> Check:
    """The size of an array that the controller and the launcher allow."""
    limit = controllers_array_limit()
    if limit is None:
        return warning("arrays", "scontrol does not say MaxArraySize", "run `scontrol show config`")
    return ok("arrays", f"MaxArraySize is {limit}, hydra.launcher.max_array_size {settings.max_array_size}")


def associations_check(settings: SlurmSettings) -> Check:
    """What the user may do with which account and QOS."""
    user = _user()
    try:
        found = associations(user)
    except UserError as error:
        return warning("account", str(error), "without accounting, ask the administrators for your limits")
    if not found:
        return warning("account", f"sacctmgr knows no account of {user}", "ask the administrators if sbatch refuses")
    words = "; ".join(dict.fromkeys(_words(one) for one in found))
    accounts, qos = [one.account for one in found], [name for one in found for name in one.qos]
    for key, value, known in (("account", settings.account, accounts), ("qos", settings.qos, qos)):
        if value is not None and known and value not in known:
            return warning("account", words, f"hydra.launcher.{key} is {value}: {hint(value, dict.fromkeys(known))}")
    return ok("account", words)


def _words(one: Association) -> str:
    limits = (("MaxJobs", one.max_jobs), ("MaxSubmitJobs", one.max_submitted))
    told = [f"{name} {value}" for name, value in limits if value is not None] or ["no limit of jobs"]
    where = f" on {one.partition}" if one.partition else ""
    return f"{one.account}{where}: QOS {', '.join(one.qos) or 'none'}, {', '.join(told)}"


def sacct_check() -> Check:
    """Whether sacct answers, which tells how jobs have ended."""
    try:
        output(["sacct", "--allocations", "--noheader", "--format=JobID"])
    except UserError as error:
        advice = "dlm goes on with squeue; look at a sweep at least every five minutes, or use --then report"
        return warning("sacct", str(error), advice)
    return ok("sacct", "accounting answers")


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # the id has no name here
        return str(os.getuid())


def workdir_check(token: Path, content: str) -> Check:
    """Write a token to the work directory, and say how much space is free there."""
    advice = "choose a folder that you can write and all nodes share: DLM_WORKDIR"
    try:
        write_atomic(token, content)
        free_gib = shutil.disk_usage(token.parent).free / GIB
    except OSError as error:
        return failed("workdir", explain_os_error(error) or str(error), advice)
    found = f"{paths.workdir()}, {free_gib:,.0f} GiB free"
    if free_gib < LITTLE_GIB:
        return warning("workdir", found, "make room, or choose another folder: DLM_WORKDIR")
    return ok("workdir", found)


def code_check(settings: SlurmSettings) -> Check:
    """Whether the code is committed, so that `dlm submit` takes it."""
    origin = code_origin(with_diff=False)
    if origin is None:
        return warning("code", "the code is in no git repository", "the runs will not name their commit; clone dlm")
    if origin.changed and not settings.allow_dirty:
        return warning("code", uncommitted(origin), "commit before `dlm submit`, or submit with --allow-dirty")
    return ok("code", f"commit {origin.sha[:8]}{', with changes' if origin.changed else ''}")


def wandb_check() -> Check:
    """Whether runs log to W&B's server or to a file, and whether a key for the server is found."""
    chosen = next(item["logger"] for item in load_mapping(paths.configs_dir() / "config.yaml")["defaults"]
                  if isinstance(item, dict) and "logger" in item)  # fmt: skip
    node = load_choice("logger", chosen)
    if node.get("_target_") is None:
        return ok("W&B", f"logger={chosen}: runs do not log to W&B")
    is_offline, key = bool(node.get("offline")), _wandb_key()
    how = "runs log offline, and `dlm sync` uploads them" if is_offline else "runs log online"
    if key is not None:
        return ok("W&B", f"{how}; an API key is in {key}")
    state = warning if is_offline else failed
    return state("W&B", f"{how}; no API key is found", "run `wandb login`, set WANDB_API_KEY, or use logger=none")


def _wandb_key() -> str | None:
    """Return where an API key for W&B's server is found; None if nowhere."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return str(path) if netrc.netrc(str(path)).authenticators(host) else None
    except (OSError, netrc.NetrcParseError):
        return None
