"""Ask SLURM which partitions and limits a cluster has, and what a user may use of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dlm.core import text
from dlm.submit.slurm_commands import output, printed
from dlm.submit.slurm_tasks import minutes

_GPUS = re.compile(r"(?:^|,)gpu:(?:[^:,(]+:)?(\d+)")  # gpu:2, gpu:a100:8(S:0-1)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition as sinfo shows it."""

    name: str
    is_default: bool
    is_up: bool
    limit: str  # its time limit in SLURM's words
    num_nodes: int
    num_gpus: int  # of all its nodes

    def __str__(self) -> str:
        limit_min = minutes(self.limit)
        limit = "no time limit" if limit_min is None else f"at most {text.duration(60 * limit_min)}"
        nodes = f"{self.num_nodes} node{'s' if self.num_nodes != 1 else ''}"
        gpus = f"{self.num_gpus} GPU{'s' if self.num_gpus != 1 else ''}" if self.num_gpus else "no GPU"
        return f"{self.name}{' (default)' if self.is_default else ''}: {nodes}, {gpus}, {limit}"


@dataclass(frozen=True, kw_only=True)
class Association:
    """What the accounting of a cluster lets a user do with one account."""

    account: str
    partition: str  # empty: all partitions
    qos: tuple[str, ...]
    max_jobs: int | None  # how many jobs may run at once; None: no limit of this user
    max_submitted: int | None  # how many jobs may wait and run at once


def partitions() -> list[Partition]:
    """Return the partitions that the user sees. Raises UserError with the words of sinfo if it fails."""
    found: dict[str, Partition] = {}
    for line in output(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%G"]).splitlines():
        if line.count("|") != 4:
            continue
        star, up, limit, nodes, gres = (word.strip() for word in line.split("|"))
        name, num_nodes = star.rstrip("*"), int(nodes)
        before = found.get(name)  # a partition has a row for each kind of node
        found[name] = Partition(
            name=name,
            is_default=star.endswith("*"),
            is_up=up == "up",
            limit=limit,
            num_nodes=num_nodes + (before.num_nodes if before else 0),
            num_gpus=num_nodes * gpus_in(gres) + (before.num_gpus if before else 0),
        )
    return list(found.values())


def gpus_in(gres: str) -> int:
    """Return the number of GPUs in generic resources of a node, as in gpu:a100:8."""
    return sum(int(count) for count in _GPUS.findall(gres))


def controllers_array_limit() -> int | None:
    """Return MaxArraySize of the controller; None if it does not say."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", printed(["scontrol", "show", "config"]))
    return int(found[1]) if found else None


def associations(user: str) -> list[Association]:
    """Return what a user may do with each account. Raises UserError with the words of sacctmgr if it fails."""
    columns = "format=Account,Partition,QOS,MaxJobs,MaxSubmitJobs"
    rows = output(["sacctmgr", "-nP", "show", "assoc", f"user={user}", columns]).splitlines()
    return [_association(*row.split("|")) for row in rows if row.count("|") == 4]


def _association(account: str, partition: str, qos: str, max_jobs: str, max_submitted: str) -> Association:
    return Association(
        account=account,
        partition=partition,
        qos=tuple(filter(None, qos.split(","))),
        max_jobs=_whole(max_jobs),
        max_submitted=_whole(max_submitted),
    )


def _whole(word: str) -> int | None:
    return int(word) if word.isdecimal() else None
