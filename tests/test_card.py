"""The card script runs whole at toy sizes on a CPU, ends within its seconds, and goes on where it was stopped."""

import argparse
import dataclasses
import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
H100 = {"name": "NVIDIA H100 80GB HBM3", "type": "cuda", "memory_gib": 75.0, "product_flops_per_sec": 7e14}


@pytest.fixture
def card(monkeypatch):
    """Imports a module of benchmarks/."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def started(out, *words):
    command = [sys.executable, SCRIPT, "--toy", "--peers", out / "none", "--out", out, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=out.parent)


def content_of(out):
    """What the only results file holds, which must be whole at any time; {} before there is one."""
    found = list(out.glob("card_*.json"))
    return json.loads(found[0].read_text()) if found else {"rows": {}}


def measured(content):
    return {name for name, row in content["rows"].items() if "measured" in row}


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_script_goes_on_where_it_stopped_and_every_row_without_a_peer_gives_numbers(tmp_path, card):
    out = tmp_path / "card"
    rows = {row.name: row for row in card("card.rows").all_rows() if row.name != "launch/170M"}  # as launch/6M
    first = started(out, "--seconds", "600", "--rows", ",".join(rows))
    wait_for(lambda: len(measured(content_of(out))) >= 2)
    (worker,) = children(first.pid)
    first.kill()
    first.communicate()
    wait_for(lambda: not Path(f"/proc/{worker}").exists())  # it ends with the script
    before = content_of(out)
    second = started(out, "--seconds", "600", "--rows", ",".join(rows))
    said, _ = second.communicate()
    assert second.returncode == 0, said
    content = content_of(out)
    assert f"skipped, measured before: {', '.join(before['rows'])}" in said
    assert all(content["rows"][name] == row for name, row in before["rows"].items() if "measured" in row)
    assert content["rows"].keys() == rows.keys() and content["not_run"] == {} and len(content["calls"]) == 2
    on_gpu = ("cudnn", "efficient", "fa3", "fa4", "flash_attn", "liger", "cut")
    absent = {name for name, row in rows.items() if name.endswith(on_gpu) or row.kind == "against"}
    absent |= {name for name in rows if "no trainer.cross_entropy" in content["rows"][name].get("absent", "")}
    assert rows.keys() - measured(content) == absent
    assert not content["about"]["is_measurement"] and content["about"]["commit"] and content["about"]["code"]
    numbers = [
        row["measured"] for name, row in content["rows"].items() if name.startswith("numbers") and name not in absent
    ]
    assert numbers and all(one["is_rounding"] for one in numbers)
    head = content["rows"]["head/6M"]["measured"]
    assert max(head["loss_relative_difference"], head["gradient_relative_difference"]) < 1e-6
    step = content["rows"]["steps/170M/x8/eager/flash"]["measured"]
    assert step["step_sec_spread"][0] <= step["step_sec"] <= step["step_sec_spread"][1]
    assert step["share_of_product"] > 0 and step["first_step_sec"] > 0
    launched = content["rows"]["launch/6M"]["measured"]
    assert launched["overhead"] > -1 and launched["wall_sec"] > launched["outside_of_steps_sec"] > 0


def test_five_seconds_are_five_seconds_and_what_was_left_out_is_named(tmp_path, card):
    began = time.monotonic()
    said, _ = started(tmp_path / "card", "--seconds", "5").communicate()
    assert time.monotonic() - began < 25  # python itself may take long to start on a busy machine
    (line,) = (line for line in said.splitlines() if line.startswith("not run: "))
    assert "modernbert/170M" in line
    content = content_of(tmp_path / "card")
    assert "modernbert/170M" not in content["rows"]


@pytest.fixture
def script(card, tmp_path):
    """Makes a script with rows of its own, which measures at toy sizes."""
    gpu, made = card("gpu"), []

    def make(*rows, seconds=300.0, memory_gib=None):
        options = argparse.Namespace(seconds=seconds, scale="toy", rows=None, device="cpu", peers=tmp_path, smdm=None,
                                     memory_gib=memory_gib, out=tmp_path)  # fmt: skip
        made.append(gpu.Script(options, time.monotonic()))
        made[-1].rows = list(rows)
        return made[-1]

    yield make
    for one in made:
        one.worker.end()


HANGS = """
import json, sys, time
if {answers}:
    print(json.dumps(dict(type="cpu", device="a CPU", free_gib=8, product_flops_per_sec=1e12, torch="2", python="3",
                          cpu="a CPU", cores=1)), flush=True)
    sys.stdin.readline()
