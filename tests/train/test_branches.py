"""A branch starts from the checkpoint of a longer run, its trunk, and ends as it would from nothing, bit for bit."""

import dataclasses
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.runs import TINY, launch_here, losses, only_run, wait_for

from dlm.record.run import checkpoint_folder, checkpoint_steps, read_result, read_status, read_validation, write_result
from dlm.train.checkpoint_files import seal

WSD = (*TINY, "scheduler=wsd", "scheduler.warmup_tokens_per_param=0.4", "scheduler.decay_fraction=0.2",
       "trainer.log_every_n_steps=1", "sweep=shared")  # fmt: skip
TRUNK = (*WSD, "training.steps=120", "keep_steps=[40,65]")
SHORT, LONG, AT = (*WSD, "training.steps=50"), (*WSD, "training.steps=81"), 40


@pytest.fixture(scope="module")
def once(stdlib_data, tmp_path_factory):
    """The work directory with a trunk, and the folders of runs from nothing, which no test changes."""
    folder = tmp_path_factory.mktemp("trunk")
    launch_here(folder, *TRUNK)
    alone = []
    for name, settings in (("short", SHORT), ("long", LONG)):
        launch_here(folder / name, *settings)
        alone.append(only_run(folder / name, "shared"))
    return only_run(folder, "shared"), *alone


@pytest.fixture
def trunk(once, workdir):
    """A copy of the trunk in this test's work directory."""
    return shutil.copytree(once[0], workdir / "shared" / "runs" / once[0].name)


def branch_off(trunk: Path, settings: tuple[str, ...], step: int) -> tuple[str, ...]:
    return (*settings, f"parent={trunk.name}", f"branch_step={step}")


def outcome(run_dir: Path) -> tuple:
    """Everything that a run found out about its final loss."""
    result = read_result(run_dir)
    assert result is not None
    return result.loss, result.loss_se, result.tokens, result.step, read_validation(run_dir)


def test_a_trunk_keeps_the_checkpoints_of_its_branch_points(once):
    kept = checkpoint_steps(once[0])
    assert {40, 65, 108, 120} <= set(kept) and len(kept) <= 5  # and the last two and the best
    assert read_status(once[0]).steps_redone == 0


@pytest.mark.parametrize(("settings", "step", "place"), [(SHORT, 40, 1), (LONG, 65, 2)])
def test_a_branch_ends_as_it_would_from_nothing(settings, step, place, launch, once, trunk):
    ended = launch(*branch_off(trunk, settings, step))
    assert ended.code == 0 and f"starting from the checkpoint of its trunk {trunk.name} at step {step}" in ended.out
    alone = once[place]
    branch = trunk.with_name(alone.name)  # the same id
    seen = losses(branch)
    assert min(seen) == step + 1 and seen == {step: losses(alone)[step] for step in seen}
    assert outcome(branch) == outcome(alone)
    mine, its = read_result(branch), read_result(trunk)
    assert mine.attempts == 1 and mine.steps_redone == 0
    assert mine.wall_sec < its.wall_sec + read_result(alone).wall_sec


def test_a_branch_without_the_checkpoint_of_its_trunk_trains_from_nothing_and_says_so(launch, once, trunk):
    state = checkpoint_folder(trunk, AT) / "state.ckpt"
    state.write_bytes(state.read_bytes()[:-1])
    early = "the trunk stopped early, at step 30"
    for reason in ("state.ckpt is missing or has another size", "it does not exist", early):
        if reason == early:
            write_result(trunk, dataclasses.replace(read_result(trunk), step=30, stopped_early=True))
        ended = launch(*branch_off(trunk, SHORT, AT))
        said = f"starting from nothing instead of the checkpoint of its trunk {trunk.name} at step {AT}: {reason}"
        assert ended.code == 0 and said in ended.out
        branch = trunk.with_name(once[1].name)
        assert losses(branch) == losses(once[1]) and outcome(branch) == outcome(once[1])
        shutil.rmtree(branch)
        shutil.rmtree(checkpoint_folder(trunk, AT), ignore_errors=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["seed=1"], "seed 0 is not 1"),
        (["data.batch_size=4"], "data.batch_size 8 is not 4"),
        (["data.block_size=64"], "data.block_size 32 is not 64"),
        (["objective.eps=0.01"], "objective.eps 0.001 is not 0.01"),
        (["trainer.precision=bf16-mixed"], "precision None is not bf16-mixed"),
        (["optimizer.lr=1e-4"], "the checkpoint was trained with optimizer"),
        (["model=8k"], "the checkpoint is of another model"),
        (["scheduler.warmup_tokens_per_param=0.5"], "warmed up for 7 steps, this run warms up for 9, so it would not"),
        (["scheduler.warmup_tokens_per_param=null", "scheduler.warmup_min_steps=6"], "this run warms up for 6, so it"),
        (["training.steps=46"], "outside the constant part of a run of 46 steps"),
        (["training.steps=39"], "the checkpoint is at step 40, this run ends at 39"),
    ],
)
def test_a_branch_that_would_not_end_as_it_would_from_nothing_is_refused(changes, words, launch, trunk):
    assert words in launch(*branch_off(trunk, SHORT, AT), *changes).complaint


