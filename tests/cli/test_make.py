"""The targets of the Makefile, by make itself: what a user gives reaches dlm as one word, whatever it holds."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from dlm.core.paths import PACKAGE

HOSTILE = [
    "x; touch M", "x'; touch M; '", 'x"; touch M; "', "$(touch M)", "`touch M`", "$(shell touch M)", "x && touch M",
    "x | touch M", "x\\'; touch M #", "$$(touch M)", "${shell touch M}", "a b", "*", "$(eval X := $(shell touch M))",
]  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, and a stand-in for dlm that writes down the words that it is given."""
    (tmp_path / "Makefile").write_text((PACKAGE.parent / "Makefile").read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/dlm").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > words\n')
    (tmp_path / ".venv/bin/dlm").chmod(0o755)
    (tmp_path / ".venv/.ready").touch()
    return tmp_path


def make(checkout: Path, *words: str) -> tuple[list[str], str]:
    """Run make. Returns the words that dlm was given, and what make printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", *words], cwd=checkout, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert not (checkout / "M").exists() and not list(checkout.rglob("M")), f"make {words} ran a command"
    given = checkout / "words"
    found = given.read_text().split("\0")[:-1] if given.is_file() else []
    given.unlink(missing_ok=True)
    return found, done.stdout + done.stderr


def locker(checkout: Path) -> str:
    """Return the folder of the resolver, as the Makefile names it."""
    (name,) = re.findall(r"^LOCKER := \$\(VENV\)/(\S+)$", (checkout / "Makefile").read_text(), re.MULTILINE)
    return f".venv/{name}"


@pytest.mark.parametrize("value", HOSTILE)
def test_a_variable_is_one_word_to_dlm_and_runs_nothing(checkout, value):
    given = [f"{name}={value}" for name in ("SWEEP", "BUDGET", "LAUNCHER", "YES", "ALLOW_DIRTY")]
    words = ["sweep", value, "--top-budget", value, "--launcher", value, "--yes", "--allow-dirty"]
    assert make(checkout, "sweep", *given)[0] == words
    assert make(checkout, "status", f"SWEEP={value}")[0] == ["status", value]


def test_so_it_is_for_every_target(checkout):
    value = "x'; touch M; '"
    for target in ("plan", "status", "collect", "report", "cancel"):
        assert make(checkout, target, f"SWEEP={value}")[0] == [target, value]
    assert make(checkout, "fit", f"SWEEP={value}")[0] == ["fit", f"workdir/{value}/runs.csv"]


@pytest.mark.parametrize("value", HOSTILE)
def test_the_targets_that_pin_packages_take_words_too(checkout, value):
    (python := checkout / "my python").symlink_to(checkout / ".venv/bin/dlm")
    uv = f"{locker(checkout)}/bin/uv"
    (checkout / uv).parent.mkdir(parents=True)
    (checkout / uv).touch()
    words = ["tools/lock.py", "--uv", uv, "--upgrade", value]
    assert make(checkout, "lock", f"UPGRADE={value}", f"PYTHON={python}")[0] == words
    assert make(checkout, "audit", f"PYTHON={python}")[0] == ["tools/audit.py"]
    words = ["tools/oldest.py", "--uv", uv, "--venv", ".venv-oldest"]
    assert make(checkout, "test-oldest", f"PYTHON={python}")[0] == words
    (checkout / uv).unlink()
    for target in ("lock", "audit"):
        make(checkout, target, f"PYTHON={value}")


@pytest.mark.parametrize("value", [*HOSTILE, "x: ; touch M #", "x#y", ""])
def test_a_hostile_python_or_folder_of_the_environment_runs_nothing(checkout, value):
    assert "must be the path of one folder" in make(checkout, "clean", f"VENV={value}")[1]
    (checkout / ".venv/.ready").unlink()
    for target in ("setup", "audit", "lock"):
        make(checkout, target, f"PYTHON={value}")


@pytest.mark.parametrize("value", HOSTILE)
def test_what_to_update_is_one_word_to_the_resolver(checkout, value):
    uv = checkout / ".venv/uv-0.13.9/bin/uv"
    uv.parent.mkdir(parents=True)
    uv.touch()
    words, _ = make(checkout, "lock", "PYTHON=.venv/bin/dlm", f"UPGRADE={value}")
    assert words == ["tools/lock.py", "--uv", ".venv/uv-0.13.9/bin/uv", "--upgrade", value]


def test_a_line_break_is_refused_and_the_defaults_stay(checkout):
    said = make(checkout, "-i", "plan", "SWEEP=x\ntouch M #")[1]
    assert "SWEEP has a line break" in said
    assert make(checkout, "plan")[0] == ["plan", "demo"]
    assert make(checkout, "plan", "BUDGET=1e19")[0] == ["plan", "isoflop", "--top-budget", "1e19"]
    (checkout / "sweeps").mkdir()
    (checkout / "sweeps/demo.yaml").touch()
    assert make(checkout, "sweep", "YES=1", "ALLOW_DIRTY=1")[0] == [
        "sweep", "sweeps/demo.yaml", "--launcher", "auto", "--yes", "--allow-dirty"
    ]  # fmt: skip
    (checkout / "workdir/demo").mkdir(parents=True)
    (checkout / "workdir/demo/plan.json").touch()
    assert make(checkout, "status")[0] == ["status", "workdir/demo"]
