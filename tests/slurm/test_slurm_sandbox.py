"""The sandbox stands, beside another one, and goes without a trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm
SCRIPT = Path(__file__).parent / "sandbox.py"


def test_two_sandboxes_side_by_side_and_no_trace(cluster):
    other = subprocess.run([sys.executable, SCRIPT, "--nodes", "1", "bash", "-c", "srun hostname && exit 7"],
                           capture_output=True, text=True, check=False, timeout=120)  # fmt: skip
    assert other.returncode == 7, other.stderr
    folder = other.stdout.split("SLURM stands: nodes ")[1].split("-n1")[0]
    assert not list(Path("/tmp").glob(f"dlm-slurm-{folder}*"))
    hosts = Path("/etc/hosts").read_text()
    assert folder not in hosts and all(node in hosts for node in cluster.nodes)
    assert cluster("srun", "-N3", "-n3", "echo", "here").split() == ["here"] * 3


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
