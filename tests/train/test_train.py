"""One run from its command to its record: what it writes, what it learns, how it ends and how it goes on."""

import csv
import dataclasses
import json
import math
import signal
import statistics
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dlm.convert import main as convert
from dlm.core.errors import DivergedError, UserError
from dlm.core.files import read_json, read_jsonl, write_json
from dlm.core.lease import Lease
from dlm.core.recipe import derive
from dlm.data.packed import write_packed
from dlm.data.prepare.command import index_packed
from dlm.record.outcomes import State
from dlm.record.run import (
    Status,
    merge_metrics,
    paired_difference,
    read_result,
    read_status,
    read_validation,
    write_status,
)
from dlm.train.callbacks.record_writer import Spike, earlier_attempts
from dlm.train.checkpoint_files import damage
from dlm.train.models import encoder
from dlm.train.models.lightning_module import DiffusionLMLightningModule

DEBUG = ("experiment=debug", "logger=none", "validation.num_sequences=16")
SHORT = (*DEBUG, "training.steps=40")
TINY = (*DEBUG, "model=4k", "data.block_size=32", "validation.draws=2")  # two hundred steps a second


def only_run(workdir: Path, sweep: str = "adhoc") -> Path:
    (folder,) = (workdir / sweep / "runs").iterdir()
    return folder


def losses(run_dir: Path) -> dict[int, dict[str, float]]:
    """step -> what a run computed there, without what a clock measured."""
    names = ("train/loss", "val/loss", "val/loss_se", "grad_norm", "lr")
    rows = merge_metrics(read_jsonl(run_dir / "metrics.jsonl"))
    return {row["step"]: {name: row[name] for name in names if name in row} for row in rows}


