"""`dlm collect --wandb ... --mapping`: the runs of others become a table, or are left out with a reason."""

from pathlib import Path

import pandas as pd
import pytest
import yaml
from support.wandb_cli import dlm, dlm_process
from support.wandb_server import ENTITY

from dlm.collect.mapped import MappedRun, mark_duplicates
from dlm.collect.mapping import load_mapping
from dlm.core.errors import UserError
from dlm.fit.rows import read_runs

PROJECT = f"{ENTITY}/dlm"


def remote_runs(server, count: int) -> None:
    """Runs of others: a GPT's names, 4,500 logged rows each, the loss every 1,500 steps."""
    for number in range(count):
        history = [{"step": step, "loss": 4 - step / 1e4} for step in range(1, 4501)]
        for step in (1500, 3000, 4500):
            history[step - 1]["eval/nll"] = 3 - step / 1e4 - number / 10
        config = {"model": {"n": 10**6 * (number + 1)}, "train": {"steps": 4500, "batch": 8, "length": 128}}
        server.add(f"run{number}", rows=history, config=config, state="finished", group="others",
                   summary={"eval/nll": 0.0})  # fmt: skip


MAPPING = {
    "columns": {
        "params": "model.n",
        "tokens": {"product": ["train.steps", "train.batch", "train.length"]},
        "steps": "train.steps",
        "objective": {"value": "autoregressive"},
    },
    "history": {"step": "step", "val/loss": "eval/nll", "train/loss": {"metric": "loss", "scale": 2}},
}


def mapping_file(folder: Path, **changes) -> Path:
    path = folder / "mapping.yaml"
    path.write_text(yaml.safe_dump({**MAPPING, **changes}))
    return path


def test_a_project_of_others_becomes_a_table_in_few_requests(server, tmp_path):
    remote_runs(server, 7)
    server.add("elsewhere", group="another", state="finished")
    command = ("collect", "--wandb", PROJECT, "--mapping", mapping_file(tmp_path), "--filter", "group=others")
    command = (*command, "--out", tmp_path / "out")
    server.fail("Runs", times=1, status=500)
    server.fail("HistoryPage", times=1, status=429)
    server.fail("HistoryPage", times=1, drop=True)
    server.fail("RunParquetHistory", times=1, slow_sec=1.0)
    code, said, warned = dlm(server, *command)
    assert (code, warned) == (0, "") and "7 runs" in said
    # three pages of runs and one failed; per run two requests and a page for each 2,000 of 4,500 steps, and two failed
    expected = {"Viewer": 1, "Runs": 3 + 1, "RunHistoryKeys": 7, "RunParquetHistory": 7, "HistoryPage": 7 * 3 + 2}
    assert dict(server.asked) == expected
    runs = pd.read_csv(tmp_path / "out/runs.csv").set_index("run_id")
    assert runs.loss.to_dict() == {f"run{n}": pytest.approx(3 - 0.45 - n / 10) for n in range(7)}
    assert (runs.tokens == 4500 * 8 * 128).all() and (runs.params == [10**6 * (n + 1) for n in range(7)]).all()
    assert (runs.flops == 6.0 * runs.params * runs.tokens).all() and set(runs.source) == {"wandb_api"}
    assert runs.loss_se.isna().all() and runs.seed.isna().all() and len(read_runs(tmp_path / "out/runs.csv")) == 7
    history = pd.read_parquet(tmp_path / "out/history.parquet")
    one = history[history.run_id == "run3"]
    assert list(one.step) == list(range(1, 4501)) and one["val/loss"].notna().sum() == 3
    assert one["train/loss"].iloc[0] == 2 * (4 - 1e-4)
    # Again: what has not changed is not asked for again; what has, is.
    before = (tmp_path / "out/runs.csv").read_bytes(), (tmp_path / "out/history.parquet").stat().st_mtime_ns
    dlm(server, *command)
    assert dict(server.asked) == {"Viewer": 1, "Runs": 3}
    assert ((tmp_path / "out/runs.csv").read_bytes(), (tmp_path / "out/history.parquet").stat().st_mtime_ns) == before
    server.run("run2").heartbeat = "2027-01-01T00:00:00Z"
    server.run("run2").history[4499]["eval/nll"] = 1.25
    dlm(server, *command)
    assert server.asked["RunParquetHistory"] == 1
    assert pd.read_csv(tmp_path / "out/runs.csv").set_index("run_id").loss["run2"] == 1.25


