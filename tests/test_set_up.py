"""What tools/setup.py hands to uv and to pip, shown by stand-ins that write down the words they are given.

`make setup`, which every check of this project begins with, shows that the real programs do what they are told.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

TOOL = ROOT / "tools/setup.py"
PYTHON = """\
#!/bin/bash
if [[ $1 == -c ]]; then cat "$0.torch" 2>/dev/null; exit 0; fi
shift 2
echo "pip $*" >> "$LOG"
for word; do if [[ -f $word ]]; then grep '^torch==' "$word" >> "$LOG"; fi; done
if [[ $* == *--index-url* ]]; then echo 2.13.0+cpu > "$0.torch"; fi
if [[ $* == *" check" ]]; then exit ${MISSING:-0}; fi
if [[ $* == *--no-deps*--requirement* ]]; then exit ${NO_PINS:-0}; fi
exit 0
"""
UV = """\
#!/bin/bash
echo "uv $*" >> "$LOG"
for word; do if [[ -f $word ]]; then grep '^torch==' "$word" >> "$LOG"; fi; done
if [[ -n $UV_FAILS ]]; then echo "no torch for you" >&2; exit 1; fi
"""
PINS, RESOLVED = "install --no-compile --no-deps --requirement", "install --no-compile --constraint"


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def set_up(tmp_path: Path):
    """Run the tool on an environment that holds ``torch``; return what was called and what was printed."""

    def call(*words: str, torch: str = "", uv: bool = False, **environment: str) -> tuple[list[str], str]:
        program(tmp_path / "venv/bin/python", PYTHON)
        if torch:
            (tmp_path / "venv/bin/python.torch").write_text(f"{torch}\n")
        if uv:
            program(tmp_path / "path/uv", UV)
        log, own = tmp_path / "log", {"PATH": f"{tmp_path / 'path'}:/usr/bin:/bin", "LOG": str(tmp_path / "log")}
        done = subprocess.run(
            [sys.executable, str(TOOL), f"--venv={tmp_path / 'venv'}", *words],
            env={**os.environ, **own, **environment}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines(), done.stdout

    return call


def test_pip_installs_the_pins_without_resolving_them_and_then_checks_that_nothing_is_missing(set_up):
    called, _ = set_up()
    first, torch, dlm, check = called
    assert PINS in first and torch.startswith("torch==")
    assert dlm.endswith(f"--no-deps --editable {ROOT}[dev]") and check.endswith(" check")


def test_where_the_pins_lack_a_package_or_cannot_be_installed_pip_resolves(set_up):
    called, said = set_up(MISSING="1")
    assert RESOLVED in called[-2] and "pip adds what is missing" in said
    called, said = set_up(NO_PINS="1")
    assert RESOLVED in called[-2] and "the pins alone cannot be installed" in said


def test_uv_is_used_where_it_works_and_chooses_the_build_of_torch(set_up):
    called, _ = set_up(uv=True)
    assert len(called) == 2 and called[0].startswith("uv pip install") and "--torch-backend=auto" in called[0]


def test_where_uv_fails_its_reason_is_shown_and_pip_installs(set_up):
    called, said = set_up(uv=True, UV_FAILS="1")
    assert "no torch for you" in said and any(PINS in line for line in called)


@pytest.mark.parametrize("uv", [True, False])
def test_a_torch_that_is_there_stays_even_in_another_version(set_up, uv):
    called, said = set_up("--torch-index=an index", torch="2.12.1+cu130", uv=uv)
    assert called[1] == "torch==2.12.1+cu130" and not any("--index-url" in line for line in called)
    assert not any("--torch-backend" in line for line in called) and "NVIDIA" not in said


@pytest.mark.parametrize("uv", [True, False])
def test_torch_alone_comes_from_the_given_index(set_up, uv):
    called, said = set_up("--torch-index=an index; touch M", uv=uv)
    (pin,) = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert called[0] == f"pip install --quiet --no-compile --index-url=an index; touch M {pin}"
    assert called[2] == "torch==2.13.0+cpu" and not any("--index-url" in line for line in called[1:])
    assert "NVIDIA" not in said


def test_the_failure_of_a_program_ends_the_set_up(set_up, tmp_path):
    program(tmp_path / "venv/bin/python", "#!/bin/bash\nif [[ $1 == -c ]]; then exit 0; fi\nexit 3\n")
    done = subprocess.run([sys.executable, str(TOOL), f"--venv={tmp_path / 'venv'}"], capture_output=True, text=True)
    assert done.returncode == 3 and "Traceback" not in done.stderr
