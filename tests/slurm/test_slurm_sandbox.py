"""The sandbox stands, beside another one, is closed to other users, and goes without a trace, even if it is killed."""

import os
import pwd
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import sandbox_owner
from sandbox_owner import HOSTS, LOCK, MARK, add_hosts, clear_dead, owned_folder, processes_of
from support.slurm_sweep import wait_for

pytestmark = pytest.mark.slurm
SCRIPT = Path(__file__).parent / "sandbox.py"
LOOPBACK = "0100007F"  # 127.0.0.1 in the tables of the kernel
OPEN = ("slurm.conf", "gres.conf", "gpu*", "*.pid", "spool/*/*")  # the files of a sandbox that every user may read


def as_user(name: str) -> dict:
    """Return the arguments of subprocess that run a command as another user."""
    user = pwd.getpwnam(name)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": "/"}


def run_as(name: str, *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], **as_user(name), capture_output=True, text=True, check=False)


def addresses_of(pids: list[int]) -> list[str]:
    """Return the addresses at which processes listen, in hexadecimal digits."""
    sockets = {str(file.readlink()) for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir()}
    found = []
    for table, listening in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = row.split()
            if words[3] == listening and f"socket:[{words[9]}]" in sockets:
                found.append(words[1].split(":")[0])
    return found


def closed_files(folder: Path, paths: list[str]) -> list[Path]:
    """Return those of ``paths`` that are files of a sandbox and that other users should not be able to read."""
    files = [Path(path).relative_to(folder) for path in paths if path.startswith(f"{folder}/")]
    assert Path("slurm.conf") in files
    return [file for file in files if not any(file.match(pattern) for pattern in OPEN)]


def daemons_of(folder: Path) -> set[str]:
    """Return the names of the processes of a sandbox, without those of its jobs."""
    names = subprocess.run(["ps", "-o", "comm=", *map(str, processes_of(folder))], capture_output=True, text=True)
    return {*names.stdout.split()} - {"slurmstepd", "slurm_script", "sleep"}