def test_every_run_of_another_shape_is_left_out_with_its_reason(server, tmp_path):
    config = {"model": {"n": 1000}, "train": {"steps": 10, "batch": 8, "length": 128}, "data": "web", "seed": 0}
    whole = [{"step": step, "loss": 3.0} for step in range(1, 10)] + [{"step": 10, "loss": 3.0, "eval/nll": 2.5}]

    def add(name, **facts):
        server.add(name, **{"rows": whole, "config": config, "state": "finished", **facts})

    add("older", heartbeat="2026-01-01T00:00:00Z")
    add("fine", heartbeat="2026-02-01T00:00:00Z")
    add("live", state="running")
    add("cut", rows=whole[:6], state="crashed")
    add("blown", rows=[*whole[:9], {"step": 10, "eval/nll": "NaN"}], state="failed")
    add("books", config={**config, "data": "books"})
    add("unscored", rows=[*whole[:9], {"step": 10, "loss": 3.0}])
    add("images", config={"resolution": 64}, rows=[{"fid": 3.0}])
    add("empty", rows=[])
    add("words", config={**config, "model": {"n": "small"}})
    add("total", config={**config, "seed": 1, "flops": 7.0 * 1000 * 10240}, summary={})
    add("huge", config={**config, "model": {"n": 10**400}})
    add("large", config={**config, "model": {"n": 2**63}})
    add("endless", config={**config, "train": {"steps": 10, "batch": "inf", "length": 128}})
    add("peak", rows=[*whole[:9], {"step": 10, "eval/nll": "Infinity"}])
    add("rebound", rows=[*whole[:9], {"step": 10, "eval/nll": "-Infinity"}, {"step": 11, "eval/nll": 2.0}])
    add("unseeded", config={key: value for key, value in config.items() if key != "seed"})
    add("tuned", config={**config, "seed": 2, "pretrained": "x"})
    require = {"data": ["web"], "pretrained": None, "frozen": [None, False]}  # null: for runs without the key
    mapping = mapping_file(tmp_path, require=require, cell=["model.n", "seed"])
    content = yaml.safe_load(mapping.read_text())
    command = ("collect", "--wandb", PROJECT, "--mapping", mapping, "--out", tmp_path / "out")
    code, said, _ = dlm(server, *command)
    table = pd.read_csv(tmp_path / "out/excluded.csv").set_index("run_id")
    runs = pd.read_csv(tmp_path / "out/runs.csv").set_index("run_id")
    assert code == 0 and list(runs.index) == ["fine", "total"] and runs.loss["fine"] == 2.5
    expected = {
        "older": "duplicate: the same cell as fine",
        "live": "running: W&B says running",
        "cut": "short: step 6 of 10 (W&B says crashed)",
        "blown": "diverged: its last validation loss is nan",
        "books": "another config: data is 'books', required is 'web'",
        "unscored": "missing validation: no val/loss at step 10",
        "images": "another config: data is None",
        "empty": "missing validation: its history has none of the mapped metrics",
        "words": "another config: model.n",
        "huge": "another config: params is 1000000",
        "large": f"another config: params is {2**63}, not a whole number",
        "endless": "another config: train.batch is 'inf', not a finite number",
        "peak": "diverged: its last validation loss is inf",
        "rebound": "diverged: its validation loss is -inf",
        "unseeded": "another config: its config has no seed",
        "tuned": "another config: pretrained is 'x', required is None",
    }
    for name, reason in expected.items():
        found = table.reason[name]
        assert found.startswith(reason) or (name == "words" and "'small'" in found), (name, found)
        assert f"left out {name}: {found}" in said and (name == "older") == pd.notna(table.loss[name])
    assert set(table.index) == set(expected)
    # With the FLOPs of each run mapped, those that count otherwise are of another convention.
    content["columns"]["flops"] = "flops"
    mapping.write_text(yaml.safe_dump(content))
    dlm(server, *command)
    table = pd.read_csv(tmp_path / "out/excluded.csv").set_index("run_id")
    assert table.reason["total"].startswith("another convention: its flops are") and "6 N D" in table.reason["total"]
    assert table.reason["fine"] == "another config: its config has no flops"
    # A key that no run has would leave them all out: it is a mistake in the mapping.
    for changes, words in (
        ({"cell": ["model.n", "sed"]}, "the config key 'sed' (cell of the mapping): did you mean seed?"),
        ({"columns": {**content["columns"], "params": "modl.n"}}, "'modl.n' (columns.params of"),
        ({"columns": {**content["columns"], "budget": {"summary": "flps"}}}, "the summary key 'flps' (columns.budget"),
    ):
        mapping.write_text(yaml.safe_dump({**content, **changes}))
        server.asked.clear()
        assert words in dlm(server, *command).complaint and "HistoryPage" not in server.asked
    mapping.write_text(yaml.safe_dump({**MAPPING, "history": {"step": "step", "val/loss": "eval/nl"}}))
    assert (
        "the metric 'eval/nl' (history.val/loss of the mapping): did you mean eval/nll"
        in dlm(server, *command).complaint
    )


