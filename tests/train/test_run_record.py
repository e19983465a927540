"""What a run writes about itself, and what it learns."""

import csv
import dataclasses
import json
import math
import statistics
import time
from importlib import metadata

import pytest
import torch
import yaml
from support.runs import DEBUG, SHORT, TINY, losses, only_run, rows_of

from dlm.collect.tables import collect
from dlm.core.errors import UserError
from dlm.core.files import read_json
from dlm.core.recipe import derive
from dlm.record.outcomes import State
from dlm.record.run import (
    Status,
    paired_difference,
    read_result,
    read_status,
    read_validation,
    write_status,
)
from dlm.record.wandb import fitting_tags
from dlm.train.callbacks.record_writer import earlier_attempts
from dlm.train.checkpoint_files import damage
from dlm.train.models.lightning_module import DiffusionLMLightningModule


@pytest.mark.slow
def test_a_run_leaves_its_whole_record_and_a_second_start_trains_nothing(command, launch, stdlib_data, workdir):
    data_name = "python" * 12  # W&B allows 64 letters in a tag
    arguments = ("experiment=debug", "training.steps=40", "validation.num_sequences=16", f"data.name={data_name}")
    ended = command("dlm.launch", *arguments)
    assert ended.code == 0, ended.err
    run_dir = only_run(workdir)
    names = {path.name for path in run_dir.iterdir()} - {".hydra", "log.txt"}
    assert names == {"config.yaml", "env.json", "metrics.jsonl", "status.json", "checkpoints", "LATEST", "result.json",
                     "validation.csv", "wandb"}  # fmt: skip
    result, status = read_result(run_dir), read_status(run_dir)
    assert result is not None and status is not None
    assert (status.state, status.step, status.exit_code, status.attempts) == (State.DONE, 40, 0, 1)
    assert (result.cell_id, result.step, result.tokens) == (run_dir.name, 40, 40 * 8 * 128)
    assert result.unique_tokens == result.tokens  # one pass over the text, no sequence twice
    assert f"{result.loss:.4f}" in ended.out
    rows = rows_of(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 41))
    observed = {"lr", "grad_norm", "weight_norm", "tokens_per_sec", "step_time", "memory_bytes", "overflows"}
    assert {"tokens", "time", "train/loss", *observed} <= rows[5].keys()
    assert rows[5]["step_time"] * rows[5]["tokens_per_sec"] == pytest.approx(rows[5]["tokens"] / rows[5]["step"])
    assert 1e8 < rows[5]["memory_bytes"] < 1e11 and rows[5]["overflows"] == 0
    assert [row["step"] for row in rows if "val/loss" in row] == [10, 20, 30, 40]
    assert rows[-1]["val/loss"] == result.loss and 0 < rows[-1]["val/loss_se"] == result.loss_se
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["cell_id"] == run_dir.name
    (attempt,) = read_json(run_dir / "env.json")["attempts"]
    assert attempt["packages"]["torch"] == metadata.version("torch")
    assert (run_dir / "LATEST").read_text() == "step_00000040\n"
    assert damage(run_dir / "checkpoints" / "step_00000040") is None
    (logged,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    assert logged.name == f"run-adhoc-{run_dir.name}.wandb"
    assert all(tag.encode() in logged.read_bytes() for tag in fitting_tags([data_name, "masked_diffusion", "8k"]))

    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if ".hydra" not in path.parts}
    again = launch(*arguments)
    assert again.code == 0 and "nothing to train" in again.out
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if ".hydra" not in path.parts}


@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
def test_a_model_learns_more_than_letter_frequencies(objective, launch, workdir):
    settings = (
        "model=4k",
        "training.steps=300",
        "optimizer.lr=1e-2",
        "data.block_size=64",
        "validation.estimator=exact_count",
    )
    assert launch(*DEBUG, *settings, f"objective={objective}").code == 0
    result = read_result(only_run(workdir))
    assert result is not None and result.loss + 3 * result.loss_se < result.unigram_entropy
    assert (result.loss_se == 0) == (objective == "autoregressive") and result.estimator in ("exact_count", "exact")
    assert result.loss > 1  # gzip needs 1.3 nats a byte here: a tiny model below that has seen its targets


