"""Runs that other programs logged to W&B: steps from 0, nested names, and a whole way from a server to a report."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support import ROOT
from support.by_hand import config_of, final_rows, planned, summary_of
from support.demo_runs import demo_runs, true_loss
from support.wandb_cli import dlm
from support.wandb_runs import write_runs
from support.wandb_server import ENTITY

from dlm.collect.mapping import load_mapping
from dlm.core.errors import UserError
from dlm.fit import table

nbformat = pytest.importorskip("nbformat")
PROJECT = f"{ENTITY}/dlm"
COLUMNS = {"params": "model.n", "tokens": "train.tokens", "steps": "train.steps"}
HISTORY = {"step": "trainer/global_step", "val/loss": "val/loss"}
CONFIG = {"model": {"n": 1000}, "train": {"steps": 40, "tokens": 40_960}}


def collect(server, folder: Path, *options: str, **mapping):
    """Collect the runs of the server with a mapping into ``folder``."""
    folder.mkdir(exist_ok=True)
    (folder / "mapping.yaml").write_text(yaml.safe_dump({"columns": COLUMNS, "history": HISTORY, **mapping}))
    return dlm(server, "collect", "--wandb", PROJECT, "--mapping", folder / "mapping.yaml", "--out", folder, *options)


def runs_in(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "runs.csv").set_index("run_id")


def reasons_in(folder: Path) -> dict[str, str]:
    return pd.read_csv(folder / "excluded.csv").set_index("run_id").reason.to_dict()


def validations(*steps: int) -> list[dict]:
    """Validation losses 3 - step / 100, at steps as the run counts them."""
    return [{"trainer/global_step": step, "val/loss": 3 - step / 100} for step in steps]


# --- steps ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_that_counts_its_steps_from_zero_is_whole(server, tmp_path):
    def add(name, *steps, state="finished", **row):
        server.add(name, config=CONFIG, rows=validations(*steps) + ([row] if row else []), state=state)

    add("lightning", 9, 19, 29, 39)
    add("tested", 9, 19, 29, 39, **{"trainer/global_step": 40, "train/loss": 2.0})  # a row after the last validation
    add("from_one", 10, 20, 30, 40)
    add("beyond", 30, 39, 40, 50)
    add("stopped", 9, 19, 29)
    add("crashed", 9, 19, 29, 39, state="crashed")
    add("killed", 9, 19, state="crashed")
    history = {**HISTORY, "train/loss": "train/loss"}
    answer = collect(server, tmp_path, history=history)
    runs = runs_in(tmp_path)
    expected = {"lightning": 2.61, "tested": 2.61, "from_one": 2.6, "beyond": 2.6}
    assert runs.loss.to_dict() == pytest.approx(expected) and (runs.steps == 40).all()
    assert answer.err.count("\n") == 1
    assert "because many programs count steps from 0: 2 (first: lightning); columns.step_offset: 1" in answer.err
    assert reasons_in(tmp_path) == {
        "stopped": "short: step 29 of 40 (W&B says finished)",
        "crashed": "short: step 39 of 40 (W&B says crashed); if it counts steps from 0, set columns.step_offset to 1",
        "killed": "short: step 19 of 40 (W&B says crashed)",
    }
    # The mapping states how the steps are counted; nothing is then guessed.
    answer = collect(server, tmp_path, history=history, columns={**COLUMNS, "step_offset": 1})
    assert answer.err == "" and runs_in(tmp_path).loss.to_dict() == pytest.approx({"lightning": 2.61, "crashed": 2.61})
    said = reasons_in(tmp_path)
    assert said["from_one"] == "long: step 40 and columns.step_offset 1 make 41 of 40: lower columns.step_offset"
    assert said["stopped"].startswith("short: step 29 of 40") and said["beyond"].startswith("long: step 50 and")


def test_rows_on_wandbs_own_step_are_counted_from_zero_too(server, tmp_path):
    """As Levanter logs: one row per step, _step from 0 to 99, the last validation in the last row."""
    rows = [{"train/loss": 4.0} for _ in range(100)]
    rows[99]["eval/loss"] = 2.5
    config = {"model": {"n": 1000}, "train": {"steps": 100, "tokens": 10_000}}
    server.add("levanter", config=config, rows=rows, state="finished")
    collect(server, tmp_path, history={"val/loss": "eval/loss"})
    assert runs_in(tmp_path).loss.to_dict() == {"levanter": 2.5}


def test_a_step_offset_may_be_in_the_config_and_must_be_a_whole_number(server, tmp_path):
    for name, offset in (("zero", 0), ("one", 1), ("half", 0.5), ("word", "one")):
        server.add(name, config={**CONFIG, "from": offset}, rows=validations(40 - int(name == "one")), state="failed")
    collect(server, tmp_path, columns={**COLUMNS, "step_offset": "from"})
    assert sorted(runs_in(tmp_path).index) == ["one", "zero"]
    assert reasons_in(tmp_path) == {
        "half": "another config: step_offset is 0.5, not a whole number",
        "word": "another config: step_offset is 'one', not a number",
    }


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({**COLUMNS, "step_offset": 0.5}, r"columns\.step_offset is 0\.5: give a whole number, such as 1"),
        ({**COLUMNS, "step_offset": {"value": "one"}}, r"columns\.step_offset is 'one': give a whole number"),
        ({**COLUMNS, "step_offset": float("nan")}, r"columns\.step_offset is nan: give a whole number"),
        ({"params": "n", "tokens": "t", "step_offset": 1}, r"columns\.step_offset needs columns\.steps"),
        ({**COLUMNS, "step_ofset": 1}, "did you mean step_offset"),
    ],
)
def test_a_wrong_step_offset_is_a_mistake_in_one_line(tmp_path, columns, words):
    (tmp_path / "mapping.yaml").write_text(yaml.safe_dump({"columns": columns, "history": HISTORY}))
    with pytest.raises(UserError, match=words):
        load_mapping(tmp_path / "mapping.yaml")


def test_a_scaled_number_is_whole_within_the_precision_of_floats(server, tmp_path):
    """Steps counted in tokens, and parameters in millions: 16.4 x 1e6 is 16399999.999999998."""
    rows = [{"seen": step * 12_345, "val/loss": 3.0} for step in (7, 39, 40)]
    config = {"millions": 16.4, "steps": 40, "tokens": 40 * 12_345}
    server.add("a", config=config, rows=rows, state="finished")
    columns = {"params": {"config": "millions", "scale": 1e6}, "tokens": "tokens", "steps": "steps"}
    history = {"step": {"metric": "seen", "scale": 1 / 12_345}, "val/loss": "val/loss"}
    assert collect(server, tmp_path, columns=columns, history=history).err == ""
    assert runs_in(tmp_path).params.to_dict() == {"a": 16_400_000}
    assert list(pd.read_parquet(tmp_path / "history.parquet").step) == [7, 39, 40]


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_dotted_name_is_read_however_it_was_nested(server, tmp_path):
    configs = {
        "nested": {"train": {"opt": {"lr": 0.1}}},
        "flat": {"train.opt.lr": 0.1},
        "middle": {"train": {"opt.lr": 0.1}},
        "head": {"train.opt": {"lr": 0.1}},
        "twice": {"train": {"opt": {"lr": 0.1}}, "train.opt.lr": 0.1},
        "disagree": {"train": {"opt.lr": 0.2}, "train.opt": {"lr": 0.1}},
    }
    rows = {"flat": [{"step": 40, "eval.nll": 2.5}], "twice": [{"step": 40, "eval": {"nll": 2.5}, "eval.nll": 2.5}]}
    base = {"n": 1000, "tokens": 40_960, "steps": 40}
    nested = [{"step": 20, "eval": {"nll": 2.9, "ppl": 9}}, {"step": 40, "eval": {"nll": 2.5}}]
    facts = {name: {"config": base | own, "rows": rows.get(name, nested)} for name, own in configs.items()}
    by_client = [
        {"dir": name, "id": name, "group": "g", "mode": "online", **facts.pop(name)} for name in ("nested", "twice")
    ]
    write_runs(tmp_path / "logs", by_client, **server.env)
    for name, one in facts.items():
        server.add(name, **one, state="finished")
    server.add("torn", config=base | configs["flat"], state="finished",
               rows=[{"step": 40, "eval": {"nll": 2.5}, "eval.nll": 2.6}])  # fmt: skip
    columns = {"params": "n", "tokens": "tokens", "steps": "steps", "learning_rate": "train.opt.lr"}
    columns |= {"weight_decay": "train.opt.lr", "dropout": {"value": 0.1}}
    history = {"step": "step", "val/loss": "eval.nll"}
    answer = collect(server, tmp_path / "out", columns=columns, history=history)
    assert answer.code == 0 and answer.err == ""
    runs = runs_in(tmp_path / "out")
    assert sorted(runs.index) == ["flat", "head", "middle", "nested", "twice"]
    assert set(runs.learning_rate) == set(runs.weight_decay) == set(runs.dropout) == {0.1} and set(runs.loss) == {2.5}
    assert reasons_in(tmp_path / "out") == {
        "disagree": "another config: its config has two values of train.opt.lr, 0.2 and 0.1",
        "torn": "missing validation: its history could not be read (the row 0 of its history has two values of "
        "eval.nll, 2.6 and 2.5)",
    }
    # A name of a group of metrics holds no number.
    said = collect(server, tmp_path / "out", columns=columns, history={**history, "val/loss": "eval"}).complaint
    assert "the metric 'eval' (history.val/loss of the mapping) is no number in the project, but {" in said
    assert "did you mean eval.nll" in said


def test_a_name_that_programs_extend_is_suggested(server, tmp_path):
    """Lightning adds /dataloader_idx_0 when there are several; the trainers of others add eval/."""
    rows = [{"trainer/global_step": 40, "val/loss/dataloader_idx_0": 2.5, "eval/nll": 2.5}]
    server.add("a", config=CONFIG, rows=rows, state="finished")
    said = collect(server, tmp_path).complaint
    assert (
        "has the metric 'val/loss' (history.val/loss of the mapping): did you mean val/loss/dataloader_idx_0?" in said
    )
    assert "did you mean eval/nll?" in collect(server, tmp_path, history={**HISTORY, "val/loss": "nll"}).complaint


def test_the_loss_of_a_checkpoint_that_was_loaded_at_the_end_is_pointed_out(server, tmp_path):
    again = {"trainer/global_step": 40, "val/loss": 2.5}
    server.add("best", config=CONFIG, rows=[*validations(30, 40), again], state="finished")
    server.add("same", config=CONFIG, rows=validations(30, 30, 40, 40), state="finished")
    answer = collect(server, tmp_path)
    assert runs_in(tmp_path).loss.to_dict() == {"best": 2.5, "same": 2.6}
    said = "best: val/loss at step 40 was logged 2 times, first 2.6, last 2.5: the last counts"
    assert said in answer.err and answer.err.count("\n") == 1


# --- from a server alone --------------------------------------------------------------------------------------------


def our_runs(tmp_path, monkeypatch) -> dict[str, dict]:
    """Return the runs of a planned sweep that trained elsewhere, as the server has them."""
    changes = {"budgets": (1e10, 3e10, 1e11), "models": ("4k", "8k", "19k", "66k"), "max_epochs": 100}
    _, plan = planned(tmp_path / "elsewhere", monkeypatch, **changes)
    runs = {}
    for cell in plan.cells:
        loss = true_loss(cell.num_params, cell.tokens)
        summary = summary_of(cell, plan, loss=loss, unigram_entropy=99.0)
        facts = {"config": config_of(cell), "group": "s", "rows": final_rows(cell, loss), "summary": summary}
        runs[f"s-{cell.cell_id}"] = facts
    return runs


def trainer_runs() -> dict[str, dict]:
    """Return runs in the layout of Hugging Face's Trainer: a flat config, `train/`, `eval/`, a row of totals."""
    runs = {}
    for number, run in enumerate(demo_runs(seed=1).to_dict("records")):
        rows = [{"train/loss": 4.0, "train/learning_rate": 1e-3, "train/epoch": 0.5, "train/global_step": 10}]
        rows += [{"eval/loss": run["loss"], "eval/runtime": 1.5, "train/epoch": 1.0, "train/global_step": 20}]
        rows += [{"train_runtime": 9.0, "train_loss": 4.0, "total_flos": 1e15, "train/global_step": 20}]
        config = {"model/num_parameters": run["params"], "max_steps": -1, "num_train_epochs": 1, "vocab_size": 256,
                  "per_device_train_batch_size": 8, "tokens_seen": run["tokens"]}  # fmt: skip
        summary = {"train/global_step": 20, "eval/loss": run["loss"]}
        runs[f"hf-{number}"] = {"config": config, "rows": rows, "group": "hf", "summary": summary}
    return runs


