"""The fitting script says in one line that the published points are absent. Its peers minimise the right objective."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import approx_fprime

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("folder", [None, "nowhere"])
@pytest.mark.parametrize("name", ["fit", "repeated"])
def test_without_the_published_points_a_script_measures_nothing(name, folder, tmp_path):
    there = {} if folder is None else {"DLM_REFERENCE_DATA": str(tmp_path / folder)}
    clean = {key: value for key, value in os.environ.items() if key != "DLM_REFERENCE_DATA"}
    script = ROOT / "benchmarks" / f"{name}.py"
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=clean | there)
    assert ended.returncode == 2 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{name}: absent: ") and "DLM_REFERENCE_DATA" in line


def test_the_objective_given_to_scipy_is_the_one_that_our_fit_reports(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        monkeypatch.setenv(name, "1")  # the script sets them for its process; here they are put back
    monkeypatch.syspath_prepend(ROOT)
    bench = importlib.import_module("benchmarks.fit")
    rng = np.random.default_rng(0)
    n, d = 10.0 ** rng.uniform(7, 10, 40), 10.0 ** rng.uniform(9, 11, 40)
    points = bench.Points(n, d, (1.7 + 400 / n**0.34 + 400 / d**0.28) * np.exp(0.01 * rng.standard_normal(40)))
    fit = points.fit(budget=points.two_budgets)
    assert not fit.holdout
    x = bench.log_named(np.array([fit.params[name] for name in bench.NAMES]))
    task = bench.plain(points, np.ones(40))
    assert task(x)[0] == pytest.approx(fit.value, rel=1e-9)
    away = x + 0.1
    numeric = approx_fprime(away, lambda at: task(at)[0], 1e-7)
    assert task(away)[1] == pytest.approx(numeric, rel=1e-4)
    lowest, _ = bench.lowest_of_scipy(points, np.ones(40), [])
    assert fit.value <= lowest * (1 + bench.ROUNDING)