def test_losses_of_single_sequences_are_kept_and_can_be_paired(launch, workdir):
    settings = (*TINY, "training.steps=60", "validation.estimator=exact_count", "validation.num_sequences=64")
    for sweep, extra in (
        ("a", "seed=0"),
        ("b", "seed=1"),
        ("c", "validation.seed=7"),
        ("d", "objective=autoregressive"),
    ):
        assert launch(*settings, f"sweep={sweep}", extra).code == 0
    a, b, c, d = (only_run(workdir, sweep) for sweep in "abcd")
    results = {run_dir: read_result(run_dir) for run_dir in (a, b, c, d)}
    assert [result.estimator for result in results.values()] == ["exact_count"] * 3 + ["exact"]
    for run_dir, result in results.items():
        with open(run_dir / "validation.csv") as stream:
            rows = list(csv.DictReader(stream))
        assert [int(row["sequence"]) for row in rows] == list(range(len(rows))) and len(rows) == 64
        assert statistics.fmean(float(row["loss"]) for row in rows) == pytest.approx(result.loss, rel=1e-12)
        error = math.sqrt(sum(float(row["loss_se"]) ** 2 for row in rows)) / len(rows)
        assert error == pytest.approx(result.loss_se, rel=1e-12)
    for other in (b, d):  # the same sequences, whatever the objective
        difference, error = paired_difference(a, other)
        assert difference == pytest.approx(results[a].loss - results[other].loss, rel=1e-9)
        alone = [statistics.stdev(read_validation(run_dir)) / 8 for run_dir in (a, other)]
        assert 0 < error < 0.5 * math.hypot(*alone)  # what is hard for both cancels
    with pytest.raises(UserError, match=r"validation\.seed is 1234 and 7"):
        paired_difference(a, c)


def test_the_monitors_write_true_numbers(launch, workdir, monkeypatch):
    """The mean loss since the last row, the gradients' norm before they are clipped, MFU of a stated peak, the weights'
    norm, and every micro-batch with more masked than there is room for.
    """
    seen, norms = [], []
    plain, clip = DiffusionLMLightningModule.training_step, DiffusionLMLightningModule.configure_gradient_clipping

    def keep_loss(self, batch, batch_idx):
        loss = plain(self, batch, batch_idx)
        seen.append(loss.item())
        return loss

    def keep_norm(self, *given, **named):
        norms.append(sum(float(parameter.grad.double().square().sum()) for parameter in self.parameters()) ** 0.5)
        clip(self, *given, **named)

    monkeypatch.setattr(DiffusionLMLightningModule, "training_step", keep_loss)
    monkeypatch.setattr(DiffusionLMLightningModule, "configure_gradient_clipping", keep_norm)
    monkeypatch.setattr(
        "dlm.train.objectives.masked_diffusion.capacity", lambda *_, eps: 16
    )  # of about 64 masked tokens
    peak = "callbacks.speed_monitor.peak_flops_per_device=1e12"
    settings = (*TINY, "training.steps=20", "data.micro_batch_size=4", "trainer.log_every_n_steps=5", peak)
    assert launch(*settings).code == 0
    run_dir = only_run(workdir)
    rows = [row for row in rows_of(run_dir) if "train/loss" in row]
    assert [row["overflows"] for row in rows] == [10, 10, 10, 10]  # five steps of two
    means = [statistics.fmean(seen[start : start + 10]) for start in range(0, 40, 10)]
    assert [row["train/loss"] for row in rows] == pytest.approx(means, rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms[4::5], rel=1e-5) and max(norms[4::5]) > 1.1
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    per_step = derive(config).flops["full_masked_head"] / 20
    for row in rows:
        assert row["mfu"] == pytest.approx(per_step / row["step_time"] / 1e12, rel=1e-9) and row["mfu"] > 0
    state = torch.load(run_dir / "checkpoints" / "step_00000020" / "state.ckpt", weights_only=True)["state_dict"]
    norm = sum(float(value.double().square().sum()) for value in state.values()) ** 0.5
    assert rows[-1]["weight_norm"] == pytest.approx(norm, rel=1e-6) and norm != rows[0]["weight_norm"]


def test_validations_are_no_part_of_the_training_rate(launch, workdir, monkeypatch):
    """A validation that takes as long as many steps; wall time has it, step time and tokens per second do not."""
    plain, waits = DiffusionLMLightningModule.validation_step, 0.3

    phases = set()

    def slow(self, batch, batch_idx):
        time.sleep(waits)
        phases.add(read_status(only_run(workdir)).phase)
        plain(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionLMLightningModule, "validation_step", slow)
    assert launch(*TINY, "training.steps=40").code == 0
    run_dir = only_run(workdir)
    assert phases == {"validating"} and read_status(run_dir).phase is None
    for resumed in (False, True):
        result = read_result(run_dir)
        training_sec = result.tokens / result.tokens_per_sec
        assert result.wall_sec - training_sec == pytest.approx(3 * waits, abs=0.25)  # the fourth comes after
        rows = rows_of(run_dir)
        assert len(rows) == 40
        assert sorted(row["step_time"] for row in rows)[-3] < waits  # three validations lie between steps
        assert sum(row["step_time"] for row in rows) == pytest.approx(training_sec, rel=0.2)
        if not resumed:
            (run_dir / "result.json").unlink()
            (run_dir / "checkpoints" / "step_00000040" / "state.ckpt").unlink()
            assert "going on from step_00000036" in launch(*TINY, "training.steps=40").out


