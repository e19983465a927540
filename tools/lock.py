"""Resolve dlm[dev] with uv, and write every package of the answer to constraints.txt and requirements.lock.

`make lock` runs this. A package keeps the version that constraints.txt gives it as long as pyproject.toml allows it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
LOCK = ROOT / "requirements.lock"
TARGET = ["--python-version", "3.11", "--python-platform", "linux"]  # linux: on x86-64
CUDA_ONLY = re.compile(r"(cuda|nvidia)-|triton$")  # what only a CUDA build of torch requires
_PACKAGE = re.compile(r"^([a-z0-9.-]+)(==\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)

CONSTRAINTS_HEADER = """\
# Written by `make lock`: every package that `make setup` installs, in the version that was tested (CPython 3.11, Linux
# on x86-64). Only the version of torch is edited here by hand. It names no build (such as +cpu): on a GPU machine,
# install the build that fits its driver first, because a plain 'pip install torch' takes several gigabytes of CUDA
# packages. Packages that only a CUDA build of torch requires (cuda-*, nvidia-*, triton) are not listed, and neither is
# flash-attn (the extra 'flash'), which has to be compiled on the machine that uses it.
"""
LOCK_HEADER = """\
# Written by `make lock` for CPython 3.11 on Linux on x86-64: the packages of constraints.txt, with the hashes of all
# files of each version. torch is left out, since its build differs by machine. To install from this file:
#   pip install --no-deps --require-hashes --requirement requirements.lock
#   pip install --constraint constraints.txt torch
#   pip install --no-deps --editable .
"""


def resolve(uv: str, upgrade: str | None) -> str:
    """Return uv's answer: the pins of dlm[dev] with their hashes.

    Args:
        uv: The program.
        upgrade: The name of a package to update to its newest version, or 'all', or None for none. torch is never
            updated: its version must be one that the machines' drivers support.
    """
    pins = CONSTRAINTS.read_text()
    with tempfile.TemporaryDirectory() as folder:
        answer, fixed = Path(folder, "answer"), Path(folder, "fixed")
        answer.write_text(pins)  # uv keeps the versions that it finds in its output file
        fixed.write_text("".join(re.findall(r"^torch==\S+\n", pins, re.MULTILINE)))
        command = [uv, "pip", "compile", "pyproject.toml", "--extra", "dev", *TARGET]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
        command += ["--constraints", str(fixed), "--output-file", str(answer)]
        if upgrade:
            command += ["--upgrade"] if upgrade == "all" else ["--upgrade-package", upgrade]
        ended = subprocess.run(command, cwd=ROOT)
        if ended.returncode:
            sys.exit(ended.returncode)
        return answer.read_text()


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", default="uv", help="the program uv")
    parser.add_argument("--upgrade", metavar="NAME", help="update this package, or 'all'")
    options = parser.parse_args()
    answer = resolve(options.uv, options.upgrade)
    packages = _PACKAGE.findall(answer)
    if rest := _PACKAGE.sub("", answer).strip():
        sys.exit(f"uv's answer holds something that is no pin with hashes: {rest.splitlines()[0]!r}")
    kept = sorted(package for package in packages if not CUDA_ONLY.match(package[0]))
    CONSTRAINTS.write_text(CONSTRAINTS_HEADER + "".join(f"{name}{version}\n" for name, version, _ in kept))
    LOCK.write_text(LOCK_HEADER + "".join(f"{''.join(package)}\n" for package in kept if package[0] != "torch"))
    print(f"{CONSTRAINTS.name} pins {len(kept)} packages; {LOCK.name} holds their hashes, without torch's")


if __name__ == "__main__":
    main()
