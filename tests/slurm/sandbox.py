"""sandbox: a whole SLURM cluster on this machine's loopback, for as long as a command runs.

    python tests/slurm/sandbox.py [--install] [--nodes 3] [COMMAND ...]

Boots munged, MariaDB, slurmdbd, slurmctld and a slurmd for every node out of one temporary folder, runs the command
(without one, a shell) with SLURM_CONF set, and takes everything down again. Needs root and Debian's packages
slurm-wlm, slurmdbd, munge and mariadb-server (--install fetches those that are absent). Ports and names are its own,
so that several run side by side.

Partitions: low, which is preempted and requeued at once; grace, the same with 20 s of warning; high, which preempts;
short, of jobs of two minutes.
Every node has 4 CPUs, 16 GB and 2 GPUs that exist in the books only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
HOSTS = Path("/etc/hosts")
NO_QUESTIONS = {"DEBIAN_FRONTEND": "noninteractive"}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class SandboxError(Exception):
    """What keeps a sandbox from standing, in one line."""


@dataclass(frozen=True)
class Sandbox:
    """A cluster that stands. ``env`` is what its commands need; ``nodes`` are its node names."""

    folder: Path
    nodes: tuple[str, ...]
    env: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]]

    def __call__(self, *command: str, check: bool = True) -> str:
        """The output of a SLURM command."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=60)
        if check and done.returncode:
            raise SandboxError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def stop(self, name: str, *, how: signal.Signals = signal.SIGTERM) -> None:
        """End one daemon (slurmdbd, a node) by its pid."""
        process = self.processes.pop(name)
        process.send_signal(how)
        process.wait(30)

    def start(self, name: str) -> None:
        """Start slurmdbd, slurmctld or the slurmd of a node (again)."""
        command = ("slurmd", "-D", "-N", name) if name in self.nodes else (name, "-D")
        _start(self, name, *command)


def absent_packages() -> list[str]:
    """The Debian packages that are not installed."""
    return sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=PATH)})


def missing() -> str | None:
    """What this machine lacks, in one line."""
    if os.geteuid() != 0:
        return "the SLURM sandbox needs root: its daemons start jobs for users"
    absent = absent_packages()
    return f"the SLURM sandbox needs {', '.join(absent)}: apt-get install {' '.join(absent)}" if absent else None