time.sleep(1000)
"""


@pytest.mark.parametrize("answers", [True, False])
def test_the_script_ends_within_its_seconds_when_a_row_or_the_start_hangs(answers, script, card, tmp_path, capsys):
    rows = card("card.rows").all_rows()[:3]
    made = script(*rows, seconds=6.0)
    made.worker = card("card.worker").Worker({}, tmp_path / "log.txt", program=("-c", HANGS.format(answers=answers)))
    began = time.monotonic()
    assert made.run() == 1
    assert time.monotonic() - began < 30  # the least limit of a row is as long; 6 s, and what a busy machine adds
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("not run: "))
    left_out = rows[1:] if answers else rows
    assert [name for name in (row.name for row in rows) if name in line] == [row.name for row in left_out]
    if answers:
        assert "no answer within" in made.results.row(rows[0].name)["failed"]
        assert made.results.content["not_run"].keys() == {row.name for row in left_out}


def test_a_row_without_enough_memory_is_halved_and_says_so(script, card):
    small = row_named(card, "steps/170M/x8/eager/flash")
    small = dataclasses.replace(small, overrides={**small.overrides, "trainer.precision": "32-true"})
    large = dataclasses.replace(small, name="steps/large", micro_batch=4 * 1024)
    refused = dataclasses.replace(small, name="steps/refused", overrides={"trainer.precision": "no such"})
    broken = dataclasses.replace(small, name="steps/broken", kind="no such")
    made = script(large, small, refused, broken, memory_gib=0.11)
    assert made.run() == 1  # a row failed
    rows = made.results.content["rows"]
    halved = rows[large.name]
    assert halved["asked_micro_batch"] == 1024 and halved["micro_batch"] == 1024 >> halved["halvings"] < 1024
    assert all("can't allocate memory" in line for line in halved["out_of_memory"])
    assert len(halved["out_of_memory"]) == halved["halvings"] and halved["measured"]["tokens_per_sec"] > 0
    assert rows[small.name]["halvings"] == 0 and "measured" in rows[small.name]
    assert "no such" in rows[refused.name]["refused"] and "no such" in rows[broken.name]["failed"]


def row_named(card, name):
    (row,) = (row for row in card("card.rows").all_rows() if row.name == name)
    return row


ECHO = """
import json, os, sys, time
print(json.dumps({"type": "cpu"}), flush=True)
for line in sys.stdin:
    row = json.loads(line)
    print(json.dumps({"reached": "compiled"}), flush=True)
    if row["name"] == "hangs":
        time.sleep(1000)
    if row["name"] == "crashes":
        os.abort()
    print(json.dumps({"measured": row["name"]}), flush=True)