def wait_for(condition, *, process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def undisturbed(launch, tmp_path, monkeypatch):
    """The same run in another work directory, from start to end at once."""

    def run(*overrides: str) -> Path:
        with monkeypatch.context() as patch:
            patch.setenv("DLM_WORKDIR", str(tmp_path / "undisturbed"))
            assert launch(*overrides).code == 0
        return only_run(tmp_path / "undisturbed")

    return run


@pytest.mark.slow
def test_a_run_leaves_its_whole_record_and_a_second_start_trains_nothing(command, launch, stdlib_data, workdir):
    arguments = ("experiment=debug", "training.steps=40", "validation.num_sequences=16")  # with W&B, offline
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
    rows = merge_metrics(read_jsonl(run_dir / "metrics.jsonl"))
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
    assert logged.name == f"run-adhoc-{run_dir.name}.wandb" and logged.stat().st_size > 0

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


def test_the_losses_of_single_sequences_are_kept_and_pair(launch, workdir):
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


@pytest.mark.slow
def test_killed_without_warning_it_goes_on_bit_for_bit(start, launch, undisturbed, workdir):
    settings = (*TINY, "training.steps=400")
    process = start(*settings)
    wait_for(lambda: list(workdir.glob("adhoc/runs/*/checkpoints/step_*/manifest.json")), process=process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run_dir = only_run(workdir)
    reached = max(losses(run_dir))
    assert 40 <= reached < 400 and not (run_dir / "result.json").exists()  # strictly between checkpoint and end

    resumed = launch(*settings)
    assert resumed.code == 0 and "going on from step_" in resumed.out
    assert int(resumed.out.split("going on from step_")[1][:8]) >= 40
    status, result = read_status(run_dir), read_result(run_dir)
    assert status is not None and status.attempts == 2 and result is not None and result.attempts == 2
    truth = undisturbed(*settings)
    assert losses(run_dir) == losses(truth)
    finished = read_result(truth)
    assert finished is not None and (result.loss, result.loss_se) == (finished.loss, finished.loss_se)
    assert finished.steps_redone == 0 <= result.steps_redone < 400


@pytest.mark.slow
def test_a_signal_ends_it_with_75_and_it_goes_on_where_it_was(start, launch, undisturbed, workdir):
    settings = (*TINY, "training.steps=450", "data.micro_batch_size=4")  # logs every 5 steps, of 2 micro-batches each
    process = start(*settings)
    wait_for(lambda: "train/loss" in "".join(p.read_text() for p in workdir.glob("adhoc/runs/*/metrics.jsonl")),
             process=process)  # fmt: skip
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    run_dir = only_run(workdir)
    status = read_status(run_dir)
    assert status is not None and (status.state, status.exit_code) == (State.PREEMPTED, 75)
    assert not (run_dir / "result.json").exists() and not (run_dir / "lease.json").exists()
    stopped = int((run_dir / "LATEST").read_text().removeprefix("step_"))

    resumed = launch(*settings)
    assert resumed.code == 0 and f"going on from step_{stopped:08d}" in resumed.out
    assert losses(run_dir) == losses(undisturbed(*settings))
    result = read_result(run_dir)
    assert result is not None and result.steps_redone == 0  # nothing was computed twice


@pytest.mark.slow
def test_a_storm_of_signals_ends_it_with_75_all_the_same(start, workdir):
    """A scheduler, a pool and a user may each send one, also while the interpreter ends."""
    process = start(*TINY, "training.steps=4000")
    wait_for(lambda: "train/loss" in "".join(p.read_text() for p in workdir.glob("adhoc/runs/*/metrics.jsonl")),
             process=process)  # fmt: skip
    sent = 0
    while process.poll() is None:
        process.send_signal((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)[sent % 3])
        sent += 1
        time.sleep(0.002)
    status = read_status(only_run(workdir))
    assert process.returncode == 75 and sent > 5
    assert status is not None and (status.state, status.exit_code) == (State.PREEMPTED, 75)


def test_damaged_checkpoints_are_passed_over(launch, workdir):
    assert launch(*SHORT).code == 0
    run_dir = only_run(workdir)
    truth = losses(run_dir)
    saved = sorted((run_dir / "checkpoints").iterdir())
    assert [path.name for path in saved][-2:] == ["step_00000036", "step_00000040"]  # two are always kept

    def truncate(folder: Path) -> None:
        with open(folder / "state.ckpt", "r+b") as stream:
            stream.truncate(1000)

    def flip_a_bit(folder: Path) -> None:
        data = bytearray((folder / "state.ckpt").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "state.ckpt").write_bytes(data)

    def tear_manifest(folder: Path) -> None:
        (folder / "manifest.json").write_text('{"version": 1, "fi')

    for harm in (truncate, flip_a_bit, tear_manifest):
        (run_dir / "result.json").unlink()
        harm(sorted((run_dir / "checkpoints").iterdir())[-1])
        (run_dir / "LATEST").write_text("step_9999")  # only a hint
        ended = launch(*SHORT)
        assert ended.code == 0 and "going on from step_00000036" in ended.out, harm
        assert "step_00000040 is damaged" in ended.out
        assert losses(run_dir) == truth
        assert damage(run_dir / "checkpoints" / "step_00000040") is None  # written anew

    (run_dir / "result.json").unlink()
    for folder in (run_dir / "checkpoints").iterdir():
        truncate(folder)
    assert "going on" not in launch(*SHORT).out  # from nothing
    assert losses(run_dir) == truth


def test_a_checkpoint_of_a_newer_dlm_is_neither_passed_over_nor_deleted(launch, workdir, capfd):
    assert launch(*TINY, "training.steps=20").code == 0
    run_dir = only_run(workdir)
    (run_dir / "result.json").unlink()
    newest = run_dir / "checkpoints" / "step_00000020"
    manifest = read_json(newest / "manifest.json")
    write_json(newest / "manifest.json", {**manifest, "version": 2})
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")}
    words = f"{newest} has format 2, this dlm reads 1: update dlm"
    assert words in launch(*TINY, "training.steps=20").complaint  # going on
    assert words in launch(*TINY, "training.steps=20", f"ckpt_path={newest}", "sweep=branch").complaint
    for source in (run_dir, newest):
        assert convert([str(source), str(workdir / "weights.pt")]) == 2
        said = capfd.readouterr().err
        assert words in said and said.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")}


def test_a_checkpoint_written_while_steps_run_is_that_of_its_own_step(launch, workdir, monkeypatch):
    def states(run_dir: Path) -> dict[str, dict]:
        assert all(damage(folder) is None for folder in (run_dir / "checkpoints").iterdir())
        found = {folder.name: torch.load(folder / "state.ckpt", weights_only=True)
                 for folder in (run_dir / "checkpoints").iterdir()}  # fmt: skip
        return {name: {"parameters": state["state_dict"], "moments": state["optimizer_states"][0]["state"]}
                for name, state in found.items()}  # fmt: skip

    plain = TorchCheckpointIO.save_checkpoint

    def slow(*given, **named):
        time.sleep(0.3)  # as long as several steps
        plain(*given, **named)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", slow)
    keep = "callbacks.checkpoint.save_top_k=9"
    assert launch(*SHORT, keep, f"paths.run_dir={workdir}/a").code == 0
    ended = launch(*SHORT, keep, f"paths.run_dir={workdir}/b", "callbacks.checkpoint.asynchronous=true")
    assert ended.code == 0, ended.err
    torch.testing.assert_close(states(workdir / "b"), states(workdir / "a"), rtol=0, atol=0)
    assert losses(workdir / "b") == losses(workdir / "a")
    assert (workdir / "b" / "LATEST").read_text() == "step_00000040\n"


def test_a_checkpoint_that_cannot_be_written_by_the_thread_stops_the_run(launch, workdir, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dlm.train.callbacks.checkpoint.seal", full)
    ended = launch(*SHORT, f"paths.run_dir={workdir}/a", "callbacks.checkpoint.asynchronous=true")
    assert ended.code == 1 and "dlm: no space left on the disk of" in ended.err and "Traceback" not in ended.err
    assert not (workdir / "a" / "result.json").exists() and read_status(workdir / "a").state == "failed"


def test_a_resume_with_another_split_of_the_batch_goes_on(launch, workdir):
    assert launch(*SHORT).code == 0
    run_dir = only_run(workdir)
    truth = losses(run_dir)
    (run_dir / "result.json").unlink()
    (run_dir / "checkpoints" / "step_00000040" / "state.ckpt").unlink()
    ended = launch(*SHORT, "data.micro_batch_size=2")
    assert ended.code == 0 and "going on from step_00000036" in ended.out
    resumed = losses(run_dir)
    assert resumed.keys() == truth.keys() and resumed != truth
    for step, row in truth.items():
        assert resumed[step] == pytest.approx(row, rel=1e-5)


def test_steps_redone_are_those_of_each_attempt(tmp_path):
    """Logged up to 50, resumed at 30; then up to 40 only, and resumed at 30 again: 20 and 10."""
    now = Status(state=State.RUNNING, step=50, steps=100, attempts=1, gpu_hours=1.0, started=1.0, updated=2.0)
    assert earlier_attempts(tmp_path, 0) == (1, 0, 0.0)
    for reached, redone in [(50, 20), (40, 30), (20, 30)]:
        now = dataclasses.replace(now, step=reached)
        write_status(tmp_path, now)
        attempts, total, spent = earlier_attempts(tmp_path, 30)
        assert (attempts, total, spent) == (now.attempts + 1, redone, 1.0)
        now = dataclasses.replace(now, attempts=attempts, steps_redone=total)


def test_divergence_is_said_with_exit_code_3(launch, workdir):
    ended = launch(*SHORT, "optimizer.lr=1e6")
    status = read_status(only_run(workdir))
    assert ended.code == 3 and "loss is nan" in ended.err
    assert status is not None and status.state is State.DIVERGED and "loss is nan at step" in str(status.reason)
    assert read_result(only_run(workdir)) is None
    assert all(math.isfinite(value) for row in losses(only_run(workdir)).values() for value in row.values())


def test_a_loss_that_rises_for_good_is_divergence(launch, workdir):
    """The learning rate jumps by far in the middle of a run that had learnt."""
    ended = launch(*TINY, "training.steps=200", "optimizer.lr=3.0", "scheduler.warmup_fraction=0.9",
                   "optimizer.gradient_clip_val=null")  # fmt: skip
    status = read_status(only_run(workdir))
    assert ended.code == 3 and status is not None and status.state is State.DIVERGED
    assert "the training loss rose to" in str(status.reason) and "more than 2.00 higher" in str(status.reason)
    calm = launch(*TINY, "training.steps=200", "optimizer.lr=3.0", "scheduler.warmup_fraction=0.9", "sweep=never",
                  "optimizer.gradient_clip_val=null", "callbacks.record.spike=null")  # fmt: skip
    assert calm.code == 0


def test_a_spike_is_told_from_noise():
    noise = np.random.default_rng(0)

    def steps_until_divergence(losses, limit=2.0):
        spike = Spike(limit)
        for step, loss in enumerate(losses):
            try:
                spike.check(loss, vocab_size=256, step=step)
            except DivergedError:
                return step
        return None

    for _ in range(200):  # a learning curve as noisy as the smallest batches are: heavy tails to one side
        curve = 2.5 + 3 * np.exp(-np.arange(400) / 40)
        assert steps_until_divergence(curve * noise.lognormal(0, 0.2, 400)) is None
    calm, lost = np.full(100, 2.5), np.full(20, 5.5)
    assert steps_until_divergence([*calm, *lost]) == 103  # four of five: 4.9 is above 2.5 + 2
    assert steps_until_divergence([*calm, 30.0, *calm]) == 100  # one step as bad as five
    assert steps_until_divergence([*calm, 5.5, 5.5, *calm]) is None
    assert steps_until_divergence([*calm, *lost], limit=None) is None


def test_the_split_of_a_batch_changes_nothing_but_rounding(launch, workdir):
    for micro in (8, 2):
        assert launch(*SHORT, f"data.micro_batch_size={micro}", f"paths.run_dir={workdir}/{micro}").code == 0
    whole, split = losses(workdir / "8"), losses(workdir / "2")
    assert whole.keys() == split.keys() == set(range(1, 41))
    for step, row in whole.items():
        assert split[step] == pytest.approx(row, rel=1e-5)
    assert whole != split  # they were two computations
    cells = {read_result(workdir / name).cell_id for name in "82"}  # type: ignore[union-attr]
    assert len(cells) == 1


def test_a_development_run_keeps_nothing(launch, workdir):
    assert launch(*DEBUG, "trainer.fast_dev_run=10").code == 0
    assert [path.name for path in only_run(workdir).iterdir()] in ([], [".hydra"])


def test_a_profiler_and_a_precision_by_name(launch, workdir, caplog):
    ended = launch(*SHORT, "profiler=simple", "trainer.precision=bf16-mixed")
    assert ended.code == 0 and "run_training_batch" in ended.err + caplog.text  # the profiler's table
    rough = losses(only_run(workdir))
    assert launch(*SHORT, f"paths.run_dir={workdir}/exact").code == 0
    exact = losses(workdir / "exact")
    assert rough[1] != exact[1] and rough[1]["train/loss"] == pytest.approx(exact[1]["train/loss"], rel=0.01)


def test_what_the_monitors_write_is_so(launch, workdir, monkeypatch):
    """MFU of a stated peak, the weights' norm, and every micro-batch with more masked than there is room for."""
    monkeypatch.setattr(
        "dlm.train.objectives.masked_diffusion.capacity", lambda *_, eps: 16
    )  # of about 64 masked tokens
    peak = "callbacks.speed_monitor.peak_flops_per_device=1e12"
    settings = (*TINY, "training.steps=20", "data.micro_batch_size=4", "trainer.log_every_n_steps=5", peak)
    assert launch(*settings).code == 0
    run_dir = only_run(workdir)
    rows = [row for row in merge_metrics(read_jsonl(run_dir / "metrics.jsonl")) if "train/loss" in row]
    assert [row["overflows"] for row in rows] == [10, 10, 10, 10]  # five steps of two
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    per_step = derive(config).flops["full_masked_head"] / 20
    for row in rows:
        assert row["mfu"] == pytest.approx(per_step / row["step_time"] / 1e12, rel=1e-9) and row["mfu"] > 0
    state = torch.load(run_dir / "checkpoints" / "step_00000020" / "state.ckpt", weights_only=True)["state_dict"]
    norm = sum(float(value.double().square().sum()) for value in state.values()) ** 0.5
    assert rows[-1]["weight_norm"] == pytest.approx(norm, rel=1e-6) and norm != rows[0]["weight_norm"]


@pytest.mark.slow
def test_a_compiled_run_computes_the_same(launch, workdir, monkeypatch):
    compiled = []

    def look(loss, plain=torch.compile, **options):
        result = plain(loss, **options)

        def counted(*given):
            compiled.append(given)
            return result(*given)

        return counted

    settings = (*TINY, "training.steps=4", "validation.num_sequences=4", "validation.times=1")
    assert launch(*settings, f"paths.run_dir={workdir}/plain").code == 0
    monkeypatch.setattr(torch, "compile", look)
    assert launch(*settings, f"paths.run_dir={workdir}/compiled", "trainer.compile=true").code == 0
    assert len(compiled) >= 5  # four steps and a validation
    a, b = losses(workdir / "plain"), losses(workdir / "compiled")
    assert a.keys() == b.keys()
    for step, row in a.items():
        assert b[step] == pytest.approx(row, rel=1e-4)
    assert damage(workdir / "compiled" / "checkpoints" / "step_00000004") is None


def test_a_run_in_bf16_true_keeps_its_rotary_tables(launch, workdir, monkeypatch):
    seen = set()
    plain = encoder.Block.forward

    def look(self, x, cos, sin, causal):
        seen.add((x.dtype, self.mlp.down.weight.dtype, cos.dtype, sin.dtype))
        return plain(self, x, cos, sin, causal)

    monkeypatch.setattr(encoder.Block, "forward", look)
    assert launch(*SHORT, "trainer.precision=bf16-true").code == 0
    assert seen == {(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)}
    rough = losses(only_run(workdir))
    assert launch(*SHORT, f"paths.run_dir={workdir}/exact").code == 0
    exact = losses(workdir / "exact")
    assert rough[1] != exact[1] and rough[1]["train/loss"] == pytest.approx(exact[1]["train/loss"], rel=0.01)
    assert rough[40]["val/loss"] < rough[10]["val/loss"]  # it learns, if less


def test_validations_are_no_part_of_the_training_rate(launch, workdir, monkeypatch):
    """A validation that takes as long as many steps; wall time has it, step time and tokens per second do not."""
    plain, waits = DiffusionLMLightningModule.validation_step, 0.3

    def slow(self, batch, batch_idx):
        time.sleep(waits)
        plain(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionLMLightningModule, "validation_step", slow)
    assert launch(*TINY, "training.steps=40").code == 0
    run_dir = only_run(workdir)
    for resumed in (False, True):
        result = read_result(run_dir)
        training_sec = result.tokens / result.tokens_per_sec
        assert result.wall_sec - training_sec == pytest.approx(3 * waits, abs=0.25)  # the fourth comes after
        rows = merge_metrics(read_jsonl(run_dir / "metrics.jsonl"))
        assert len(rows) == 40
        assert sorted(row["step_time"] for row in rows)[-3] < waits  # three validations lie between steps
        assert sum(row["step_time"] for row in rows) == pytest.approx(training_sec, rel=0.2)
        if not resumed:
            (run_dir / "result.json").unlink()
            (run_dir / "checkpoints" / "step_00000040" / "state.ckpt").unlink()
            assert "going on from step_00000036" in launch(*TINY, "training.steps=40").out


def test_stopped_early_it_has_no_result(launch, workdir):
    ended = launch(*SHORT, "callbacks=early_stopping", "callbacks.early_stopping.patience=1",
                   "+callbacks.early_stopping.min_delta=10")  # fmt: skip
    assert "stopped at step 20 of 40" in ended.complaint
    assert read_result(only_run(workdir)) is None


def test_start_from_a_checkpoint_of_the_same_model_only(launch, workdir):
    assert launch(*SHORT).code == 0
    trunk = only_run(workdir)
    step_36 = trunk / "checkpoints" / "step_00000036"
    branch = launch(*SHORT, f"ckpt_path={step_36}", "sweep=branches")
    assert branch.code == 0
    branched = only_run(workdir, "branches")
    assert branched.name != trunk.name  # where it starts from decides the result
    assert min(losses(branched)) == 37 and losses(branched)[40] == losses(trunk)[40]

    refused = launch(*SHORT, f"ckpt_path={step_36}", "model=4k").complaint
    assert "another model (n_layer 2 is not 1)" in refused and "change ckpt_path or model" in refused
    assert "optimizer" in launch(*SHORT, f"ckpt_path={step_36}", "optimizer.lr=1e-4").complaint
    assert "objective" in launch(*SHORT, f"ckpt_path={step_36}", "objective=autoregressive").complaint
    assert "does not exist" in launch(*SHORT, "ckpt_path=nowhere").complaint
    shorter = launch(*SHORT, "training.steps=30", f"ckpt_path={step_36}").complaint
    assert "is at step 36, this run ends at 30" in shorter and "training.steps" in shorter


def test_a_cooldown_branch_ends_where_a_run_of_its_length_ends(launch, workdir):
    """From a trunk that is longer; bit for bit, so one trunk serves all lengths."""
    wsd = (*TINY, "scheduler=wsd", "scheduler.warmup_min_steps=5")
    assert launch(*wsd, "sweep=trunk", "training.steps=100", "callbacks.checkpoint.every_n_steps=41").code == 0
    start = only_run(workdir, "trunk") / "checkpoints" / "step_00000082"
    assert launch(*wsd, "sweep=whole", "training.steps=92").code == 0
    assert launch(*wsd, "sweep=branch", "training.steps=92", f"ckpt_path={start}").code == 0
    whole, branch = (losses(only_run(workdir, sweep)) for sweep in ("whole", "branch"))
    assert min(branch) > 80 and branch == {step: whole[step] for step in branch}
    assert branch[92]["lr"] < branch[88]["lr"] < branch[84]["lr"]
    short = launch(*wsd, "sweep=short", "training.steps=85", f"ckpt_path={start}")
    assert short.code == 2 and "outside the constant part of a run of 85 steps" in short.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model=171M",), ("unknown model '171M'", "did you mean 170M")),
        (("objective=masked_difusion",), ("unknown objective", "did you mean masked_diffusion?")),
        (("experiment=debgu",), ("unknown experiment", "did you mean debug")),
        ((*SHORT, "optimizer.lrr=1e-3"), ("optimizer.lrr", "did you mean optimizer.lr")),
        ((*SHORT, "training.step=40"), ("training.step", "did you mean training.steps")),
        ((*SHORT, "scheduler.name=cosin"), ("scheduler.name", "did you mean cosine")),
        ((*SHORT, "callbacks.record.spike=x"), ("record.spike is 'x'", "from 0")),
        ((*SHORT, "callbacks.checkpoint.every_n_steps=0"), ("checkpoint.every_n_steps is 0", "at least 1")),
        ((*SHORT, "callbacks.checkpoint.mode=least"), ("checkpoint.mode 'least'", "allowed: min, max")),
        ((*SHORT, "callbacks.checkpoint.asynchronous=maybe"), ("checkpoint.asynchronous is 'maybe'", "true and false")),
        ((*SHORT, "trainer.devices=3"), ("8", "3 devices", "data.batch_size", "trainer.devices")),
        ((*SHORT, "data.micro_batch_size=3"), ("micro_batch_size 3", "8 sequences")),
        (("experiment=debug", "training.steps=null", "training.budget=1e9"), ("fewer than 20", "training.budget")),
        (("experiment=debug", "training.steps=null", "training.budget=-1"), ("training.budget", "-1", "above zero")),
        (("experiment=debug", "training.steps=null"), ("training.budget", "training.steps")),
        ((*SHORT, "training.steps=0"), ("training.steps", "0", "at least 1")),
        ((*SHORT, "model=6M"), ("vocab_size 32000", "256", "stdlib")),
        ((*SHORT, "data.block_size=512"), ("data.block_size 512", "256", "model.block_size")),
        ((*SHORT, "data=slim_pajama"), ("no prepared data", "dlm prepare packed", "data.data_dir")),
        ((*SHORT, "+trainer.max_steps=7"), ("trainer.max_steps", "training.steps")),
        ((*SHORT, "+trainer.no_such=7"), ("Lightning refuses", "no_such")),
        ((*SHORT, "trainer.precision=bf16"), ("trainer.precision", "did you mean bf16-")),
        ((*SHORT, "optimizer.name=adam"), ("optimizer.name", "did you mean adamw")),
        ((*SHORT, "optimizer.decay=some"), ("optimizer.decay 'some'", "allowed: all, matrices")),
        ((*SHORT, "trainer.attention=flesh"), ("trainer.attention 'flesh'", "did you mean flash")),
        ((*SHORT, "trainer.strategy=fsdp"), ("trainer.strategy 'fsdp'", "did you mean fsdp2")),
        ((*SHORT, "trainer.devices=auto"), ("trainer.devices is 'auto'", "at least 1")),
        ((*SHORT, "objective.eps=2"), ("objective.eps is 2", "to 0.999")),
        ((*SHORT, "objective.weight=elb"), ("objective.weight 'elb'", "did you mean elbo")),
        ((*SHORT, "validation.estimator=exact"), ("validation.estimator", "exact_count")),
        ((*SHORT, "trainer.threads=-1"), ("trainer.threads is -1", "at least 1")),
        ((*SHORT, "trainer.compile=maybe"), ("trainer.compile is 'maybe'", "true and false")),
        ((*SHORT, "trainer.activation_checkpointing=1"), ("activation_checkpointing is 1", "true and false")),
        ((*SHORT, "training.budget=-4"), ("training.budget is -4", "above zero")),
        ((*SHORT, "sweep=../../x"), ("sweep is '../../x'", "allowed are letters")),
        ((*SHORT, "trainer.profiler=simple"), ("unknown key 'trainer.profiler'", "or profiler")),
        ((*SHORT, "ckpt_path=/etc/hostname"), ("ckpt_path /etc/hostname cannot be read", "step_* folder")),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value[0], str) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(overrides, words, launch, workdir):
    complaint = launch(*overrides).complaint
    assert all(word in complaint for word in words), complaint
    assert not list(workdir.glob("*/runs/*/checkpoints"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("split", "token"), [("train", 256), ("validation", -1)])
def test_a_token_beyond_the_vocabulary_is_one_line(split, token, workers, launch, workdir, tmp_path):
    """In a file of the same size as the one that was indexed."""
    for name in ("train", "validation"):
        write_packed(tmp_path / f"{name}.bin", np.full(2048, 7, dtype=np.int16))
    index_packed(tmp_path, vocab_size=256, bos_id=0, tokenizer="none")
    write_packed(tmp_path / f"{split}.bin", np.full(2048, token, dtype=np.int16))
    data = (f"data.data_dir={tmp_path}", "data.prepare=null", f"data.num_workers={workers}")
    complaint = launch(*TINY, "training.steps=4", *data).complaint
    assert f"{tmp_path} holds token {token}, its vocabulary has 256: a file was replaced" in complaint


def test_a_run_that_lives_is_not_started_twice(launch, workdir):
    assert launch(*SHORT).code == 0
    run_dir = only_run(workdir)
    (run_dir / "result.json").unlink()
    with Lease(run_dir):
        assert "is being run by process" in launch(*SHORT).complaint
    assert not (run_dir / "result.json").exists()


def test_killed_between_the_last_step_and_the_result_it_only_validates(launch, workdir):
    assert launch(*SHORT).code == 0
    run_dir = only_run(workdir)
    truth, before = losses(run_dir), read_result(run_dir)
    (run_dir / "result.json").unlink()
    ended = launch(*SHORT)
    after, status = read_result(run_dir), read_status(run_dir)
    assert ended.code == 0 and "going on from step_00000040" in ended.out
    assert before is not None and after is not None and status is not None and status.state is State.DONE
    assert (after.loss, after.loss_se, after.steps_redone) == (before.loss, before.loss_se, 0)
    assert (after.attempts, status.attempts) == (2, 2) and losses(run_dir) == truth


def test_a_multirun_has_a_directory_for_each_run(launch, workdir):
    assert launch("-m", *SHORT, "optimizer.lr=1e-3,3e-3").code == 0
    runs = [read_json(path) for path in workdir.glob("adhoc/runs/*/result.json")]
    assert len(runs) == len({run["loss"] for run in runs}) == 2
    rates = {yaml.safe_load(path.read_text())["optimizer"]["lr"] for path in workdir.glob("adhoc/runs/*/config.yaml")}
    assert rates == {1e-3, 3e-3}


@pytest.mark.slow
def test_a_multirun_in_processes_of_its_own(command, launch, stdlib_data, workdir):
    ended = command("dlm.launch", "-m", *SHORT, "optimizer.lr=1e-3,1e6", "hydra/launcher=submitit_local")
    assert ended.code == 3, ended.err  # the code of the run that went wrong
    states = {json.loads(path.read_text())["state"] for path in workdir.glob("adhoc/runs/*/status.json")}
    assert states == {"done", "diverged"}
    assert launch(*SHORT, "optimizer.lr=1e-3").out.count("nothing to train") == 1  # the same cell, whoever starts it
