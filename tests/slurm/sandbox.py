"""sandbox: a whole SLURM cluster on this machine's loopback, for as long as a command runs.

    python tests/slurm/sandbox.py [--install] [--nodes 3] [COMMAND ...]

Boots munged, MariaDB, slurmdbd, slurmctld and a slurmd for every node out of one temporary folder, runs the command
(without one, a shell) with SLURM_CONF set, and takes everything down again. Needs root and Debian's packages
slurm-wlm, slurmdbd, munge and mariadb-server (--install fetches those that are absent). Ports and names are its own,
so that several run side by side. The daemons listen on 127.0.0.1 only, and they end with the process that started them,
even if it is killed (sandbox_owner.py).

Partitions: low, which is preempted and requeued at once; grace, the same with 20 s of warning; high, which preempts;
short, of jobs of two minutes.
Every node has 4 CPUs, 16 GB and 2 GPUs that exist in the books only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox_owner import MARK, SandboxError, add_hosts, clear_dead, name_of, owned_folder

PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
LOOPBACK = "127.0.0.1"
DATABASE_USER = "mysql"  # Debian's package makes this user and a group with the same name
NO_QUESTIONS = {"DEBIAN_FRONTEND": "noninteractive"}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


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

    def start(self, name: str, *command: str) -> None:
        """Start slurmdbd, slurmctld or the slurmd of a node (again), if need be by a command of the caller's."""
        usual = ("slurmd", "-D", "-N", name) if name in self.nodes else (name, "-D")
        _start(self, name, *(command or usual))


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
    clear_dead()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM too takes the cluster down
    try:
        with _host_on_loopback() as host, owned_folder() as folder:
            folder.chmod(0o755)  # other users may read slurm.conf and use the socket of munged
            name = name_of(folder)
            names = tuple(f"{name}-n{place}" for place in range(1, nodes + 1))
            env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
            cluster = Sandbox(folder, names, env, {})
            try:
                add_hosts(folder, names)
                _boot(cluster, name, host, options)
                yield cluster
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                _take_down(cluster)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _host_on_loopback() -> Iterator[str]:
    """Yield a host name for SLURM, whose programs listen on the address of the host's name.

    Where this address is not 127.0.0.1, this process and all that it starts have the host name localhost meanwhile.
    """
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = "unknown"
    if address == LOOPBACK:
        yield host
        return
    libc, new_name = ctypes.CDLL(None, use_errno=True), 0x04000000  # CLONE_NEWUTS
    own = os.open("/proc/thread-self/ns/uts", os.O_RDONLY)
    try:
        if libc.unshare(new_name):
            raise SandboxError(
                f"SLURM would listen on the address of this host, {host}, which is {address} and must be {LOOPBACK}: "
                f"add {LOOPBACK} {host} to /etc/hosts, before other lines with this name"
            )
        socket.sethostname("localhost")
        yield "localhost"
    finally:
        libc.setns(own, new_name)
        os.close(own)


def _boot(cluster: Sandbox, name: str, host: str, options: str) -> None:
    folder = cluster.folder
    slurmdbd_port, slurmctld_port = _configure(cluster, name, host, options)
    _start(cluster, "munged", "munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
           f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed",
           f"--log-file={folder}/log/munged.log")  # fmt: skip
    _start_database(cluster)
    _until(cluster, "munged", (folder / "munge.socket").exists)
    cluster.start("slurmdbd")
    _until(cluster, "slurmdbd", lambda: _listens((LOOPBACK, slurmdbd_port)))
    cluster("sacctmgr", "-i", "add", "cluster", name)
    cluster("sacctmgr", "-i", "add", "account", "lab")
    cluster("sacctmgr", "-i", "add", "user", "root,nobody", "account=lab")
    cluster.start("slurmctld")
    _until(cluster, "slurmctld", lambda: _listens((LOOPBACK, slurmctld_port)))
    for node in cluster.nodes:
        cluster.start(node)
    _until(cluster, "slurmctld", lambda: _all_idle(cluster))


def _configure(cluster: Sandbox, name: str, host: str, options: str) -> tuple[int, int]:
    """Write the files and make the folders of SLURM and munge. Returns the ports of slurmdbd and slurmctld."""
    folder = cluster.folder
    slurmdbd_port, slurmctld_port, *node_ports = _free_ports(2 + len(cluster.nodes))
    for part, mode in (("state", 0o700), ("log", 0o700), ("spool", 0o755)):
        (folder / part).mkdir(mode=mode)
    for place in range(2):
        (folder / f"gpu{place}").touch()  # SLURM counts the files
    conf = _slurm_conf(folder, name, host, cluster.nodes, slurmdbd_port, slurmctld_port, node_ports)
    _write(folder / "slurm.conf", f"{conf}{options}\n".encode(), mode=0o644)
    _write(folder / "gres.conf", f"Name=gpu File={folder}/gpu[0-1]\n".encode(), mode=0o644)
    _write(folder / "slurmdbd.conf", _slurmdbd_conf(folder, slurmdbd_port).encode())
    _write(folder / "munge.key", secrets.token_bytes(128))
    return slurmdbd_port, slurmctld_port


