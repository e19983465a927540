"""What cells cost: rates between measured sizes, and plans that need no numerical library."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm.core.paths import PACKAGE, sweeps_dir
from dlm.core.shape import load_shape
from dlm.plan.cost import interpolate, measure_flops_per_sec, rate_of
from dlm.plan.definition import load_sweep
from dlm.plan.grid import make_plan

COORDINATE = st.floats(1, 60)  # the logarithms of sizes and rates


@given(
    x=COORDINATE,
    points=st.lists(st.tuples(COORDINATE, COORDINATE), min_size=1, max_size=5, unique_by=lambda point: point[0]),
)
def test_interpolation_equals_that_of_numpy_bit_for_bit(x, points):
    points.sort()
    for at in (x, *(known for known, _ in points)):
        assert interpolate(at, points) == float(np.interp(at, *zip(*points, strict=True)))


def test_rates_are_interpolated_in_the_logarithms_and_constant_beyond_the_measured_sizes():
    rates = {"19k": 4e9, "4k": 1e9}
    assert rate_of(1, rates) == pytest.approx(1e9) and rate_of(10**9, rates) == pytest.approx(4e9)
    between = math.sqrt(load_shape("4k").num_params * load_shape("19k").num_params)
    assert rate_of(round(between), rates) == pytest.approx(2e9, rel=1e-3)


def test_the_measured_models_are_those_of_the_cells_with_their_batch(stdlib_data, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(json.loads(command[-1]))
        return SimpleNamespace(returncode=0, stdout='{"1k": 1e9}\n')

    monkeypatch.setattr("dlm.plan.cost.subprocess.run", run)
    demo = make_plan(load_sweep(sweeps_dir() / "demo.yaml"))
    assert measure_flops_per_sec(["1k"], like=demo.cells[0]) == {"1k": 1e9}
    smoke = make_plan(load_sweep(sweeps_dir() / "smoke.yaml", ["data.batch_size=80"]))
    measure_flops_per_sec(["4k"], like=smoke.cells[0])
    of_demo, of_smoke = asked
    assert (of_demo["keys"], of_demo["block_size"], of_demo["batch_size"]) == ({"n_head": 1}, 32, 64)
    assert (of_demo["optimizer"]["name"], of_smoke["optimizer"]["name"]) == ("muon", "adamw")
    assert (of_smoke["keys"], of_smoke["batch_size"]) == ({}, 20)  # 80 sequences in four equal micro-batches


def test_making_a_plan_imports_no_numpy(stdlib_data):
    code = (
        "import sys, dlm.plan; from dlm.plan.cost import with_estimates; from dlm.core.paths import sweeps_dir; "
        "plan = dlm.plan.make_plan(dlm.plan.load_sweep(sweeps_dir() / 'smoke.yaml')); "
        "plan = with_estimates(plan, rates={'4k': 1e9, '19k': 2e9}); "
        "assert plan.cells[0].estimate.hours > 0; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dlm.plan.cost" in done.stdout.split() and "numpy" not in done.stdout.split()
