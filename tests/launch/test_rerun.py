"""A run that is done: what is still checked, how fast it says so, and how --rerun trains it anew."""

import shutil
import subprocess
import sys

import pytest
from support.runs import TINY, losses, only_run, train_here

from dlm.collect.tables import collect
from dlm.core.lease import Lease
from dlm.core.paths import PACKAGE
from dlm.record.outcomes import State
from dlm.record.run import read_result, read_status
from dlm.submit.state import cells_now

RUN = (*TINY, "training.steps=20")
LOADED = """
import sys
from dlm import launch
code = launch.main()
print(code, *[name for name in ("torch", "lightning", "wandb", "pandas") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def done_once(stdlib_data, tmp_path_factory):
    """A run of RUN that is done, which no test changes."""
    return train_here(tmp_path_factory.mktemp("done"), *RUN)


@pytest.fixture
def done(done_once, workdir):
    """A copy of the run, in this test's work directory."""
    return shutil.copytree(done_once, workdir / "adhoc/runs" / done_once.name)


@pytest.mark.parametrize(
    "word",
    ["trainer.attention=fa9", "profiler=slow", "trainer.precision=8-true", "trainer.strategy=zero",
     "trainer.accelerator=tpu", "+trainer.gradient_clip_algorithm=sum", "callbacks.lr_monitor.logging_interval=day"],
)  # fmt: skip
def test_a_name_that_no_run_knows_is_refused_even_if_the_run_is_done(word, launch, done):
    key, _, name = word.lstrip("+").partition("=")
    assert f"unknown {key} '{name}': " in launch(*RUN, word).complaint


def test_a_run_that_is_done_says_so_without_torch_and_names_the_flag(done):
    ended = subprocess.run([sys.executable, "-c", LOADED, *RUN], cwd=PACKAGE.parent, capture_output=True, text=True)
    said, loaded = ended.stdout.splitlines()
    assert said.startswith(f"{done.name} is done: ") and said.endswith("nothing to train; --rerun trains it anew")
    assert loaded == "0"


def test_rerun_trains_a_run_anew_and_keeps_the_earlier_one_where_nothing_collects_it(launch, done, workdir):
    words, log = (done / ".hydra/overrides.yaml").read_text(), losses(done)
    (done / "mark").touch()
    for number in (1, 2):
        ended, kept = launch(*RUN, "--rerun"), workdir / f"adhoc/set_aside/{done.name}-{number}"
        before, after = read_result(kept), read_result(only_run(workdir))
        assert ended.code == 0 and before is not None and after is not None and after.finished > before.finished
        said = f"{done.name} is trained anew: its earlier run ({before.loss:.4f} nats/token) is now in {kept}"
        assert said in ended.out
        assert after.loss == before.loss and after.attempts == 1 and losses(done) == losses(kept) == log
        assert not (kept / "lease.json").exists() and not (done / "mark").exists()
    assert (workdir / f"adhoc/set_aside/{done.name}-1/mark").is_file()
    assert (done / ".hydra/overrides.yaml").read_text() == words
    collected = collect(workdir / "adhoc")
    assert len(collected.runs) + len(collected.excluded) == 1  # it is too short to learn
    assert cells_now([(done.name, 20)], workdir / "adhoc")[0][done.name].state is State.DONE
    assert "--rerun" not in sys.argv  # else the processes that Lightning starts for other devices would see it


def test_rerun_continues_a_run_that_is_not_done(launch, done, workdir):
    (done / "result.json").unlink()
    assert "going on from step_00000020" in launch(*RUN, "--rerun").out
    assert not (workdir / "adhoc/set_aside").exists()


def test_what_cannot_run_is_not_moved(launch, done, workdir, monkeypatch):
    before = read_status(done)
    for word in ("optimizer.betas=1", "trainer.attention=fa9"):
        assert launch(*RUN, "--rerun", word).code == 2
    with Lease(done):
        assert "is being run" in launch(*RUN, "--rerun").complaint
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            assert "--rerun is for one process, and 2 were started" in launch(*RUN, "--rerun").complaint
    assert launch(*RUN, "--rerun", "trainer.fast_dev_run=2").code == 0
    assert read_status(done) == before and not (workdir / "adhoc/set_aside").exists()


def test_a_run_that_only_the_device_refuses_is_put_back(launch, done, workdir):
    """Only the training process knows the device, so the run is moved before it is refused."""
    before, words = read_result(done), sorted(path.name for path in done.rglob("*") if ".hydra" not in path.parts)
    ended = launch(*RUN, "--rerun", "trainer.cross_entropy=liger")
    assert ended.code == 2 and "needs a CUDA device" in ended.complaint
    assert f"nothing was trained, so {done.name} is back in its place" in ended.out
    assert read_result(done) == before and (done / ".hydra/overrides.yaml").is_file()
    assert sorted(path.name for path in done.rglob("*") if ".hydra" not in path.parts) == words
    assert [path.name for path in (workdir / "adhoc/set_aside").iterdir()] == [f"{done.name}-2"]
    assert "nothing to train" in launch(*RUN).out
