"""Run dlm with the oldest versions that pyproject.toml allows, of all packages but torch, and list these versions.

`make test-oldest` runs this. It installs the versions into a virtual environment of its own, trains a run and a small
sweep, and runs the tests that use the packages most. tools/oldest.txt lists the versions with which all of this last
worked; tests/test_dependencies.py compares it with pyproject.toml. The packages that only other packages require are
as new as these allow. The packages of the extra 'dev' are not tried, because dlm runs without them.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRIED = ROOT / "tools" / "oldest.txt"
EXTRAS = ("hub", "notebook")
PYTHON = (3, 11)  # the oldest that dlm runs on; old versions of packages have no builds for much newer ones
CUDA_ONLY = re.compile(r"(cuda|nvidia)-|triton$")  # as in tools/lock.py
HEADER = """\
# Written by `make test-oldest`: the versions with which it last worked (CPython 3.11). Of the packages that
# pyproject.toml names, these are the oldest that it allows, except torch.
"""
RUN = ["-m", "dlm.launch", "experiment=debug", "training.steps=40", "validation.num_sequences=16"]
SWEEP = ["-m", "dlm.cli", "sweep", "smoke", "--launcher", "submitit_local", "--yes",
         "--set", "models=[4k,19k]", "--budget", "1e10", "--budget", "2e10"]  # fmt: skip
# What they use: pydantic, safetensors, submitit and cloudpickle, Hydra, tokenizers and sentencepiece and zstandard,
# datasets, typer and rich, pandas and pyarrow, W&B, scipy, jinja2 and matplotlib, the packages of notebooks.
TESTS = (
    "tests/plan/test_wrong_definitions.py",
    "tests/convert",
    "tests/submit/test_executor.py",
    "tests/submit/test_hydra.py",
    "tests/data/test_prepare_tokens.py",
    "tests/data/test_prepare_hub.py",
    "tests/cli/test_verbs.py",
    "tests/collect/test_collect.py",
    "tests/collect/test_wandb_file.py",
    "tests/fit/test_laws.py",
    "tests/report/test_report.py::test_the_page_stands_alone",
    "tests/test_notebooks.py",
)


def resolve(uv: str) -> str:
    """Return the versions as lines NAME==VERSION; torch has the version of constraints.txt."""
    torch = re.findall(r"^torch==\S+\n", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        fixed = Path(folder, "fixed")
        fixed.write_text("".join(torch))
        command = [uv, "pip", "compile", "pyproject.toml", "--resolution", "lowest-direct", "--constraints", str(fixed)]
        command += [word for extra in EXTRAS for word in ("--extra", extra)]
        command += ["--python-version", "3.11", "--python-platform", "linux", "--no-header", "--no-annotate", "--quiet"]
        answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return "".join(f"{line}\n" for line in answer.splitlines() if not CUDA_ONLY.match(line.partition("==")[0]))


def install(folder: Path, versions: str) -> Path:
    """Install dlm and these versions into a new virtual environment, and return its Python."""
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    with tempfile.TemporaryDirectory() as temporary:
        fixed = Path(temporary, "fixed")
        fixed.write_text(versions)
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", fixed]
        subprocess.run([*command, "--editable", f".[{','.join(EXTRAS)}]", "pytest", "hypothesis"], cwd=ROOT, check=True)
    return python


def try_them(python: Path) -> None:
    """Train a run and a sweep, and run the tests. Raises CalledProcessError if one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"DLM_WORKDIR": f"{folder}/workdir", "DLM_DATA": f"{folder}/data", "PYTHONPATH": str(ROOT)}
        path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
        environment = {**os.environ, **own, "PATH": path}
        subprocess.run([python, *RUN], cwd=ROOT, env=environment, check=True)
        subprocess.run([python, *SWEEP], cwd=ROOT, env=environment, check=True)
        subprocess.run(
            [python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS], cwd=ROOT, env=environment, check=True
        )


def main() -> None:
    """Resolve, install, try, and write the list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", default="uv", help="the program uv")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-oldest", help="the virtual environment to make")
    options = parser.parse_args()
    if sys.version_info[:2] != PYTHON:
        sys.exit("the oldest versions are tried with the oldest Python: make test-oldest PYTHON=python3.11")
    try:
        versions = resolve(options.uv)
        print(f"installing the oldest versions into {options.venv} ...", flush=True)
        try_them(install(options.venv.absolute(), versions))
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed: {' '.join(map(str, error.cmd[:8]))} ...; raise the floor in pyproject.toml, or mend dlm")
    TRIED.write_text(HEADER + versions)
    print(f"all of it works; {TRIED.relative_to(ROOT)} lists the versions")


if __name__ == "__main__":
    main()