def lightning_runs(server, tmp_path) -> dict[str, dict]:
    """Train a run with Lightning's own logger, and return others with its rows and losses of their own."""
    first, *others = demo_runs().to_dict("records")

    def config_of_run(run) -> dict:
        return {"model": {"non_embedding": run["params"]}, "trainer": {"max_steps": 40}, "tokens": run["tokens"]}

    given = {"folder": str(tmp_path), "id": "lightning-0", "group": "lightning", "steps": 40}
    given |= {"config": config_of_run(first), "losses": [9.0] * 9 + [first["loss"]]}
    env = {**os.environ, **server.env, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-W", "ignore", "-m", "support.lightning_run", json.dumps(given)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = server.run("lightning-0").rows
    assert max(row["trainer/global_step"] for row in rows if "val/loss" in row) == 39
    runs = {}
    for number, run in enumerate(others, start=1):
        own = [row | ({"val/loss": run["loss"]} if "val/loss" in row else {}) for row in rows]
        runs[f"lightning-{number}"] = {"config": config_of_run(run), "rows": own, "group": "lightning"}
    return runs


def log_all(server, tmp_path, monkeypatch) -> None:
    """Log the first run of each kind with the real client, and put the others on the server."""
    kinds = [our_runs(tmp_path, monkeypatch), trainer_runs()]
    first = [{"dir": name, "id": name, "mode": "online", **runs.pop(name)} for runs in kinds for name in list(runs)[:1]]
    write_runs(tmp_path, first, **server.env)
    for runs in (*kinds, lightning_runs(server, tmp_path)):
        for name, facts in runs.items():
            server.add(name, **facts, state="finished")


KINDS = {
    "lightning": {
        "columns": {
            "params": "model.non_embedding",
            "tokens": "tokens",
            "steps": "trainer.max_steps",
            "objective": {"value": "autoregressive"},
        },
        "history": {"step": "trainer/global_step", "val/loss": "val/loss", "train/loss": "train/loss"},
    },
    "hf": {
        "columns": {
            "params": "model/num_parameters",
            "tokens": "tokens_seen",
            "steps": {"summary": "train/global_step"},
            "objective": {"value": "trainer"},
        },
        "history": {"step": "train/global_step", "val/loss": "eval/loss", "train/loss": "train/loss"},
    },
}


@pytest.mark.slow
def test_runs_of_three_kinds_become_laws_and_reports_from_a_server_alone(server, tmp_path, monkeypatch):
    log_all(server, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path / "here"))
    monkeypatch.setitem(table.fit_sweep.__kwdefaults__, "bootstrap", 0)  # for speed
    for kind, mapping in {"s": None, **KINDS}.items():
        folder, selected = tmp_path / "here" / kind, ("--filter", f"group={kind}")
        if mapping is None:
            answer = dlm(server, "collect", "--wandb", PROJECT, *selected, "--out", folder)
        else:
            answer = collect(server, folder, *selected, **mapping)
        there = sum(run.group == kind for run in server.runs.values())
        assert answer.code == 0 and f"collected {there} runs, left out 0" in answer.out, answer
        assert not (folder / "plan.json").exists() and not (folder / "runs").exists()
        fitted = dlm(server, "fit", folder, "--law", "chinchilla", "--bootstrap", "0", "--json")
        assert json.loads(fitted.out)["params"]["E"] == pytest.approx(1.5, abs=0.4)
    answer = dlm(server, "report", "lightning")  # by its name in workdir/
    folder = tmp_path / "here/lightning"
    assert answer.code == 0 and "combined" in answer.out and f"report: {folder}" in answer.out, answer
    assert "<svg" in (folder / "report/report.html").read_text() and (folder / "fits.json").is_file()
    together = pd.concat([pd.read_csv(tmp_path / "here" / kind / "runs.csv") for kind in ("s", *KINDS)])
    together.to_csv(tmp_path / "all.csv", index=False)
    monkeypatch.setenv("DLM_RUNS_CSV", str(tmp_path / "all.csv"))
    monkeypatch.setenv("DLM_DRAWS", "100")
    shown = in_notebook(ROOT / "analysis/03_isoflop.ipynb")
    assert all(f"{name}/combined: at" in shown for name in ("masked_diffusion", "autoregressive", "trainer"))


def in_notebook(path: Path) -> str:
    """Run the code of a notebook in this process, which has the libraries already, and return what it prints."""
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec("\n".join(code), {"display": print})
    return out.getvalue()


def test_a_folder_of_tables_without_runs_is_said_in_one_line(server, tmp_path):
    server.add("a", config=CONFIG, rows=validations(5), state="crashed")
    collect(server, tmp_path)
    assert "runs.csv has no run with status 'done' (no rows)" in dlm(server, "report", tmp_path).complaint
    (tmp_path / "empty").mkdir()
    assert "holds neither a plan nor runs" in dlm(server, "report", tmp_path / "empty").complaint
