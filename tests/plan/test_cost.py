"""What cells cost: rates between measured sizes, and plans that need no numerical library."""

import math
import subprocess
import sys

import pytest

from dlm.core.paths import PACKAGE
from dlm.core.shape import load_shape
from dlm.plan.cost import rate_of


def test_rates_are_interpolated_in_the_logarithms_and_constant_beyond_the_measured_sizes():
    rates = {"19k": 4e9, "4k": 1e9}
    assert rate_of(1, rates) == pytest.approx(1e9) and rate_of(10**9, rates) == pytest.approx(4e9)
    between = math.sqrt(load_shape("4k").num_params * load_shape("19k").num_params)
    assert rate_of(round(between), rates) == pytest.approx(2e9, rel=1e-3)


def test_making_a_plan_imports_no_numpy(stdlib_data):
    code = (
        "import sys, dlm.plan; from dlm.plan.cost import with_estimates; from dlm.core.paths import sweeps_dir; "
        "plan = dlm.plan.make_plan(dlm.plan.load_sweep(sweeps_dir() / 'smoke.yaml')); "
        "assert with_estimates(plan).cells[0].estimate.memory_gib > 0; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dlm.plan.cost" in done.stdout.split() and "numpy" not in done.stdout.split()