def test_all_but_the_latest_run_of_a_cell_are_its_duplicates():
    months = {"march": "2026-03", "may": "2026-05", "april": "2026-04", "other": "2026-01"}
    mapped = [
        MappedRun(row={"run_id": name}, excluded=None, cell=("other",) if name == "other" else ("a",), heartbeat=month)
        for name, month in months.items()
    ]
    mark_duplicates(mapped)
    reason = "duplicate: the same cell as may, which is later"
    assert [one.excluded and str(one.excluded) for one in mapped] == [reason, None, reason, None]


def test_a_history_that_cannot_be_read_costs_its_own_run_only(server, tmp_path):
    remote_runs(server, 3)
    command = ("collect", "--wandb", PROJECT, "--mapping", mapping_file(tmp_path), "--out", tmp_path / "out")
    server.fail("RunParquetHistory", times=1, refuse="internal")
    code, said, _ = dlm(server, *command)
    assert code == 0 and "2 runs" in said and "missing validation: its history could not be read (" in said
    code, said, _ = dlm(server, *command)
    assert code == 0 and "3 runs" in said and server.asked["RunParquetHistory"] == 1
    server.fail("RunParquetHistory", times=3, refuse="internal")
    for run in server.runs.values():
        run.heartbeat = "2027-01-01T00:00:00Z"
    before = (tmp_path / "out/runs.csv").read_bytes()
    code, _, warned = dlm(server, *command)
    assert code == 75 and "nothing was written" in warned and (tmp_path / "out/runs.csv").read_bytes() == before


def test_a_server_that_gives_less_than_it_has_is_named(server, tmp_path):
    remote_runs(server, 1)
    server.page_limit = 900
    command = ("collect", "--wandb", PROJECT, "--mapping", mapping_file(tmp_path), "--out", tmp_path / "out")
    _, said, warned = dlm(server, *command)
    assert "the W&B server gave 4100 of the 4500 rows that it says it has" in warned and "1 run," in said


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (("--wandb", PROJECT), {"WANDB_API_KEY": ""}, "no login at W&B"),
        (("--wandb", PROJECT), {"WANDB_API_KEY": "x" * 40}, "no login at W&B"),
        (("--wandb", f"{ENTITY}/nothing"), {}, f"has no project {ENTITY}/nothing"),
        (("--wandb", "nobody/dlm"), {}, "has no project nobody/dlm"),
        (("--wandb", "dlm"), {}, "give it as ENTITY/PROJECT"),
        (("--wandb", PROJECT, "--filter", "group"), {}, "give KEY=VALUE"),
        (("--wandb", PROJECT, "--filter", "group=none"), {}, "nothing was written"),
        (("--wandb", PROJECT), {}, "none of the 1 runs in that project was launched by dlm: give --mapping"),
        ((), {}, "give a sweep, or --wandb"),
    ],
)
def test_a_mistake_on_the_command_line_is_refused_in_one_line(server, tmp_path, arguments, environ, words):
    server.add("image", config={"resolution": 64}, state="finished")
    out = ("--out", tmp_path / "out") if arguments else ()
    answer = (dlm_process if environ else dlm)(server, "collect", *arguments, *out, **environ)
    assert words in answer.complaint
    assert not (tmp_path / "out").exists()