def install() -> None:
    """Fetch the packages that are absent. Raises SandboxError with apt-get's words."""
    absent = absent_packages()
    if not absent or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return  # ``missing`` says what is wrong
    print(f"installing {', '.join(absent)} ...", flush=True)
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *absent]):
        done = subprocess.run(["apt-get", "--quiet", "--quiet", *command], env={**os.environ, **NO_QUESTIONS},
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode and command != ["update"]:
            raise SandboxError(f"apt-get {' '.join(command)} failed: {' '.join(done.stderr.split())}")


@contextlib.contextmanager
def sandbox(nodes: int = 3, *, options: str = "") -> Iterator[Sandbox]:
    """A cluster for the length of the block; ``options`` are more lines of slurm.conf. Raises SandboxError."""
    reason = missing()
    if reason is not None:
        raise SandboxError(reason)
    folder = Path(tempfile.mkdtemp(prefix="dlm-slurm-", dir="/tmp"))  # short: a socket's path has 107 characters
    name = folder.name.removeprefix("dlm-slurm-").lower().replace("_", "x")
    names = tuple(f"{name}-n{place}" for place in range(1, nodes + 1))
    env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = Sandbox(folder, names, env, {})
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM too takes the cluster down
    try:
        _change_hosts(add=_host_line(cluster))
        _boot(cluster, name, options)
        yield cluster
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _take_down(cluster)
        signal.signal(signal.SIGTERM, before)


def _boot(cluster: Sandbox, name: str, options: str) -> None:
    folder, ports = cluster.folder, _free_ports(3 + len(cluster.nodes))
    database_port, slurmdbd_port, slurmctld_port, *node_ports = ports
    password = secrets.token_hex(8)
    for part in ("database", "database_temporary", "state", "spool", "log"):
        (folder / part).mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    _write(folder / "slurm.conf", _slurm_conf(folder, name, cluster.nodes, slurmdbd_port, slurmctld_port, node_ports))
    with open(folder / "slurm.conf", "a") as stream:
        stream.write(options + "\n")
    for place in range(2):
        (folder / f"gpu{place}").touch()  # SLURM counts the files
    _write(folder / "gres.conf", f"Name=gpu File={folder}/gpu[0-1]\n")
    _write(folder / "slurmdbd.conf", _slurmdbd_conf(folder, slurmdbd_port, database_port, password), mode=0o600)

    _start(cluster, "munged", "munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
           f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed",
           f"--log-file={folder}/log/munged.log")  # fmt: skip
    # MariaDB servers that begin at once use the same names in /tmp, and one of them may fail.
    places = (f"--datadir={folder}/database", f"--tmpdir={folder}/database_temporary")
    database = ("--no-defaults", *places, "--user=root")
    made = subprocess.run(
        ["mariadb-install-db", *database, "--auth-root-authentication-method=normal", "--skip-test-db"],
        env=cluster.env, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if made.returncode:
        raise SandboxError(f"mariadb-install-db failed: {' '.join(made.stdout.split())}")
    _write(folder / "users.sql", f"CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '{password}';\n"
                                 "GRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n")  # fmt: skip
    _start(cluster, "mariadbd", "mariadbd", *database, f"--port={database_port}", "--bind-address=127.0.0.1",
           "--skip-name-resolve", "--innodb-buffer-pool-size=64M", f"--socket={folder}/database.socket",
           f"--pid-file={folder}/mariadbd.pid", f"--init-file={folder}/users.sql")  # fmt: skip
    _until(cluster, "mariadbd", lambda: _listens(database_port))
    _until(cluster, "munged", (folder / "munge.socket").exists)
    cluster.start("slurmdbd")
    _until(cluster, "slurmdbd", lambda: _listens(slurmdbd_port))
    cluster("sacctmgr", "-i", "add", "cluster", name)
    cluster("sacctmgr", "-i", "add", "account", "lab")
    cluster("sacctmgr", "-i", "add", "user", "root,nobody", "account=lab")
    cluster.start("slurmctld")
    _until(cluster, "slurmctld", lambda: _listens(slurmctld_port))
    for node in cluster.nodes:
        cluster.start(node)
    _until(cluster, "slurmctld", lambda: _all_idle(cluster))


def _slurm_conf(
    folder: Path, name: str, nodes: tuple[str, ...], slurmdbd_port: int, slurmctld_port: int, node_ports: list[int]
) -> str:
    host = socket.gethostname()
    # cred_expire is also how long a requeued job waits before it may start again: 120 s by default.
    lines = [
        f"ClusterName={name}", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={slurmctld_port}",
        "SlurmUser=root", "AuthType=auth/munge", f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
        "CredType=cred/munge", f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log", f"SlurmdLogFile={folder}/log/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "MpiDefault=none", "ReturnToService=2",
        "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core", "SlurmdParameters=config_overrides",
        "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE", "JobRequeue=1",
        "SlurmctldParameters=preempt_send_user_signal", "SchedulerType=sched/backfill",
        "SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2", "KillWait=5", "MinJobAge=300",
        # Lightning derives the port of a job from its id. Two sandboxes should not use the same ids, and rarely do.
        f"FirstJobId={1 + secrets.randbelow(100) * 100}",
        "SlurmctldTimeout=10", "SlurmdTimeout=10", "InactiveLimit=0", "GresTypes=gpu", "MaxArraySize=1001",
        "AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={slurmdbd_port}", f"AccountingStoragePass={folder}/munge.socket",
        "AccountingStorageEnforce=limits", "AccountingStoreFlags=job_comment", "AccountingStorageTRES=gres/gpu",
        "JobAcctGatherType=jobacct_gather/none",
    ]  # fmt: skip
    lines += [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=16000 Gres=gpu:2"
        for node, port in zip(nodes, node_ports, strict=True)
    ]
    shared = f"Nodes={','.join(nodes)} State=UP MaxTime=INFINITE"
    lines += [
        f"PartitionName=low {shared} PriorityTier=1 Default=YES",
        f"PartitionName=grace {shared} PriorityTier=1 GraceTime=20",
        f"PartitionName=high {shared} PriorityTier=10 PreemptMode=OFF",
        f"PartitionName=short {shared.replace('INFINITE', '2')} PriorityTier=1",
    ]
    return "\n".join(lines) + "\n"


def _slurmdbd_conf(folder: Path, port: int, database_port: int, password: str) -> str:
    return "\n".join(
        ["AuthType=auth/munge", f"AuthInfo=socket={folder}/munge.socket", "DbdHost=localhost", "DbdAddr=127.0.0.1",
         f"DbdPort={port}", "SlurmUser=root", f"LogFile={folder}/log/slurmdbd.log", f"PidFile={folder}/slurmdbd.pid",
         "StorageType=accounting_storage/mysql", "StorageHost=127.0.0.1", f"StoragePort={database_port}",
         "StorageUser=slurm", f"StoragePass={password}", "StorageLoc=slurm", ""]
    )  # fmt: skip


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.touch(mode=mode)
    path.chmod(mode)
    path.write_text(text)


def _start(cluster: Sandbox, name: str, *command: str) -> None:
    with open(cluster.folder / "log" / f"{name}.out", "ab") as stream:
        cluster.processes[name] = subprocess.Popen(
            command, env=cluster.env, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )


def _until(cluster: Sandbox, name: str, condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until ``condition`` holds. Raises SandboxError with the end of the daemon's log when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if cluster.processes[name].poll() is not None or time.monotonic() > deadline:
            logs = sorted((cluster.folder / "log").glob(f"{name}*"))
            said = " / ".join(line for log in logs for line in log.read_text(errors="replace").splitlines()[-3:])
            raise SandboxError(f"{name} does not come up: {said}")
        time.sleep(0.1)


def _all_idle(cluster: Sandbox) -> bool:
    return cluster("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * len(cluster.nodes)


def _host_line(cluster: Sandbox) -> str:
    return f"\n127.0.0.1 {' '.join(cluster.nodes)} # {cluster.folder}"


def _change_hosts(*, add: str = "", remove: str = "") -> None:
    """Add a line to /etc/hosts or remove one. A lock keeps sandboxes that begin or end at once from losing lines."""
    with open(HOSTS, "r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        kept = stream.read().replace(remove, "") if remove else stream.read()
        stream.seek(0)  # the file is never empty, because other processes look names up in it
        stream.write(kept + add)
        stream.truncate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _take_down(cluster: Sandbox) -> None:
    """End the jobs, then the daemons, each by its pid; remove the folder and the names."""
    if "slurmctld" in cluster.processes:
        cluster("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        cluster("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and cluster("squeue", "-h", check=False).strip():
            time.sleep(0.2)
    for process in reversed(list(cluster.processes.values())):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _change_hosts(remove=_host_line(cluster))
    shutil.rmtree(cluster.folder)


def main() -> int:
    """Boot, run the command, take down; the command's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    command = given.command or [os.environ.get("SHELL", "bash")]
    try:
        if given.install:
            install()
        with sandbox(given.nodes) as cluster:
            print(f"SLURM stands: nodes {', '.join(cluster.nodes)}; partitions low, grace, high, short.",
                  "SLURM_CONF is set. It goes when this command ends.", flush=True)  # fmt: skip
            return subprocess.run(command, env=cluster.env, check=False).returncode
    except SandboxError as error:
        print(f"dlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
