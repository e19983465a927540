"""A run that is killed or told to stop goes on where it was, bit for bit."""

import signal
import time
from types import SimpleNamespace

import pytest
import torch
from support.runs import TINY, losses, only_run, wait_for
from support.two_processes import SECONDS, two_processes

from dlm.record.outcomes import State
from dlm.record.run import (
    read_result,
    read_status,
)
from dlm.train.callbacks.preemption import Preemption


def checkpoints_after(run_dir, step: int) -> list[int]:
    """The steps above `step` at which the run has a whole checkpoint."""
    steps = [int(path.parent.name[-8:]) for path in run_dir.glob("checkpoints/step_*/manifest.json")]
    return [found for found in steps if found > step]


def step_to_go_on_from(said: str) -> int:
    """The step of the checkpoint that a resumed run says it goes on from."""
    return int(said.split("going on from step_")[1][:8])


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_and_then_killed_goes_on_bit_for_bit(start, launch, undisturbed, workdir):
    settings = (*TINY, "training.steps=250", "data.micro_batch_size=4")  # logs every 5 steps, of 2 micro-batches each
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

    process = start(*settings)
    wait_for(lambda: checkpoints_after(run_dir, stopped), process=process)
    first = min(checkpoints_after(run_dir, stopped))
    status = read_status(run_dir)
    assert status is not None and status.attempts == 2 and status.steps_redone == 0  # nothing is computed twice
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert step_to_go_on_from(process.communicate()[0]) == stopped
    # The row of a step may be written after the checkpoint of that step.
    assert first - 1 <= max(losses(run_dir)) < 250 and not (run_dir / "result.json").exists()

    resumed = launch(*settings)
    assert resumed.code == 0 and step_to_go_on_from(resumed.out) >= first
    status, result = read_status(run_dir), read_result(run_dir)
    assert status is not None and status.attempts == 3 and result is not None and result.attempts == 3
    truth = undisturbed(*settings)
    assert losses(run_dir) == losses(truth)
    finished = read_result(truth)
    assert finished is not None and (result.loss, result.loss_se) == (finished.loss, finished.loss_se)
    assert finished.steps_redone == 0 <= result.steps_redone < 250 - first


@pytest.mark.parametrize("told", [(False, False), (True, False), (False, True), (True, True)])
def test_all_ranks_stop_if_any_of_them_is_told_to(told):
    """Two ranks, whose values are reduced here as a process group reduces them."""
    sent = [torch.tensor([float(flag), seconds]) for flag, seconds in zip(told, (0.5, 0.1), strict=True)]
    asked = []

    def reduce(mine, reduce_op):
        asked.append(mine)
        return getattr(torch.stack(sent), f"a{reduce_op}")(dim=0)

    for flag in told:
        preemption = Preemption()
        preemption._flag = flag
        trainer = SimpleNamespace(world_size=2, global_step=1, max_steps=9, should_stop=False,
                                  limit_val_batches=4, strategy=SimpleNamespace(reduce=reduce))  # fmt: skip
        module = SimpleNamespace(device=torch.device("cpu"))
        preemption.on_step_end(trainer, module, validates=False)
        assert preemption.requested == trainer.should_stop == any(told)
        assert trainer.limit_val_batches == (0 if any(told) else 4)
        trainer.global_step = 2  # by the slowest rank, two steps fit into the interval, so nothing is agreed here
        preemption.on_step_end(trainer, module, validates=False)
    assert [float(mine[0]) for mine in asked] == [float(flag) for flag in told]


@pytest.mark.long  # the tests above send one signal to one process
def test_many_signals_change_no_exit_code_of_two_processes(stdlib_data, workdir):
    """A scheduler, a pool and a user may each send one, also while the interpreter ends.

    The first process ends with 75 and the other with 0. With any other code, SLURM would not continue the job.
    """
    two = (*TINY, "training.steps=40000", "trainer.devices=2", "trainer.strategy=ddp")
    sent, deadline = 0, time.monotonic() + SECONDS
    with two_processes("dlm.launch", *two, DLM_SUBMISSION="s") as processes:
        wait_for(lambda: "train/loss" in "".join(p.read_text() for p in workdir.glob("adhoc/runs/*/metrics.jsonl")),
                 process=processes[0])  # fmt: skip
        while running := [process for process in processes if process.poll() is None]:
            assert time.monotonic() < deadline
            for process in running:
                process.send_signal((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)[sent % 3])
            sent += 1
            time.sleep(0.002)
    assert [process.returncode for process in processes] == [75, 0] and sent > 5
    status = read_status(only_run(workdir))
    assert status is not None and (status.state, status.exit_code) == (State.PREEMPTED, 75)