"""


def test_a_row_that_hangs_or_crashes_costs_only_that_row(card, tmp_path):
    of_worker = card("card.worker")
    worker = of_worker.Worker({}, tmp_path / "log.txt", program=("-c", ECHO))
    try:
        assert worker.start(timeout=60) == {"type": "cpu"}
        for name, why in (("hangs", "no answer within 2 s, after: compiled"), ("crashes", "-6, after: compiled")):
            assert worker.ask({"name": "fine"}, limit=60, left=60) == {"measured": "fine"}
            pid = worker.pid
            with pytest.raises(of_worker.Lost, match=why):
                worker.ask({"name": name}, limit=2 if name == "hangs" else 60, left=60)
            assert not Path(f"/proc/{pid}").exists()
        assert worker.ask({"name": "fine"}, limit=60, left=60) == {"measured": "fine"}
    finally:
        worker.end()


BUSY = """
import time
from benchmarks.card.worker import lines_of_parent
lines_of_parent()
print("{}", flush=True)
time.sleep(1000)
"""


def test_a_process_that_measures_ends_when_the_script_is_gone(card, tmp_path):
    worker = card("card.worker").Worker({}, tmp_path / "log.txt", program=("-c", BUSY))
    try:
        worker.start(timeout=60)
        process = worker._process
        process.stdin.close()  # as when the script is killed
        process.wait(timeout=60)
    finally:
        worker.end()


def test_a_row_with_a_peer_or_an_old_failure_comes_after_the_others(script, card, tmp_path):
    results = card("card.results")
    rows = card("card.rows").all_rows()[:3]
    made = script(*rows)
    about = {**dict.fromkeys(results.SAME, "same"), "code": "abc", "scale": "toy"}
    made.results = results.Results(tmp_path, about)
    made.results.add(rows[0].name, {"failed": "no answer", "loss": math.nan, "spread": [1.0, math.inf]})
    assert json.loads(made.results.path.read_text())["rows"][rows[0].name]["spread"] == [1.0, "inf"]
    made.results.add(rows[1].name, {"measured": {"flops_per_sec": 1.0}})
    assert made._todo() == [rows[2], rows[0]]
    other = results.Results(tmp_path, {**about, "code": "def"})  # other code begins a new file
    assert other.path != made.results.path and other.content["rows"] == {}
    with pytest.raises(ValueError, match="has another cpu: give another --out"):
        results.Results(tmp_path, {**about, "cpu": "another"})


def test_on_a_card_of_80_gb_every_row_fits_and_the_first_call_reaches_the_peer(card):
    rows, estimates = card("card.rows"), card("card.estimates")
    device, scale, seconds = estimates.Device(**H100), card("card.rows").SCALES["card"], {}
    for row in rows.all_rows():
        assert estimates.fitting(row, scale, device) == (row, 0), row.name
        seconds[row.name] = estimates.estimate(row, scale, device).seconds
    small = dataclasses.replace(device, memory_gib=20.0)
    half, times = estimates.fitting(row_named(card, "steps/170M/x32/compiled/flash"), scale, small)
    assert (half.micro_batch, times) == (8, 2)
    # a step of 170M, 65,536 tokens at 40 % of 989 TFLOP/s, and some time to compile
    assert 30 < seconds["steps/170M/x32/compiled/flash"] < 80


def test_the_pace_of_earlier_rows_counts_for_later_ones_of_the_kind(card):
    pace = card("card.estimates").Pace()
    eager, compiled = (row_named(card, f"steps/170M/x8/{word}/flash") for word in ("eager", "compiled"))
    for seconds in (30.0, 20.0, 40.0):
        pace.learn(compiled, 10.0, seconds)
    assert pace(compiled) == 3.0 and pace(eager) == 1.0


def test_flops_count_causal_attention_whole_as_nanochat_does(card):
    bench, shape = card("card.bench"), card("card.rows").load_shape("85M")
    from dlm.train.objectives.autoregressive import Autoregressive
    from dlm.train.objectives.masked_diffusion import MaskedDiffusion

    weights = shape.num_params - (2 * shape.n_layer + 1) * shape.n_embd  # nanochat counts matrices only
    attention = 12 * shape.n_head * shape.head_dim * 2048 * shape.n_layer
    theirs = 6 * (weights + shape.vocab_size * shape.n_embd) + attention
    causal = bench.counted_flops(shape, Autoregressive(bos_id=0), length=2048)
    assert causal == pytest.approx(theirs, rel=1e-3)
    masked = bench.counted_flops(shape, MaskedDiffusion(vocab_size=shape.vocab_size), length=2048)
    assert causal - masked == pytest.approx(0.5 * 6 * shape.vocab_size * shape.n_embd, rel=2e-3)


@pytest.mark.parametrize("factor", [1.0, 1.2, float("nan")])
def test_wrong_numbers_of_an_attention_kernel_are_noticed(factor, card, monkeypatch):
    kinds, of_bench, rows = card("card.kinds"), card("card.bench"), card("card.rows")
    row = row_named(card, "numbers/6M/bf16/flash")
    bench = of_bench.Bench(device=torch.device("cpu"), scale=rows.SCALES["toy"], peers=ROOT, row=row)
    kinds._truth(bench)
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given, **how: factor * plain(*given, **how))
    found = kinds.numbers(bench)
    assert found["is_rounding"] == (factor == 1.0), found


@pytest.mark.parametrize(("words", "part"), [(["--rows", "speed"], "--rows speed: allowed are product"), ([], "--toy")])
def test_a_mistake_in_the_command_is_one_line(words, part, card, monkeypatch, tmp_path, capsys):
    gpu = card("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(tmp_path), *words])
    assert gpu.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