def test_a_run_with_another_schedule_cannot_branch_off(launch, trunk):
    words = launch(*TINY, "training.steps=50", "sweep=shared", f"parent={trunk.name}", f"branch_step={AT}").complaint
    assert "scheduler.name is cosine" in words and "set parent=null" in words


def test_the_same_holds_for_a_branch_from_ckpt_path(launch, once, trunk):
    start = f"ckpt_path={checkpoint_folder(trunk, AT)}"
    assert launch(*SHORT, start, "sweep=other").code == 0
    branch = only_run(trunk.parents[2], "other")
    assert outcome(branch) == outcome(once[1]) and branch.name != once[1].name
    assert "seed 0 is not 1" in launch(*SHORT, "seed=1", start, "sweep=other").complaint


def test_other_data_are_refused(launch, trunk):
    folder = checkpoint_folder(trunk, AT)
    state = torch.load(folder / "state.ckpt", weights_only=True)
    state["dlm"]["shared"]["data"]["hash"] = "another"
    torch.save(state, folder / "state.ckpt")
    (folder / "manifest.json").unlink()
    seal(folder, step=AT)
    assert "data.hash another is not" in launch(*branch_off(trunk, SHORT, AT)).complaint


def test_a_branch_with_checkpoints_of_its_own_goes_on_from_them(launch, once, trunk):
    branch = trunk.with_name(once[1].name)
    assert launch(*branch_off(trunk, SHORT, AT)).code == 0
    (branch / "result.json").unlink()
    shutil.rmtree(checkpoint_folder(branch, 50))
    shutil.rmtree(trunk)
    ended = launch(*branch_off(trunk, SHORT, AT))
    assert ended.code == 0 and "going on from step_000000" in ended.out and "trunk" not in ended.out
    assert outcome(branch) == outcome(once[1])


@pytest.mark.long  # tests/train/test_interruptions.py kills ordinary runs
def test_trunk_and_branch_that_are_killed_end_with_the_same_losses(start, launch, tmp_path, workdir):
    """Both are killed with -9 at a random step and go on."""
    wsd = (*WSD, "scheduler.decay_fraction=0.5")
    random_step, trunk = random.Random(16).randint, None
    for length, first, last in ((400, 1, 350), (240, 124, 220)):  # the trunk, then the branch
        settings = (*wsd, f"training.steps={length}")
        launch_here(tmp_path / str(length), *settings)
        truth = only_run(tmp_path / str(length), "shared")
        run_dir = workdir / "shared" / "runs" / truth.name
        settings = (*settings, "keep_steps=[123]") if trunk is None else branch_off(trunk, settings, 123)
        process, wanted = start(*settings), random_step(first, last)
        wait_for(lambda run_dir=run_dir, wanted=wanted: reached(run_dir) >= wanted, process=process)
        process.kill()
        assert process.wait() == -signal.SIGKILL and read_result(run_dir) is None
        assert launch(*settings).code == 0
        assert read_result(run_dir).attempts == 2 and outcome(run_dir) == outcome(truth)
        trunk = trunk or run_dir
    assert 123 in checkpoint_steps(trunk)


def reached(run_dir: Path) -> int:
    status = read_status(run_dir)
    return 0 if status is None else status.step