def test_the_server_is_not_asked_when_the_tables_could_not_be_written(server, tmp_path):
    server.add("a", state="finished")
    (tmp_path / "file").write_text("")
    command = ("collect", "--wandb", PROJECT, "--out", tmp_path / "file/out")
    assert "file is no folder, and one belongs there" in dlm(server, *command).complaint and not server.asked
    command = (*command[:-1], tmp_path / "out", "--mapping", mapping_file(tmp_path), "--verify")
    assert "--verify is for runs that dlm launched" in dlm(server, *command).complaint and not server.asked


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": {"params": "n"}}, "maps no column tokens"),
        ({"columns": {**MAPPING["columns"], "loss": "x"}}, "unknown column"),
        ({"columns": {**MAPPING["columns"], "parms": "x"}}, "did you mean params"),
        ({"columns": {"params": {"config": "n", "value": 3}}}, "give exactly one of"),
        ({"history": {"step": "step"}}, "maps no validation loss"),
        ({"history": {"val/nll": "x"}}, "unknown history"),
        ({"convention": "7n"}, "unknown convention"),
        ({"convention": "full"}, "needs columns.flops"),
        ({"colums": {}}, "unknown key 'colums': did you mean columns"),
        ({"history": ["val/loss"]}, "history is .*: it must hold keys and values, such as"),
        ({"columns": {"params": {"confg": "n"}}}, "unknown key of columns.params 'confg': did you mean config"),
        ({"columns": {"params": [3]}}, "columns.params is .3.: it must hold keys of these, .*: scale, config, summary"),
        ({"columns": {"params": {"config": 3}}}, "columns.params.config is 3: it must be text, in quotes"),
        ({"columns": {"params": {"product": "n"}}}, r"columns.params.product is 'n': it must be a list of names, such"),
        ({"cell": "seed"}, r"cell is 'seed': it must be a list of names, such as \[seed\]"),
        ({"cell": 10**250}, "cell is 10*...: it must be a list of names"),
        ({"cell": 10**400}, "a number has 401 digits, and at most 300 are allowed"),
        ({"columns": {**MAPPING["columns"], "budget": {"config": "b", "scale": float("inf")}}}, "cannot be a factor"),
        ({"history": {"step": "step", "val/loss": {"metric": "x", "scale": 0}}}, "cannot be a factor"),
    ],
)
def test_a_mistake_in_a_mapping_is_named(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as error:
        load_mapping(mapping_file(tmp_path, **changes))
    assert not any(raw in str(error.value).lower() for raw in ("input should", "value error", "pydantic", "\n"))


def test_a_key_twice_in_a_mapping_is_refused(tmp_path):
    path = mapping_file(tmp_path)
    path.write_text(path.read_text() + "columns: {params: n}\n")
    with pytest.raises(UserError, match=r"has the key 'columns' in lines 1 and \d+: keep one of them"):
        load_mapping(path)


def test_a_long_wait_for_the_server_is_announced(server, tmp_path):
    remote_runs(server, 1)
    server.fail("Runs", slow_sec=1.5)
    command = ("collect", "--wandb", PROJECT, "--mapping", mapping_file(tmp_path), "--out", tmp_path / "out")
    code, _, warned = dlm_process(server, *command, patches="api.NOTICE_SEC = 0.5")
    first, *later = warned.splitlines()
    assert code == 0 and first == f"dlm: waiting for the runs of {PROJECT} from W&B ({server.url})"
    assert all(line.startswith("dlm: waiting for the histories") for line in later)  # on a busy machine
