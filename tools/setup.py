"""Make a virtual environment with dlm and everything that it needs. `make setup` runs this.

uv installs the packages if it is there and works, because it is fast and chooses the build of torch that fits the
machine. Otherwise pip does. A torch that is already in the environment stays.
"""

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
DLM = f"{ROOT}[dev]"
OLDEST_PYTHON = (3, 11)
NVIDIA = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia"), Path("/dev/dxg"))  # the last one in WSL
_TORCH = re.compile(r"^torch==(\S+)$", re.MULTILINE)


def run(*words: str) -> None:
    """Run a command whose output is for the user.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    subprocess.run(words, check=True)


def torch_in(python: Path) -> str:
    """Return the version of torch that an environment has, as in '2.13.0+cu130'; '' without torch."""
    ask = "from importlib.metadata import version; print(version('torch'))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.strip()


def pins(kept_torch: str) -> str:
    """Return the lines of constraints.txt, with the version of the torch that stays, if one is there."""
    lines = CONSTRAINTS.read_text()
    return _TORCH.sub(f"torch=={kept_torch}", lines) if kept_torch else lines


def advise_on_torch() -> None:
    """Say how to avoid CUDA packages, if this machine cannot use those that pip is about to download."""
    is_served_with_cuda = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
    if is_served_with_cuda and not any(path.exists() for path in NVIDIA):
        print(
            "This machine has no NVIDIA driver. If pip now downloads gigabytes of CUDA packages, stop it: install uv, "
            "or give TORCH_INDEX (docs/set_up.md)."
        )


def install_with_uv(python: Path, constraints: str, *, has_torch: bool) -> bool:
    """Install with uv. Returns whether it is there and worked."""
    uv = shutil.which("uv")
    if uv is None:
        return False
    chosen = [] if has_torch else ["--torch-backend=auto"]
    words = [uv, "pip", "install", "--quiet", f"--python={python}", *chosen, "--constraint", constraints]
    done = subprocess.run([*words, "--editable", DLM], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"uv could not install the packages, so pip does. uv said:\n{done.stderr.strip()}")
    return done.returncode == 0


def install_with_pip(python: Path, constraints: str) -> None:
    """Install with pip: first the pins as they are, without resolving them; then what is missing, if anything is.

    constraints.txt is written for one version of Python and one platform. Elsewhere, packages may be missing from it,
    and a pin may have no file; then pip resolves the requirements, which takes longer.
    """
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # Python compiles a module when it is first imported; pip would compile all of them.
    install = [*pip, "install", "--no-compile"]
    pinned = subprocess.run([*install, "--no-deps", "--requirement", constraints], stderr=subprocess.PIPE, text=True)
    if pinned.returncode == 0:
        run(*install, "--no-deps", "--editable", DLM)
        if subprocess.run([*pip, "check"], stdout=subprocess.DEVNULL).returncode == 0:
            return
        print("constraints.txt was not written for this Python or this platform: pip adds what is missing from it ...")
    else:
        print(f"pip resolves the requirements, because the pins alone cannot be installed:\n{pinned.stderr.strip()}")
    run(*install, "--constraint", constraints, "--editable", DLM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="the folder of the environment")
    parser.add_argument("--torch-index", default="", help="the package index from which torch comes")
    options = parser.parse_args()
    python = options.venv / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", str(options.venv))
    print(f"installing dlm and its libraries into {options.venv} ...", flush=True)
    kept = torch_in(python)
    if options.torch_index and not kept:
        version = _TORCH.search(CONSTRAINTS.read_text())
        assert version is not None, "constraints.txt pins torch"
        index = f"--index-url={options.torch_index}"
        run(str(python), "-m", "pip", "install", "--quiet", "--no-compile", index, version[0])
        kept = torch_in(python)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(pins(kept))
        constraints.flush()
        if not install_with_uv(python, constraints.name, has_torch=bool(kept)):
            if not kept:
                advise_on_torch()
            install_with_pip(python, constraints.name)


if __name__ == "__main__":
    if sys.version_info < OLDEST_PYTHON:
        found, wanted = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
        print(f"dlm needs Python {wanted} or newer, {sys.executable} is {found}: give PYTHON=", file=sys.stderr)
        sys.exit(2)
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the program has said why