def test_a_development_run_keeps_nothing(launch, workdir):
    ended = launch(*DEBUG, "trainer.fast_dev_run=10")
    assert ended.code == 0 and "run directory" not in ended.out
    assert [path.name for path in only_run(workdir).iterdir()] in ([], [".hydra"])


def test_a_run_that_stops_early_is_done_and_laws_leave_it_out(launch, workdir):
    words = (*SHORT, "callbacks=early_stopping", "callbacks.early_stopping.patience=1",
             "+callbacks.early_stopping.min_delta=10")  # fmt: skip
    ended, run_dir = launch(*words), only_run(workdir)
    result, status = read_result(run_dir), read_status(run_dir)
    assert ended.code == 0 and "stopped early, at step 20 of 40: laws leave it out" in ended.out
    assert ended.out.splitlines()[-1] == f"run directory: {run_dir}"
    assert result is not None and (result.step, result.stopped_early) == (20, True)
    assert result.tokens * 2 == derive(yaml.safe_load((run_dir / "config.yaml").read_text())).tokens
    assert result.loss == losses(run_dir)[20]["val/loss"]
    assert status is not None and (status.state, status.step) == (State.DONE, 20)
    again = launch(*words)
    assert again.code == 0 and "is done (stopped early, at step 20 of 40): " in again.out
    collected = collect(workdir / "adhoc", verify=True)
    assert collected.runs.empty and not collected.warnings
    assert collected.excluded["reason"].tolist() == [
        "stopped early at step 20 of 40: laws need the loss at the planned last step: train it with `python -m "
        "dlm.launch --rerun` and without the callback that stopped it"
    ]
    assert launch(*SHORT, "--rerun").code == 0  # so it is done
    assert read_result(only_run(workdir)).step == 40  # type: ignore[union-attr]


def test_a_run_whose_time_is_over_has_no_result_and_goes_on(launch, workdir):
    assert "trainer.max_time ended the run at step " in launch(*SHORT, "+trainer.max_time={microseconds:1}").complaint
    assert read_result(only_run(workdir)) is None
    assert launch(*SHORT).code == 0 and read_result(only_run(workdir)).step == 40  # type: ignore[union-attr]


def test_a_run_killed_between_its_last_step_and_its_result_only_validates(launch, trained):
    run_dir = trained
    truth, before = losses(run_dir), read_result(run_dir)
    (run_dir / "result.json").unlink()
    ended = launch(*SHORT)
    after, status = read_result(run_dir), read_status(run_dir)
    assert ended.code == 0 and "going on from step_00000040" in ended.out
    assert before is not None and after is not None and status is not None and status.state is State.DONE
    assert (after.loss, after.loss_se, after.steps_redone) == (before.loss, before.loss_se, 0)
    assert (after.attempts, status.attempts) == (2, 2) and losses(run_dir) == truth


def test_every_attempt_adds_the_steps_that_it_computes_again(tmp_path):
    """Logged up to 50, resumed at 30; then up to 40 only, and resumed at 30 again: 20 and 10."""
    now = Status(state=State.RUNNING, step=50, steps=100, attempts=1, gpu_hours=1.0, started=1.0, updated=2.0)
    assert earlier_attempts(tmp_path, 0) == (1, 0, 0.0)
    for reached, redone in [(50, 20), (40, 30), (20, 30)]:
        now = dataclasses.replace(now, step=reached)
        write_status(tmp_path, now)
        attempts, total, spent = earlier_attempts(tmp_path, 30)
        assert (attempts, total, spent) == (now.attempts + 1, redone, 1.0)
        now = dataclasses.replace(now, attempts=attempts, steps_redone=total)


def test_a_multirun_has_a_directory_for_each_run(launch, workdir):
    assert launch("-m", *SHORT, "optimizer.lr=1e-3,3e-3").code == 0
    runs = [read_json(path) for path in workdir.glob("adhoc/runs/*/result.json")]
    assert len(runs) == len({run["loss"] for run in runs}) == 2
    rates = {yaml.safe_load(path.read_text())["optimizer"]["lr"] for path in workdir.glob("adhoc/runs/*/config.yaml")}
    assert rates == {1e-3, 3e-3}


@pytest.mark.long  # tests/submit/test_hydra.py has the same with stand-ins for the runs
def test_a_multirun_can_use_a_process_for_each_run(command, launch, stdlib_data, workdir):
    ended = command("dlm.launch", "-m", *SHORT, "optimizer.lr=1e-3,1e6", "hydra/launcher=submitit_local")
    assert ended.code == 3, ended.err  # the code of the run that went wrong
    states = {json.loads(path.read_text())["state"] for path in workdir.glob("adhoc/runs/*/status.json")}
    assert states == {"done", "diverged"}
    assert launch(*SHORT, "optimizer.lr=1e-3").out.count("nothing to train") == 1  # the same cell, whoever starts it