def _start_database(cluster: Sandbox) -> None:
    """Start MariaDB as its own user, with all its files and its socket in a folder that other users cannot enter.

    Only root is a client (slurmdbd), and MariaDB asks the kernel who is at the other end of the socket: there is no
    password. The server cannot write files for its clients, because the only folder for them belongs to root.
    """
    folder, no_files = cluster.folder / "database", cluster.folder / "no_files"
    no_files.mkdir(mode=0o700)
    for part in (folder, folder / "data", folder / "temporary"):  # in /tmp, several servers would use the same names
        part.mkdir(mode=0o700)
        shutil.chown(part, DATABASE_USER, DATABASE_USER)
    options = ("--no-defaults", f"--datadir={folder}/data", f"--tmpdir={folder}/temporary")
    made = subprocess.run(
        ["mariadb-install-db", *options, "--auth-root-authentication-method=socket", "--skip-test-db"],
        env=cluster.env, cwd=folder, check=False, user=DATABASE_USER, group=DATABASE_USER, extra_groups=[],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if made.returncode:
        raise SandboxError(f"mariadb-install-db failed: {' '.join(made.stdout.split())}")
    _start(cluster, "mariadbd", "mariadbd", *options, "--skip-networking", f"--socket={folder}/socket",
           f"--secure-file-priv={no_files}", "--local-infile=0", "--innodb-buffer-pool-size=64M",
           f"--pid-file={folder}/mariadbd.pid", user=DATABASE_USER)  # fmt: skip
    _until(cluster, "mariadbd", lambda: _listens(str(folder / "socket")))


def _slurm_conf(
    folder: Path,
    name: str,
    host: str,
    nodes: tuple[str, ...],
    slurmdbd_port: int,
    slurmctld_port: int,
    node_ports: list[int],
) -> str:
    # cred_expire is also how long a requeued job waits before it may start again: 120 s by default.
    lines = [
        f"ClusterName={name}", f"SlurmctldHost={host}({LOOPBACK})", f"SlurmctldPort={slurmctld_port}",
        "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",  # listen on the address of the host's name only
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
        "AccountingStorageType=accounting_storage/slurmdbd", f"AccountingStorageHost={LOOPBACK}",
        f"AccountingStoragePort={slurmdbd_port}", f"AccountingStoragePass={folder}/munge.socket",
        "AccountingStorageEnforce=limits", "AccountingStoreFlags=job_comment", "AccountingStorageTRES=gres/gpu",
        "JobAcctGatherType=jobacct_gather/none",
    ]  # fmt: skip
    lines += [
        f"NodeName={node} NodeHostname={host} NodeAddr={LOOPBACK} Port={port} CPUs=4 RealMemory=16000 Gres=gpu:2"
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


def _slurmdbd_conf(folder: Path, port: int) -> str:
    return "\n".join(
        ["AuthType=auth/munge", f"AuthInfo=socket={folder}/munge.socket", "DbdHost=localhost", f"DbdAddr={LOOPBACK}",
         f"DbdPort={port}", "CommunicationParameters=NoInAddrAny", "SlurmUser=root",
         f"LogFile={folder}/log/slurmdbd.log", f"PidFile={folder}/slurmdbd.pid",
         "StorageType=accounting_storage/mysql", "StorageHost=localhost", "StorageUser=root", "StorageLoc=slurm", ""]
    )  # fmt: skip


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a new file. Nobody else can read it at any moment unless ``mode`` says so."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode & 0o600), "wb") as stream:
        os.fchmod(stream.fileno(), mode)  # whatever the umask is
        stream.write(content)


def _start(cluster: Sandbox, name: str, *command: str, user: str | None = None) -> None:
    """Start a daemon, which the kernel kills when this process ends. The database client reads MYSQL_UNIX_PORT."""
    env = {**cluster.env, MARK: str(cluster.folder), "MYSQL_UNIX_PORT": f"{cluster.folder}/database/socket"}
    groups = None if user is None else ()
    with open(cluster.folder / "log" / f"{name}.out", "ab") as stream:
        cluster.processes[name] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], env=env, cwd=cluster.folder, stdin=subprocess.DEVNULL,
            stdout=stream, stderr=stream, start_new_session=True, user=user, group=user, extra_groups=groups,
        )  # fmt: skip


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


def _listens(address: tuple[str, int] | str) -> bool:
    """Whether a daemon accepts connections at a port, or at the path of a socket."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        return probe.connect_ex(address) == 0


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _take_down(cluster: Sandbox) -> None:
    """End the jobs, then the daemons, each by its pid. What is left then goes with the folder."""
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
