"""A definition -> cells: the published grid, what is dropped or refused, how a sweep grows, and how long it takes."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf
from support.smdm_table import BUDGETS, SMDM

from dlm import launch as launching
from dlm.cli import start, targets
from dlm.core.errors import UserError
from dlm.core.paths import PACKAGE, configs_dir, sweeps_dir
from dlm.core.recipe import derive, fill
from dlm.data.manifest import Manifest, PackedFile, write_manifest
from dlm.data.prepare.hub import parse_tokens
from dlm.plan.cost import validation_flops, with_estimates
from dlm.plan.definition import load_sweep, parse_sweep, with_settings
from dlm.plan.grid import cell_config, make_plan
from dlm.plan.needs import rounded_up
from dlm.plan.proof import proof_seed
from dlm.plan.store import read_plan, write_plan

TINY = {
    "name": "tiny",
    "budgets": [1e10, 3e10],
    "convention": "full_masked_head",
    "models": ["4k", "8k", "19k"],
    "groups": {"data": "stdlib", "trainer": "cpu"},
    "set": {"optimizer.lr": 3e-3},
    "hardware": {"device": "cpu", "gpus_per_node": 0},
}


def spec(**changes):
    return parse_sweep({**TINY, **changes}, "tiny.yaml")


def refused(**changes) -> str:
    with pytest.raises(UserError) as error:
        make_plan(spec(**changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def pretend_data(folder: Path, *, vocab_size: int, tokens: int) -> None:
    """A folder that looks prepared to whoever reads its manifest only."""
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"abc")
    files = (PackedFile(name="a.bin", tokens=tokens, bytes=3, sha256="0"),)
    splits = {"train": files, "validation": files}
    write_manifest(folder, Manifest(name=folder.name, tokenizer="none", vocab_size=vocab_size, bos_id=0, splits=splits))


def test_the_plan_of_smdm_is_as_published(command, workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_DATA", str(tmp_path / "no data"))
    ended = command("dlm.cli", "plan", "sweeps/smdm.yaml", "--json")
    assert ended.code == 0 and ended.err.count("\n") == 1 and "slim_pajama are not prepared" in ended.err
    plan = json.loads(ended.out)
    assert plan.keys() >= {"spec", "convention", "cells", "dropped"} and plan["convention"] == "6n"
    steps = {(cell["model"], cell["budget_flops"]): cell["steps"] for cell in plan["cells"]}
    assert steps == {(size.name, C): n for size in SMDM for C, n in zip(BUDGETS, size.steps, strict=True)}
    assert len(plan["cells"]) == len({cell["cell_id"] for cell in plan["cells"]}) == 150 and plan["dropped"] == []
    asked = {"cell_id", "model", "objective", "seed", "num_params", "budget_flops", "tokens", "steps",
             "global_batch_size", "block_size", "learning_rate", "flops", "budget_error_pct", "tokens_per_param",
             "epochs", "hours", "gpu_hours", "memory_gib", "nodes", "gpus_per_node"}  # fmt: skip
    cell = next(c for c in plan["cells"] if (c["model"], c["budget_flops"]) == ("170M", 1e19))
    assert asked <= cell.keys() and set(cell["flops"]) == {"6n", "6n_total", "full", "full_masked_head"}
    assert cell["tokens"] == 18710 * 256 * 2048 and cell["epochs"] is None and cell["learning_rate"] == 2e-4
    assert cell["hours"] * 8 == pytest.approx(cell["gpu_hours"])
    true = cell["flops"]["full_masked_head"]
    validation = true / 3 * (4 * 1024 * 8 * 2048) / cell["tokens"]  # forward only; 4 times, 8 draws
    assert cell["gpu_hours"] == pytest.approx((true + validation) / (989e12 * 0.4) / 3600, rel=1e-3)  # compiled
    assert -100 / cell["steps"] < cell["budget_error_pct"] <= 0


def test_the_same_definition_gives_the_same_bytes_also_grown_in_two_steps(stdlib_data, tmp_path):
    for changes in (
        {},
        {"vary": {"optimizer.lr": [1e-3, 3e-3]}, "seeds": [0, 1], "set": {}},
        {"objectives": ["masked_diffusion", "autoregressive"], "tokens_per_param": [20, 1000]},
        {"models": ["4k", "8k", "19k", "33k", "49k"], "sizes_per_budget": 3},
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        at_once, grown = folder / "at once", folder / "grown"
        write_plan(at_once, make_plan(spec(**changes)))
        first = write_plan(grown, make_plan(spec(**changes, budgets=[1e10])))
        for cell in first.cells:
            (grown / "runs" / cell.cell_id).mkdir(parents=True)  # as a run leaves it
        write_plan(grown, make_plan(spec(**changes, budgets=[3e10])))
        assert (grown / "plan.json").read_bytes() == (at_once / "plan.json").read_bytes()
        cells = {path.name: path.read_bytes() for path in (at_once / "cell").iterdir()}
        assert {path.name: path.read_bytes() for path in (grown / "cell").iterdir()} == cells
        assert read_plan(grown).cells == make_plan(spec(**changes)).cells
        before = (grown / "plan.json").stat().st_mtime_ns
        write_plan(grown, make_plan(spec(**changes)))
        assert (grown / "plan.json").stat().st_mtime_ns == before


def test_cells_at_the_lower_budgets_are_planned_several_times(stdlib_data, tmp_path):
    changes = {"models": ["4k"], "budgets": [1e10, 3e10], "seeds": [7, 8]}
    several = spec(**changes, replicates={"below": "1/2", "runs": 3})
    seeds = {
        budget: [cell.seed for cell in make_plan(several).cells if cell.budget_flops == budget]
        for budget in several.budgets
    }
    assert seeds == {1e10: [7, 8, 1007, 1008, 2007, 2008], 3e10: [7, 8]}
    assert proof_seed(several) == 2009
    rules = [{"below": "1/2", "runs": 3}, {"below": 2, "runs": 2}]
    all_twice = spec(**changes, replicates=rules)
    assert [all_twice.seeds_at(budget) for budget in all_twice.budgets] == [tuple(seeds[1e10]), (7, 8, 1007, 1008)]
    with pytest.raises(UserError, match="set all of it"):
        with_settings(all_twice, ["replicates.runs=4"])
    assert with_settings(several, ["replicates.runs=4"]).replicates[0].runs == 4
    assert with_settings(several, ["replicates=[{below: 0.5, runs: 9}]", "replicates.runs=5"]).replicates[0].runs == 5
    assert with_settings(several, ["replicates=null"]).replicates == ()
    once = write_plan(tmp_path, make_plan(spec(**changes)))
    assert "replicates" not in (tmp_path / "plan.json").read_text()
    for cell in once.cells:
        (tmp_path / "runs" / cell.cell_id).mkdir(parents=True)
    grown = write_plan(tmp_path, make_plan(several))  # a sweep may grow by them, and keeps its cells
    assert {cell.cell_id for cell in once.cells} < {cell.cell_id for cell in grown.cells}
    assert read_plan(tmp_path).spec == several
    write_plan(tmp_path, make_plan(all_twice))
    assert read_plan(tmp_path).spec == all_twice


def test_only_the_ends_of_a_budget_are_repeated(stdlib_data, tmp_path):
    rules = [{"below": 2, "runs": 2}, {"below": "1/2", "runs": 4, "sizes": "ends"}]
    sizes = {"models": ["4k", "8k", "19k", "33k"], "budgets": [1e10, 3e10], "replicates": rules}
    whole = Counter((cell.budget_flops, cell.model) for cell in make_plan(spec(**sizes, tokens_per_param=None)).cells)
    assert whole == {(c, m): 2 for c in (1e10, 3e10) for m in ("4k", "8k", "19k", "33k")} | {
        (1e10, "4k"): 4,
        (1e10, "33k"): 4,
    }
    ends = spec(**sizes, tokens_per_param=[5, 1000])  # leaves two sizes at 1e10, and both are ends
    plan = make_plan(ends)
    runs = Counter((cell.budget_flops, cell.model) for cell in plan.cells)
    assert (runs[1e10, "4k"], runs[1e10, "8k"], runs[1e10, "19k"], runs[3e10, "4k"]) == (4, 4, 0, 2)
    assert Counter((row["budget_flops"], row["model"]) for row in plan.dropped)[1e10, "33k"] == 2
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path).spec == ends
    plain = ends.plain()["replicates"]
    assert plain[0] == {"below": 2, "runs": 2} and plain[1]["sizes"] == "ends"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"below": 0.5, "runs": 2, "sizes": "some"}, ["replicates.sizes is 'some': it must be all or ends"]),
        ({"below": 0.5, "runs": 1}, ["replicates.runs is 1: it must be a whole number of at least 2 and at most 100"]),
        ({"below": 0, "runs": 2}, ["replicates.below is 0: it must be a number above 0"]),
        ({"below": float("inf"), "runs": 2}, ["replicates.below is inf: it must be a finite number above 0"]),
        ([{"below": 0.5, "runs": 2}, {"below": 0.2}], ["runs in entry 2 of replicates is missing"]),
        (3, ["replicates is 3: give a rule, {KEY: VALUE, ...}, or a list of rules"]),
        ({"below": 0.5, "runs": 2, "times": 2}, ["unknown key of replicates 'times'"]),
    ],
)
def test_a_mistake_in_replicates_is_one_line(wrong, words):
    with pytest.raises(UserError) as error:
        spec(replicates=wrong)
    assert all(word in str(error.value) for word in words), error.value


def test_another_definition_under_the_same_name_shows_the_difference(stdlib_data, tmp_path):
    write_plan(tmp_path, make_plan(spec()))
    content = (tmp_path / "plan.json").read_bytes()
    for changes, words in (
        ({"set": {"optimizer.lr": 1e-3}}, ["0.003", "0.001", "set"]),
        ({"models": ["4k", "49k"]}, ["models", "19k", "49k"]),
        ({"convention": "6n"}, ["convention", "full_masked_head", "6n"]),
    ):
        with pytest.raises(UserError, match="another definition") as error:
            write_plan(tmp_path, make_plan(spec(**changes)))
        assert all(word in str(error.value) for word in words)
    assert (tmp_path / "plan.json").read_bytes() == content
    write_plan(tmp_path, make_plan(spec(description="other words", max_local_hours=1)))  # may change


def test_other_data_under_the_same_name_are_refused(stdlib_data, tmp_path, monkeypatch):
    write_plan(tmp_path / "tiny", make_plan(spec()))
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    pretend_data(tmp_path / "stdlib", vocab_size=256, tokens=10**7)
    with pytest.raises(UserError, match="the data stdlib had hash"):
        write_plan(tmp_path / "tiny", make_plan(spec()))


def test_a_dropped_cell_has_its_reason(stdlib_data, command, workdir):
    plan = make_plan(spec(budgets=[1e8, 1e10], models=["4k", "33k"], tokens_per_param=[20, 1e5], max_epochs=0.02))
    kept = {(cell.model, cell.budget_flops) for cell in plan.cells}
    reasons = {(row["model"], row["budget_flops"]): row["reason"] for row in plan.dropped}
    assert "fewer than 20" in reasons["4k", 1e8] and "fewer than 20" in reasons["33k", 1e8]
    assert "outside tokens_per_param 20 to 100000" in reasons["33k", 1e10]
    assert kept == {("4k", 1e10)}
    epochs = {cell.model: cell.epochs for cell in make_plan(spec(budgets=[1e10], models=["4k", "8k"])).cells}
    limit = (epochs["4k"] + epochs["8k"]) / 2  # at one budget the smaller model reads more
    (limited,) = make_plan(spec(budgets=[1e10], models=["4k", "8k"], max_epochs=limit)).dropped
    assert limited["model"] == "4k" and "epochs of the data, above max_epochs" in limited["reason"]

    ended = command("dlm.cli", "plan", "smoke", "--budget", "1e6")
    assert "no cell is left" in ended.complaint and "fewer than 20" in ended.complaint
    assert list(workdir.iterdir()) == []


def test_epochs_are_tokens_over_those_of_the_data(stdlib_data):
    (cell,) = make_plan(spec(budgets=[1e10], models=["4k"])).cells
    held = sum((len(path.read_bytes()) - 24) for path in (stdlib_data / "stdlib").glob("train*.bin"))
    assert cell.epochs == pytest.approx(cell.tokens / held, rel=1e-12)


def test_the_config_of_a_cell_is_whole_and_gives_its_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    plan = make_plan(load_sweep(sweeps_dir() / "isoflop.yaml"))
    for cell in plan.cells[::9]:
        config = cell_config(cell.groups, cell.overrides)  # its batch size and learning rate are those of the recipe
        assert derive(config).steps == cell.steps and config["optimizer"]["lr"] == cell.learning_rate


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ["171M"]}, ["unknown model '171M'", "did you mean 170M"]),
        ({"objectives": ["autoregresive"]}, ["unknown objective", "did you mean autoregressive?"]),
        ({"groups": {"data": "stdlb"}}, ["unknown data", "did you mean stdlib?"]),
        ({"groups": {"dta": "stdlib"}}, ["unknown group", "data"]),
        ({"set": {"optimizer.lrr": 1e-3}}, ["unknown key of optimizer 'lrr'", "did you mean lr"]),
        (
            {"vary": {"optimiser.lr": [1e-3]}},
            ["unknown config key in the sweep definition 'optimiser.lr'", "mean optimizer.lr"],
        ),
        ({"set": {"model_config.n_layer": 2}}, ["model_config.n_layer is no key of dlm: choose the model"]),
        ({"set": {"data.block_size": 512}}, ["data.block_size 512", "256", "model.block_size"]),
        ({"models": ["6M"], "budgets": [1e15]}, ["6M has vocab_size 32000", "stdlib have 256", "groups.data"]),
        ({"seeds": [0, 0]}, ["2 times", "seeds"]),
        (
            {"set": {"data.batch_size": 7}, "hardware": {"device": "H100", "gpus_per_node": 2, "nodes": 2}},
            ["data.batch_size 7", "4 devices", "hardware.gpus_per_node"],
        ),
        ({"set": {"data.batch_size": 8, "trainer.devices": 3}}, ["data.batch_size 8", "3 devices"]),
    ],
)
def test_a_definition_that_makes_no_plan_is_refused(changes, words, stdlib_data):
    complaint = refused(**changes)
    assert all(word in complaint for word in words), complaint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modles": ["4k"]}, ["unknown key 'modles'", "did you mean models?"]),
        ({"budgets": []}, ["budgets is []: it must be a list of numbers with at least one entry"]),
        ({"seeds": []}, ["seeds is []", "at least one entry"]),
        ({"budget_fractions": [2]}, ["entry 1 of budget_fractions is 2: it must be a number above 0 and at most 1"]),
        ({"budgets": [0]}, ["budgets", "0", "above zero"]),
        ({"budgets": ["lots"]}, ["budgets", "lots"]),
        ({"convention": "7n"}, ["convention", "7n", "6n_total"]),
        ({"name": "a/b"}, ["name", "a/b"]),
        ({"tokens_per_param": [9, 3]}, ["tokens_per_param", "9"]),
        ({"hardware": {"device": "H101"}}, ["H101", "H100"]),
        ({"hardware": {"gpu_per_node": 8}}, ["unknown key of hardware 'gpu_per_node'", "mean gpus_per_node"]),
        ({"max_epochs": 0}, ["max_epochs"]),
    ],
)
def test_a_definition_with_wrong_values_is_refused(changes, words):
    with pytest.raises(UserError) as error:
        spec(**changes)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_settings_change_a_definition_before_it_is_planned(stdlib_data, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    settings = ["optimizer.lr=5e-3", "models=[8k]", "max_epochs=1", "vary.data.batch_size=[4, 8]", "budgets=[1e10]"]
    changed = load_sweep(path, settings)
    assert changed.set == {"optimizer.lr": 5e-3} and changed.max_epochs == 1
    cells = make_plan(changed).cells
    assert [(cell.model, cell.global_batch_size, cell.learning_rate) for cell in cells] == [
        ("8k", 4, 5e-3), ("8k", 8, 5e-3),
    ]  # fmt: skip
    assert cells[0].steps in (2 * cells[1].steps, 2 * cells[1].steps + 1)
    with pytest.raises(UserError, match="KEY=VALUE"):
        load_sweep(path, ["optimizer.lr"])


def test_the_command_refuses_budgets_in_one_line(command, stdlib_data, workdir):
    ended = command("dlm.cli", "plan", "smoke", "--budget", "nan")
    assert "--budget is 'nan'" in ended.complaint and "above zero" in ended.complaint
    assert "did you mean smoke" in command("dlm.cli", "plan", "sweeps/smok.yaml").complaint


@pytest.mark.parametrize("content", ['{"spec": {"na', "[]", "{}", '{"spec": {}, "cells": 3}', "\x00\xff"])
def test_a_damaged_plan_is_named_and_kept(content, stdlib_data, tmp_path):
    write_plan(tmp_path, make_plan(spec()))
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json"):
        read_plan(tmp_path)
    with pytest.raises(UserError, match=r"plan\.json"):
        write_plan(tmp_path, make_plan(spec()))
    assert (tmp_path / "plan.json").read_text() == content


def test_estimates_are_stored_apart_from_the_decisions(stdlib_data, tmp_path):
    plan = make_plan(spec())
    slow, fast = (with_estimates(plan, rates={"4k": rate, "19k": rate}) for rate in (1e8, 1e9))
    for left, right in zip(slow.cells, fast.cells, strict=True):
        assert left.estimate.hours == pytest.approx(10 * right.estimate.hours)
        assert left.estimate.hours == pytest.approx(
            (left.flops["full_masked_head"] + validation_flops(left)) / 1e8 / 3600
        )
    write_plan(tmp_path / "slow", slow)
    write_plan(tmp_path / "fast", fast)
    assert (tmp_path / "slow/plan.json").read_bytes() == (tmp_path / "fast/plan.json").read_bytes()
    assert read_plan(tmp_path / "slow") == slow
    for damaged in ("[]", "null", '"x"', '{"a": 1}', '{"a": {}}', '{"a'):  # derived: nothing waits for its repair
        (tmp_path / "slow/estimate.json").write_text(damaged)
        assert read_plan(tmp_path / "slow") == plan


SHIPPED = sorted(path.stem for path in sweeps_dir().glob("*.yaml"))


def test_there_are_shipped_sweeps():
    assert {"demo", "smoke", "isoflop", "smdm", "mdm_vs_ar"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_hydra_composes_each_cell_to_the_id_it_was_planned_with(name, stdlib_data, tmp_path, monkeypatch):
    definition = load_sweep(sweeps_dir() / f"{name}.yaml")
    data = definition.groups.get("data", "stdlib")
    if data != "stdlib":  # only the manifest is read
        monkeypatch.setenv("DLM_DATA", str(tmp_path))
        pretend_data(tmp_path / data, vocab_size=32000, tokens=627 * 10**9)
    plan = write_plan(tmp_path, make_plan(definition))
    launching.register()
    with hydra.initialize_config_dir(str(configs_dir()), version_base=None):
        for cell in (plan.cells[0], plan.cells[-1]):
            chosen = [f"+cell={cell.cell_id}", f"hydra.searchpath=[file://{tmp_path}]"]
            config = hydra.compose("config", chosen)
            assert config.cell_id == config.planned_cell_id == cell.cell_id
            filled = fill(OmegaConf.to_container(config))
            assert config.sweep == name and filled["optimizer"]["lr"] == cell.learning_rate
            assert filled["data"]["batch_size"] == cell.global_batch_size
        assert hydra.compose("config", [*chosen, "optimizer.lr=0.123"]).cell_id != cell.cell_id


def test_a_cell_that_is_not_what_was_planned_is_refused(launch, tmp_path):
    plan = write_plan(tmp_path, make_plan(spec()))
    cell, path = plan.cells[0].cell_id, f"hydra.searchpath=[file://{tmp_path}]"
    assert "plan again or restore" in launch(f"+cell={cell}", path, "optimizer.lr=0.123").complaint
    assert cell in launch(f"+cell={cell}x", path).complaint


def in_a_new_process(arguments: list[str], code: str) -> subprocess.CompletedProcess:
    source = f"import sys; sys.argv = {['dlm', *arguments]!r}; {code}"
    return subprocess.run(
        [sys.executable, "-c", source], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )


SLOWER = 1.5  # factor by which other work on the same caches makes a core slower
QUICK = {"plan": (["plan", "sweeps/smdm.yaml", "--json"], 1.0), "help": (["--help"], 0.5)}


@pytest.mark.parametrize("name", QUICK)
def test_planning_feels_instant(name, stdlib_data, workdir):
    """The best of three by the clock on the wall or, where other work holds the cores, by processor time.

    Other work also makes each core slower, by SLOWER: 0.57 s of processor time instead of 0.40 s were seen.
    """
    arguments, limit_sec = QUICK[name]
    seconds = []
    while len(seconds) < 3 and min(seconds, default=math.inf) > limit_sec:
        began, used = time.perf_counter(), os.times()
        done = in_a_new_process(arguments, "from dlm.cli import main; main()")
        now = os.times()
        wall = time.perf_counter() - began
        assert done.returncode == 0, done.stderr
        busy = os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
        processor = now.children_user + now.children_system - used.children_user - used.children_system
        seconds.append(processor / SLOWER if busy else wall)
    assert min(seconds) <= limit_sec, seconds


@pytest.mark.parametrize("name", QUICK)
def test_planning_imports_nothing_slow(name, stdlib_data, workdir):
    code = (
        "import atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); from dlm.cli import main; main()"
    )
    done = in_a_new_process(QUICK[name][0], code)
    loaded = set(done.stderr.split())
    assert done.returncode == 0 and "dlm.cli" in loaded
    assert loaded.isdisjoint({"torch", "lightning", "wandb", "pandas", "hydra", "scipy", "matplotlib"})


def test_a_sweep_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path))
    for name in ("mine", "demo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text("{}")
    assert targets.by_name("mine") == str(tmp_path / "mine")
    assert [targets.by_name(target) for target in ("demo", "none", "sweeps/demo.yaml")] == [
        "demo", "none", "sweeps/demo.yaml"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "word", ["optimizer.lr=1e-2", "+model.x=1", "seed=3", "data.batch_size=4", "trainer.precision=x"]
)
def test_an_override_that_would_change_a_planned_cell_is_refused(word):
    with pytest.raises(UserError, match="would change the result of planned cells: use --set"):
        start.check_overrides([word])


def test_overrides_that_change_no_result_are_accepted():
    start.check_overrides(["trainer=cpu", "data.micro_batch_size=2", "logger=none", "hydra.launcher.partition=x"])
    with pytest.raises(UserError, match=r"no run has such a key; did you mean hydra\.launcher\.partition=x\?"):
        start.check_overrides(["partition=x"])
    with pytest.raises(UserError, match="choose the launcher with --launcher"):
        start.check_overrides(["hydra/launcher=submitit_slurm"])


def test_a_plan_says_how_many_unique_tokens_it_needs_and_the_command_that_prepares_them(
    command, workdir, tmp_path, monkeypatch
):
    monkeypatch.setenv("DLM_DATA", str(tmp_path / "my data"))
    words = ("dlm.cli", "plan", "isoflop", "--top-budget", "1e19", "--dry-run")
    ended = command(*words)
    assert ended.code == 0 and ended.err.count("\n") == 1
    assert "slim_pajama are not prepared" in ended.err and "the largest cell needs 25.4B unique tokens" in ended.err
    options = f"--tokens 26e9 --tokenizer FILE --out '{tmp_path}/my data/slim_pajama'"
    assert f"`dlm prepare text hf://cerebras/SlimPajama-627B {options}`" in ended.err
    (tmp_path / "my data").mkdir()
    pretend_data(tmp_path / "my data" / "slim_pajama", vocab_size=32000, tokens=6 * 10**9)
    ended = command(*words)  # the cell that needs most is dropped, because it would read the data too often
    assert ended.code == 0 and ended.err.count("\n") == 1
    assert "hold 6B training tokens, and the largest cell needs 25.4B unique tokens" in ended.err
    assert "--tokens 26e9" in ended.err and "slim_pajama_26e9'`" in ended.err
    shutil.rmtree(tmp_path / "my data" / "slim_pajama")
    pretend_data(tmp_path / "my data" / "slim_pajama", vocab_size=32000, tokens=26 * 10**9)
    assert command(*words).err == ""


@pytest.mark.parametrize(
    ("tokens", "written"),
    [(25_442_123_776, "26e9"), (2_544_000_001, "2.6e9"), (26 * 10**9, "26e9"), (999 * 10**6, "1e9"), (7, "7e0")],
)
def test_a_number_of_tokens_is_rounded_up_to_what_the_option_takes(tokens, written):
    assert rounded_up(tokens) == written and parse_tokens(written) >= tokens
