"""The GPU script runs end to end where there is none, at toy sizes, and says that it measured nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_gpu_script_runs_at_toy_sizes_keeps_its_rows_and_names_absent_peers(tmp_path):
    out = tmp_path / "gpu.json"

    def rows(names: str) -> dict:
        subprocess.run([sys.executable, SCRIPT, "--device", "cpu", "--rows", names, "--peers", tmp_path / "none",
                        "--out", out], check=True, capture_output=True, cwd=tmp_path)  # fmt: skip
        return json.loads(out.read_text())["rows"]

    first = rows("G1,G5")
    second = rows("G5,G6,G7")
    assert second.keys() == {"G1", "G5", "G6", "G7"} and second["G5"] == first["G5"]  # a finished row is kept
    assert not any(row.get("measured", False) for row in second.values())
    assert "SMDM" in json.dumps(first["G1"]) and "absent" in json.dumps(first["G1"])
    head = second["G7"]["6M"]  # on masked positions only, against all of them
    assert max(head["loss_relative_difference"], head["gradient_relative_difference"]) < 1e-6