@contextmanager
def a_sandbox(*before: str):
    """Yield the process of a sandbox in which a job runs, and the sandbox's folder. At the end, the process is killed.

    Its command is killed with it, as when all processes of a terminal are killed.
    """
    script = (
        "sbatch --output=/dev/null --wrap 'sleep 600'; until squeue -h -o %T | grep -q RUNNING; do sleep 0.1; done; "
        'echo "folder ${SLURM_CONF%/*}"; exec sleep 600'
    )
    command = [*before, sys.executable, str(SCRIPT), "--nodes", "1", "bash", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            line = next(line for line in process.stdout if line.startswith("folder "))
            yield process, Path(line.split()[1])
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def another_user_looks(written: Path):
    """During the block, another user lists again and again the files of sandboxes that this user can read."""
    loop = "while :; do find /tmp/dlm-slurm-* -type f -readable; done"
    with open(written, "w") as stream, subprocess.Popen(["sh", "-c", loop], **as_user("nobody"), stdout=stream,
                                                        stderr=subprocess.DEVNULL) as looking:  # fmt: skip
        try:
            yield
        finally:
            looking.kill()


def test_two_sandboxes_side_by_side_and_no_trace(cluster):
    other = subprocess.run([sys.executable, SCRIPT, "--nodes", "1", "bash", "-c", "srun hostname && exit 7"],
                           capture_output=True, text=True, check=False, timeout=120)  # fmt: skip
    assert other.returncode == 7, other.stderr
    folder = other.stdout.split("SLURM stands: nodes ")[1].split("-n1")[0]
    assert not list(Path("/tmp").glob(f"dlm-slurm-{folder.replace('x', '?')}"))  # a node's name has x in place of _
    hosts = HOSTS.read_text()
    assert folder not in hosts and all(node in hosts for node in cluster.nodes)
    assert cluster("srun", "-N3", "-n3", "echo", "here").split() == ["here"] * 3


def test_daemons_and_clients_listen_on_loopback_only(cluster):
    with subprocess.Popen(["srun", "-N3", "-n3", "sleep", "600"], env=cluster.env) as srun:
        try:
            wait_for(lambda: cluster("squeue", "-h", "--steps", "-o", "%j").split() == ["sleep"])
            daemons, client = addresses_of(processes_of(cluster.folder)), addresses_of([srun.pid])
            assert len(daemons) == 5 and len(client) >= 2  # slurmdbd, slurmctld and three slurmd
            assert {*daemons, *client} == {LOOPBACK}
        finally:
            cluster("scancel", "--name=sleep")


def test_other_users_cannot_use_the_database_or_write_files_with_it(cluster):
    server = Path(f"/proc/{cluster.processes['mariadbd'].pid}")
    (uids,) = (line for line in (server / "status").read_text().splitlines() if line.startswith("Uid:"))
    assert {int(uid) for uid in uids.split()[1:]} == {pwd.getpwnam("mysql").pw_uid}
    (socket,) = (word for word in (server / "cmdline").read_text().split("\0") if word.startswith("--socket="))
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        query = ("mariadb", "--no-defaults", socket, "--user=root", f"--execute=select 1 into outfile '{folder}/file'")
        assert "Can't connect" in run_as("nobody", *query).stderr
        assert "Access denied" in run_as("mysql", *query).stderr  # this user can reach the socket
        assert "--secure-file-priv" in run_as("root", *query).stderr
        assert not os.listdir(folder)


def test_other_users_cannot_read_the_files_of_a_sandbox(cluster):
    files = run_as("nobody", "find", cluster.folder, "-type", "f", "-readable").stdout.splitlines()
    assert closed_files(cluster.folder, files) == []


def test_a_killed_sandbox_leaves_nothing(tmp_path):
    """The guard of the first one is killed too: the kernel ends the daemons, and the next start clears the rest."""
    with a_sandbox() as (_, first):
        assert daemons_of(first) >= {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"}
        guard = subprocess.run(["pgrep", "-f", f"sandbox_owner.py {first}"], capture_output=True, text=True, check=True)
        os.kill(int(guard.stdout), signal.SIGKILL)
    wait_for(lambda: not daemons_of(first), seconds=60)
    assert processes_of(first) and str(first) in HOSTS.read_text() and first.is_dir()

    # Another user looks at the second one from its beginning, and the name of its host is not one of 127.0.0.1.
    elsewhere = ("unshare", "--uts", "sh", "-c", 'hostname elsewhere.invalid && exec "$0" "$@"')
    with another_user_looks(tmp_path / "seen"), a_sandbox(*elsewhere) as (_, second):
        assert not processes_of(first) and str(first) not in HOSTS.read_text() and not first.exists()
        assert set(addresses_of(processes_of(second))) == {LOOPBACK}
    assert closed_files(second, (tmp_path / "seen").read_text().splitlines()) == []
    wait_for(lambda: not second.exists(), seconds=60)
    assert not processes_of(second) and str(second) not in HOSTS.read_text()


def test_only_what_belongs_to_a_dead_sandbox_of_this_user_is_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox_owner, "FOLDERS", tmp_path)
    monkeypatch.setattr(sandbox_owner, "HOSTS", tmp_path / "hosts")
    dead, foreign, unlocked, link, gone = (tmp_path / f"dlm-slurm-{name}" for name in ("d", "f", "u", "l", "g"))
    for folder in (dead, foreign, unlocked):
        folder.mkdir()
    for folder in (dead, foreign):
        (folder / LOCK).touch()
    os.chown(foreign, pwd.getpwnam("nobody").pw_uid, -1)
    link.symlink_to(unlocked)
    kept = "127.0.0.1 localhost\n127.0.0.1 d-n1 # of another program"
    (tmp_path / "hosts").write_text(kept)
    with owned_folder() as living:
        for folder in (dead, gone, living):
            add_hosts(folder, (f"{folder.name}-n1",))
        marks = [{MARK: str(dead)}, {"SLURMD_NODENAME": "d-n1"}, {MARK: str(living)}, {MARK: str(foreign)}]
        processes = [subprocess.Popen(["sleep", "600"], env=mark) for mark in marks]
        try:
            clear_dead()
            assert [process.wait(60) for process in processes[:2]] == [-signal.SIGKILL] * 2
            assert [process.poll() for process in processes[2:]] == [None] * 2
            assert not dead.exists() and all(folder.exists() for folder in (foreign, unlocked, link, living))
            assert (tmp_path / "hosts").read_text() == f"{kept}\n127.0.0.1 {living.name}-n1 # {living}\n"
        finally:
            for process in processes:
                process.kill()
                process.wait()
    assert not living.exists() and (tmp_path / "hosts").read_text() == f"{kept}\n"


def test_a_host_name_that_must_not_change_and_is_not_on_loopback_is_refused_in_one_line():
    without_the_right = 'hostname elsewhere.invalid && exec setpriv --bounding-set=-sys_admin "$0" "$@"'
    done = subprocess.run(["unshare", "--uts", "sh", "-c", without_the_right, sys.executable, SCRIPT, "true"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "dlm: SLURM would listen on the address of this host, elsewhere.invalid, which is unknown "
        "and must be 127.0.0.1: add 127.0.0.1 elsewhere.invalid to /etc/hosts, before other lines with this name\n"
    )


def test_missing_packages_are_named_in_one_line(tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import sandbox; sandbox.PATH = {str(tmp_path)!r}; "
    done = subprocess.run([sys.executable, "-c", code + "sys.argv = ['sandbox', 'true']; sys.exit(sandbox.main())"],
                          env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "dlm: the SLURM sandbox needs mariadb-server, munge, slurm-wlm, slurmdbd: "
        "apt-get install mariadb-server munge slurm-wlm slurmdbd\n"
    )
