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

from dlm.core.flops import PEAK_FLOPS
from dlm.core.paths import PACKAGE, sweeps_dir
from dlm.core.shape import load_shape
from dlm.plan.cost import estimated, measure_flops_per_sec, memory_gib, rate_of
from dlm.plan.definition import Hardware, load_sweep
from dlm.plan.grid import make_plan
from dlm.plan.speed import BANDWIDTH, MEMORY_GIB, assumed_share, interpolate

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


def test_the_assumed_speed_rises_with_size_and_compilation_and_on_devices_with_more_bandwidth_per_flop():
    assert assumed_share(6_000_000, "H100", compiled=False) == pytest.approx(0.10)
    assert assumed_share(170_000_000, "H100", compiled=True) == pytest.approx(0.40)
    assert assumed_share(10**9, "H100", compiled=True) == assumed_share(170_000_000, "H100", compiled=True)
    for compiled in (False, True):
        shares = [assumed_share(size, "H100", compiled=compiled) for size in (10**6, 10**7, 10**8)]
        assert shares == sorted(shares) and 0.1 <= shares[0] < shares[-1] < 0.78
    for size in (10**7, 10**9):
        assert assumed_share(size, "H100", compiled=False) < assumed_share(size, "H100", compiled=True)
        assert assumed_share(size, "L40S", compiled=True) < assumed_share(size, "H100", compiled=True)
        assert assumed_share(size, "H100", compiled=True) < assumed_share(size, "H200", compiled=True) < 0.78
        assert assumed_share(size, "RTX4090", compiled=True) == assumed_share(size, "H100", compiled=True)
    assert BANDWIDTH.keys() == PEAK_FLOPS.keys() == MEMORY_GIB.keys()


def test_a_plan_assumes_the_speed_and_the_memory_of_what_its_cells_will_do(stdlib_data):
    hardware = Hardware(device="H100", gpus_per_node=1)
    (compiled, *_), (eager, *_) = (
        estimated(make_plan(load_sweep(sweeps_dir() / "smoke.yaml", words)).cells, hardware)
        for words in (["trainer.compile=true"], ["trainer.compile=false"])
    )
    (default, *_) = estimated(make_plan(load_sweep(sweeps_dir() / "smoke.yaml")).cells, hardware)
    assert default.estimate.basis == compiled.estimate.basis == "1 x H100 at an assumed 18% of the peak, compiled"
    assert default.estimate.hours == compiled.estimate.hours
    assert eager.estimate.basis == "1 x H100 at an assumed 10% of the peak, not compiled"
    assert eager.estimate.hours == pytest.approx(1.8 * compiled.estimate.hours)
    assert eager.estimate.memory_gib > compiled.estimate.memory_gib
    (own, *_) = estimated([default], Hardware(device="H100", gpus_per_node=1, mfu=0.5))
    assert own.estimate.basis == "1 x H100 at an assumed 50% of the peak"
    assert memory_gib(default, 1, on_gpu=False) == eager.estimate.memory_gib  # the trainer of CPUs does not compile
