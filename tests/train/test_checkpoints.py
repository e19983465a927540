"""Checkpoints: which are whole, how they are written, and which run may start from which."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from support.runs import SHORT, TINY, losses, only_run

from dlm.convert import main as convert
from dlm.core.files import read_json, write_atomic, write_json
from dlm.record.run import (
    read_status,
)
from dlm.train.checkpoint_files import damage, seal


def test_a_damaged_checkpoint_is_skipped_and_written_anew(launch, trained):
    run_dir = trained
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


def test_what_others_put_beside_checkpoints_is_not_written_to_and_remains_are_deleted(launch, trained, tmp_path):
    saved = trained / "checkpoints"
    (trained / "result.json").unlink()
    shutil.rmtree(saved / "step_00000040")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "state.ckpt").write_text("theirs")
    (saved / ".step_00000040.building").symlink_to(precious)
    (saved / ".step_00000038.0123").mkdir()  # as a killed attempt leaves it
    (saved / ".step_00000038.0123/state.ckpt").write_text("half")
    assert launch(*SHORT).code == 0
    assert damage(saved / "step_00000040") is None
    assert [path.name for path in precious.iterdir()] == ["state.ckpt"]
    assert (precious / "state.ckpt").read_text() == "theirs"
    assert [path for path in saved.glob(".*") if not path.is_symlink()] == []


def test_a_sealed_checkpoint_that_is_a_pickle_or_no_dictionary_is_one_line(launch, trained, tmp_path):
    (trained / "result.json").unlink()
    folder = trained / "checkpoints" / "step_00000040"
    for content, words in ((Path("x"), "cannot be read as a checkpoint"), ([1], "holds a list"), ({}, "global_step")):
        (folder / "manifest.json").unlink()
        torch.save(content, folder / "state.ckpt")
        seal(folder, step=40)
        assert damage(folder) is None
        assert words in launch(*SHORT).complaint


def test_a_checkpoint_of_a_newer_dlm_is_neither_skipped_nor_deleted(launch, trained, workdir, capfd):
    run_dir = trained
    (run_dir / "result.json").unlink()
    newest = run_dir / "checkpoints" / "step_00000040"
    manifest = read_json(newest / "manifest.json")
    write_json(newest / "manifest.json", {**manifest, "version": 2})
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")}
    words = f"{newest} has format 2, this dlm reads 1: update dlm"
    assert words in launch(*SHORT).complaint  # going on
    assert words in launch(*SHORT, f"ckpt_path={newest}", "sweep=branch").complaint
    for source in (run_dir, newest):
        assert convert([str(source), str(workdir / "weights.pt")]) == 2
        said = capfd.readouterr().err
        assert words in said and said.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")}


def test_an_asynchronous_checkpoint_holds_the_state_of_its_own_step(launch, workdir, monkeypatch):
    def states(run_dir: Path) -> dict[str, dict]:
        assert all(damage(folder) is None for folder in (run_dir / "checkpoints").iterdir())
        found = {folder.name: torch.load(folder / "state.ckpt", weights_only=True)
                 for folder in (run_dir / "checkpoints").iterdir()}  # fmt: skip
        return {name: {"parameters": state["state_dict"], "moments": state["optimizer_states"][0]["state"]}
                for name, state in found.items()}  # fmt: skip

    plain = TorchCheckpointIO.save_checkpoint

    def slow(*given, **named):
        time.sleep(0.1)  # as long as several steps
        plain(*given, **named)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", slow)
    settings = (*TINY, "training.steps=20", "callbacks.checkpoint.times=5", "callbacks.checkpoint.save_top_k=9")
    assert launch(*settings, f"paths.run_dir={workdir}/a").code == 0
    ended = launch(*settings, f"paths.run_dir={workdir}/b", "callbacks.checkpoint.asynchronous=true")
    assert ended.code == 0, ended.err
    torch.testing.assert_close(states(workdir / "b"), states(workdir / "a"), rtol=0, atol=0)
    assert losses(workdir / "b") == losses(workdir / "a")
    assert (workdir / "b" / "LATEST").read_text() == "step_00000020\n"


def test_an_asynchronous_checkpoint_that_cannot_be_written_stops_the_run(launch, workdir, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dlm.train.callbacks.checkpoint.seal", full)
    ended = launch(*SHORT, f"paths.run_dir={workdir}/a", "callbacks.checkpoint.asynchronous=true")
    assert ended.code == 1 and "dlm: no space left on the disk of" in ended.err and "Traceback" not in ended.err
    assert not (workdir / "a" / "result.json").exists() and read_status(workdir / "a").state == "failed"


def test_a_disk_that_is_full_after_a_new_checkpoint_gets_room_for_the_status(launch, workdir, monkeypatch):
    """If the new checkpoint fits and LATEST does not, the oldest checkpoint is deleted all the same."""

    def full(path, content):
        if len(list((workdir / "a/checkpoints").iterdir())) > 2:
            raise OSError(28, "No space left on device")
        write_atomic(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("dlm.train.callbacks.checkpoint.write_atomic", full)
        ended = launch(*SHORT, f"paths.run_dir={workdir}/a", "callbacks.checkpoint.save_top_k=0")
    assert ended.code == 1 and "dlm: no space left on the disk of" in ended.err
    status = read_status(workdir / "a")
    assert status is not None and status.state == "failed" and "no space left" in status.reason
    kept = sorted(path.name for path in (workdir / "a/checkpoints").iterdir())
    assert len(kept) == 2 and (workdir / "a/LATEST").read_text() == f"{kept[0]}\n"
    assert f"going on from {kept[1]}" in launch(*SHORT, f"paths.run_dir={workdir}/a").out


@pytest.mark.parametrize(("mode", "best"), [("min", min), ("max", max)])
def test_the_checkpoint_with_the_best_score_is_kept(mode, best, launch, workdir):
    steps = ("training.steps=16", "validation.times=8", "optimizer.lr=1e-2")
    assert launch(*TINY, *steps, f"callbacks.checkpoint.mode={mode}", f"paths.run_dir={workdir}/a").code == 0
    scores = {step: row["val/loss"] for step, row in losses(workdir / "a").items() if "val/loss" in row}
    assert list(scores) == list(range(2, 17, 2))
    del scores[16]  # it comes after the last deletion
    kept = {int(path.name[-8:]) for path in (workdir / "a/checkpoints").iterdir()}
    assert kept == {14, 16, best(scores, key=scores.__getitem__)}


def test_a_run_goes_on_with_another_micro_batch(launch, trained):
    run_dir = trained
    truth = losses(run_dir)
    (run_dir / "result.json").unlink()
    (run_dir / "checkpoints" / "step_00000040" / "state.ckpt").unlink()
    ended = launch(*SHORT, "data.micro_batch_size=2")
    assert ended.code == 0 and "going on from step_00000036" in ended.out
    resumed = losses(run_dir)
    assert resumed.keys() == truth.keys() and resumed != truth
    for step, row in truth.items():
        assert resumed[step] == pytest.approx(row, rel=1e-5)


def test_a_run_starts_from_a_checkpoint_of_the_same_model_only(launch, trained, workdir):
    trunk = trained
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
