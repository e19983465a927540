"""Without a GPU, the GPU script runs at toy sizes and says that it measured nothing. The fitting script says in one
line that the published points are absent, and its peers minimise the right objective.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def check_toy_rows(first: dict, second: dict) -> None:
    """What holds when G1 and G5 were run at toy sizes, and then G5, G6 and G7 with the same file."""
    assert second.keys() == {"G1", "G5", "G6", "G7"} and second["G5"] == first["G5"]  # a finished row is kept
    assert not any(row.get("measured", False) for row in second.values())
    assert "SMDM" in json.dumps(first["G1"]) and "absent" in json.dumps(first["G1"])
    head = second["G7"]["6M"]  # on masked positions only, against all of them
    assert max(head["loss_relative_difference"], head["gradient_relative_difference"]) < 1e-6


@pytest.mark.long
def test_the_gpu_script_with_compiled_models_runs_at_toy_sizes(tmp_path):
    """The script as a person starts it; compiling for a CPU takes a minute or more."""
    out = tmp_path / "gpu.json"

    def rows(names: str) -> dict:
        subprocess.run([sys.executable, SCRIPT, "--device", "cpu", "--rows", names, "--peers", tmp_path / "none",
                        "--out", out], check=True, capture_output=True, cwd=tmp_path)  # fmt: skip
        return json.loads(out.read_text())["rows"]

    check_toy_rows(rows("G1,G5"), rows("G5,G6,G7"))


@pytest.fixture
def gpu(monkeypatch):
    """The GPU script as a module, with models that are not compiled and one window of each side."""
    monkeypatch.syspath_prepend(SCRIPT.parents[1])
    module = importlib.import_module("benchmarks.gpu")
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(module, "alternate", lambda ours, peer: ([ours()], [peer()]))
    return module


def run(gpu, monkeypatch, out, names):
    arguments = ["gpu.py", "--device", "cpu", "--rows", names, "--peers", str(out.parent / "none"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu.main()
    return json.loads(out.read_text())["rows"]


def test_the_gpu_script_at_toy_sizes_keeps_finished_rows_and_names_absent_peers(gpu, monkeypatch, tmp_path):
    out = tmp_path / "gpu.json"
    first = run(gpu, monkeypatch, out, "G1,G5")
    check_toy_rows(first, run(gpu, monkeypatch, out, "G5,G6,G7"))


def test_a_row_that_fails_is_recorded_the_later_ones_go_on_and_it_is_tried_again(gpu, monkeypatch, tmp_path):
    def broken(bench):
        """One size, then no more memory."""
        yield "6M", {"tokens_per_sec": 1.0}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    def whole(bench):
        yield "6M", {"tokens_per_sec": 2.0}

    monkeypatch.setattr(gpu, "ROWS", {"G1": broken, "G2": whole})
    rows = run(gpu, monkeypatch, tmp_path / "gpu.json", "G1,G2")
    assert rows["G1"]["failed"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 4 GiB"
    assert rows["G1"]["6M"] == {"tokens_per_sec": 1.0} and not rows["G1"]["measured"]
    assert rows["G2"]["6M"] == {"tokens_per_sec": 2.0} and not rows["G2"].keys() & {"failed", "absent"}
    monkeypatch.setattr(gpu, "ROWS", {"G1": whole, "G2": broken})
    rows = run(gpu, monkeypatch, tmp_path / "gpu.json", "G1,G2")
    assert "failed" not in rows["G1"] and rows["G1"]["6M"] == rows["G2"]["6M"] == {"tokens_per_sec": 2.0}
    with pytest.raises(SystemExit):
        run(gpu, monkeypatch, tmp_path / "gpu.json", "G1,G8")


@pytest.mark.parametrize(
    ("row", "module", "call", "package"),
    [
        ("G7_liger", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", "liger-kernel"),
        ("G7_cut", "cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy"),
    ],
)
def test_packages_that_fuse_head_and_loss_are_peers_where_they_are_installed(
    row, module, call, package, gpu, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    absent = run(gpu, monkeypatch, tmp_path / "gpu.json", row)[row]
    assert module.split(".")[0] in absent["absent"] and not absent["measured"]

    def plain(hidden, weight, target, *, reduction):
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), target, reduction=reduction)

    monkeypatch.setattr(importlib, "import_module", lambda name: {module: SimpleNamespace(**{call: plain})}[name])
    monkeypatch.setattr(gpu.metadata, "version", lambda name: "1.2.3")
    there = run(gpu, monkeypatch, tmp_path / "gpu.json", row)[row]
    assert there["package"] == f"{package} 1.2.3" and there["6M"]["tokens_per_sec"]["ratio"] > 0
    assert there["6M"]["loss_relative_difference_bf16"] < 1e-3  # the same sum of the same rows


FIT = SCRIPT.with_name("fit.py")


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_without_the_published_points_the_fitting_script_measures_nothing(folder, tmp_path):
    there = {} if folder is None else {"DLM_REFERENCE_DATA": str(tmp_path / folder)}
    clean = {key: value for key, value in os.environ.items() if key != "DLM_REFERENCE_DATA"}
    ended = subprocess.run([sys.executable, FIT], capture_output=True, text=True, cwd=tmp_path, env=clean | there)
    assert ended.returncode == 2 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("fit: absent: ") and "DLM_REFERENCE_DATA" in line


def test_the_objective_given_to_scipy_is_the_one_that_our_fit_reports(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        monkeypatch.setenv(name, "1")  # the script sets them for its process; here they are put back
    monkeypatch.syspath_prepend(SCRIPT.parents[1])
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
