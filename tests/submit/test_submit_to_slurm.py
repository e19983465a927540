"""Submitting a plan to a stand-in for SLURM: what is submitted, what is skipped, what is tried again."""

import json
import threading
import time

import pytest
from support.slurm_stand_in import end
from support.stub_cell import STEPS, status
from support.submissions import make_cell, make_plan, plan_of, run_dir, state_of, submission_of, submit, write_command

from dlm.core.errors import UserError
from dlm.core.files import write_json
from dlm.record.outcomes import State
from dlm.record.run import write_status
from dlm.submit.cell_now import CellNow, CellRecord
from dlm.submit.executor import Executor
from dlm.submit.job import SlurmSettings
from dlm.submit.ledger import RESTARTS, Ledger
from dlm.submit.retry import MAX_UNATTENDED, why_not
from dlm.submit.slurm import Slurm
from dlm.submit.state import cells_now


def test_slurm_gets_one_array_per_class_and_the_ledger_has_intent_then_ids(slurm, sweep_dir):
    plan = plan_of([make_cell("a"), make_cell("big", gpus_per_node=8, hours=2.0), make_cell("b")])
    done = submit(plan, sweep_dir, Slurm())
    assert done.job_ids == {"a": "1001_0", "b": "1001_1", "big": "1002_0"}
    lines = [json.loads(line) for line in Ledger(sweep_dir).path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["intent", "submitted"] * 2
    assert lines[0]["cells"] == ["a", "b"] and lines[1]["ids"] == {"a": "1001_0", "b": "1001_1"}
    scripts = sorted((sweep_dir / "ledger").glob("*.sbatch"))
    assert [path.read_text() for path in scripts] == [(slurm / f"{i}.script").read_text() for i in (1001, 1002)]
    jobs = scripts[1].with_suffix(".jobs").read_text()
    assert "trainer=multi_gpu" in jobs and jobs.startswith(f"{sweep_dir}/runs/big +cell=big ")
    assert (slurm / "1002.script").read_text().count("--gpus-per-node=8") == 1


def test_cells_that_wait_or_run_are_not_submitted_again(slurm, sweep_dir):
    submit(make_plan("a", "b"), sweep_dir, Slurm())
    (slurm / "1001_1.live").write_text("RUNNING")
    again = submit(make_plan("a", "b"), sweep_dir, Slurm())
    assert again.submitted == () and "PENDING" in again.skipped["a"] and "RUNNING" in again.skipped["b"]
    here = submit(make_plan("a", "b"), sweep_dir)  # nor is it started here
    assert here.submitted == ()
    (slurm / "down").touch()
    silent = submit(make_plan("a", "b"), sweep_dir, Slurm())
    assert silent.submitted == () and "does not answer" in silent.skipped["a"]  # never twice, even blind


def test_out_of_memory_is_tried_again_with_half_the_micro_batch_and_the_whole_batch(slurm, sweep_dir):
    asked = []
    for number in range(1001, 1006):
        done = submit(make_plan("a"), sweep_dir, Slurm())
        if done.submitted:
            script = sorted((sweep_dir / "ledger").glob("*.jobs"), key=lambda path: path.stat().st_mtime_ns)[-1]
            asked.append(script.read_text().rpartition("data.micro_batch_size=")[2].strip())
            end(slurm, f"{number}_0", "FAILED|4:0")
    assert asked[1:] == ["4", "2", "1"] and "+cell=a" in asked[0]  # 8 sequences, at first as many as fit
    assert "one sequence at a time" in done.skipped["a"]
    assert submit(make_plan("a"), sweep_dir, Slurm(), retry_failed=True).submitted
    script = sorted((sweep_dir / "ledger").glob("*.jobs"), key=lambda path: path.stat().st_mtime_ns)[-1]
    assert script.read_text().rpartition("data.micro_batch_size=")[2].strip() == "1"  # not with the largest


def test_more_devices_after_out_of_memory_get_a_micro_batch_that_divides_their_share(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    end(slurm, "1001_0", "FAILED|4:0")
    submit(make_plan("a"), sweep_dir, Slurm())  # 4 sequences
    end(slurm, "1002_0", "NODE_FAIL|0:0")
    assert submit(make_plan("a"), sweep_dir, Slurm(SlurmSettings(tasks_per_node=4))).submitted
    script = sorted((sweep_dir / "ledger").glob("*.jobs"), key=lambda path: path.stat().st_mtime_ns)[-1]
    assert "data.micro_batch_size=2" in script.read_text()


def test_a_gpu_cell_that_ran_out_of_host_memory_is_tried_again_only_with_mem_gb(slurm, sweep_dir):
    plan = make_plan("a", gpus_per_node=1)
    submit(plan, sweep_dir, Slurm())
    end(slurm, "1001_0", "OUT_OF_MEMORY|0:125")
    assert "raise hydra.launcher.mem_gb" in submit(plan, sweep_dir, Slurm()).skipped["a"]
    assert submit(plan, sweep_dir, Slurm(SlurmSettings(mem_gb=64))).submitted


def test_what_nobody_asked_to_start_now_is_left_if_it_was_cancelled_or_submitted_often():
    def reason(state, submissions, *, unattended):
        now = CellNow(state=state, reason="x", record=CellRecord(submissions=submissions))
        return why_not(now, retry_failed=False, unattended=unattended)

    assert reason(State.CANCELLED, 1, unattended=False) is None
    assert reason(State.CANCELLED, 1, unattended=True) == "cancelled: x"
    assert reason(State.LOST, MAX_UNATTENDED - 1, unattended=True) is None
    assert "it was submitted 10 times" in reason(State.LOST, MAX_UNATTENDED, unattended=True)
    assert reason(State.LOST, MAX_UNATTENDED, unattended=False) is None


def test_a_failure_counts_only_where_the_cell_got_no_further(slurm, sweep_dir):
    for number, step in enumerate([3, 5, 7, 7, 7]):
        assert submit(make_plan("a"), sweep_dir, Slurm()).submitted
        said = status(State.FAILED, step=step, exit_code=1, reason="killed", submission=submission_of(sweep_dir, "a"))
        write_status(run_dir(sweep_dir, "a"), said)
        end(slurm, f"{1001 + number}_0", "FAILED|1:0")
    assert "failed 3 times (killed)" in submit(make_plan("a"), sweep_dir, Slurm()).skipped["a"]


def test_a_cell_that_is_tried_again_says_why_its_last_try_failed(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    end(slurm, "1001_0", "FAILED|1:0")
    submit(make_plan("a"), sweep_dir, Slurm())
    now, _ = cells_now([("a", STEPS)], sweep_dir)
    assert (now["a"].state, now["a"].record.before) == (State.SUBMITTED, "failed: job 1001_0 ended with exit code 1")


def test_a_job_that_ends_before_its_cell_speaks_gives_the_words_of_its_batch_script(slurm, sweep_dir):
    submit(make_plan("a"), sweep_dir, Slurm())
    (sweep_dir / "ledger" / "1001_0_0_log.out").write_text("hello\nmodule: cuda is unknown here\n")
    end(slurm, "1001_0", "FAILED|1:0")
    reason = "job 1001_0 ended with exit code 1: module: cuda is unknown here"
    assert state_of(sweep_dir, "a") == (State.FAILED, reason)
    (run_dir(sweep_dir, "a") / "log.txt").write_text("KeyError: x\n")
    assert state_of(sweep_dir, "a")[1] == "job 1001_0 ended with exit code 1: KeyError: x"
    write_json(run_dir(sweep_dir, "a") / RESTARTS, {"submission": "an earlier one", "step": 0, "fruitless": 0})
    assert state_of(sweep_dir, "a")[1] == reason  # the log is that of an earlier job


def test_jobs_that_a_node_failed_to_launch_are_released(slurm, sweep_dir, tmp_path):
    submit(make_plan("a", "b"), sweep_dir, Slurm())
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol.txt\n')
    scontrol.chmod(0o755)
    (slurm / "1001_1.why").write_text("launch failed requeued held")
    assert submit(make_plan("a", "b"), sweep_dir, Slurm()).submitted == ()
    assert "release 1001_1" in (tmp_path / "scontrol.txt").read_text().splitlines()


def test_a_second_submission_at_the_same_time_waits_and_finds_all_submitted(slurm, sweep_dir, monkeypatch):
    slow = Executor.send

    def send(self, script):
        time.sleep(0.5)
        return slow(self, script)

    monkeypatch.setattr(Executor, "send", send)
    done = []
    threads = [
        threading.Thread(target=lambda: done.append(submit(make_plan("a", "b"), sweep_dir, Slurm()))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(len(one.submitted) for one in done) == [0, 0, 2] and len(list(slurm.glob("*.script"))) == 1


def test_a_refusal_of_sbatch_is_shown_and_the_next_try_submits(slurm, sweep_dir):
    (slurm / "refuse").touch()
    with pytest.raises(UserError, match="Invalid partition"):
        submit(make_plan("a"), sweep_dir, Slurm())
    lines = [json.loads(line)["event"] for line in Ledger(sweep_dir).path.read_text().splitlines()]
    assert lines == ["intent", "refused"]
    (slurm / "refuse").unlink()
    assert submit(make_plan("a"), sweep_dir, Slurm()).job_ids == {"a": "1001_0"}


def test_arrays_accepted_before_a_refusal_stay_and_are_counted_in_the_message(slurm, sweep_dir, monkeypatch):
    plan = plan_of([make_cell("a"), make_cell("big", nodes=2)])
    limited = Executor.send

    def send(self, script):
        if script.stem.endswith("-1"):
            raise UserError("sbatch refused: Job violates accounting/QOS policy (job submit limit)")
        return limited(self, script)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="1 cell was taken before"):
        patch.setattr(Executor, "send", send)
        submit(plan, sweep_dir, Slurm())
    assert submit(plan, sweep_dir, Slurm()).submitted == ("big",)


def test_an_sbatch_that_finds_no_controller_leaves_the_cells_planned(slurm, sweep_dir, tmp_path):
    (slurm / "down").touch()
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1\n"
    )
    with pytest.raises(UserError, match="sbatch finds no SLURM controller"):
        submit(make_plan("a"), sweep_dir, Slurm())
    assert state_of(sweep_dir, "a")[0] is State.PLANNED


def test_a_refusal_names_the_launchers_file_in_force(slurm, sweep_dir, bin_dir):
    words = "sbatch: error: invalid partition specified: gpuu"
    write_command(bin_dir, "sbatch", f"echo '{words}' >&2; exit 1")
    with pytest.raises(UserError, match=r"change hydra\.launcher\.partition, see configs/hydra/launcher/lab\.yaml"):
        submit(make_plan("a"), sweep_dir, Slurm(file="configs/hydra/launcher/lab.yaml"))


@pytest.mark.parametrize("num_cells", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_thousands_of_cells_are_submitted_and_looked_at_in_a_millisecond_each(slurm, sweep_dir, monkeypatch, num_cells):
    plan = make_plan(*(f"c{i:05d}" for i in range(num_cells)))
    monkeypatch.setattr(Executor, "send", lambda self, script: script.stem.split("-")[-1])
    started = time.process_time()
    done = submit(plan, sweep_dir, Slurm(SlurmSettings(max_array_size=100)))
    assert len(done.job_ids) == num_cells
    assert len(list((sweep_dir / "ledger").glob("*.sbatch"))) == num_cells / 100
    now, _ = cells_now([(cell.cell_id, STEPS) for cell in plan.cells], sweep_dir)
    assert len(now) == num_cells and time.process_time() - started < 2 + num_cells / 1000
