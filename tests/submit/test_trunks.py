"""Branches wait for the checkpoint of their trunk, here and on SLURM, and start without it when it will not come."""

import re
import shutil
from types import SimpleNamespace

import pytest
from support.slurm_stand_in import end
from support.stub_cell import result, status
from support.submissions import ask_mode, make_cell, make_pool, plan_of, run_dir, submit

from dlm.cli.progress import alone_line
from dlm.core.errors import UserError
from dlm.core.files import write_json
from dlm.core.lease import Lease
from dlm.record.outcomes import State
from dlm.record.run import checkpoint_folder, write_result, write_status
from dlm.submit.cells import cancel
from dlm.submit.executor import Executor, key_behind
from dlm.submit.job import BranchPoint, SlurmSettings
from dlm.submit.ledger import Ledger
from dlm.submit.slurm import Slurm

AT = 4


def make_family(*branches: str, trunk: str = "trunk", **changes) -> list[SimpleNamespace]:
    """The branches come first, as in a plan with ascending budgets."""
    cells = [make_cell(name, parent=trunk, branch_step=AT, own_share=0.1, **changes) for name in branches]
    return [*cells, make_cell(trunk, flops={"full_masked_head": 3e9}, **changes)]


def make_plan(*families) -> SimpleNamespace:
    return plan_of(cell for family in families for cell in family)


def write_checkpoint(sweep_dir, name: str, step: int = AT) -> None:
    """Write what shows that a checkpoint is whole."""
    folder = checkpoint_folder(run_dir(sweep_dir, name), step)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "manifest.json", {})


class Watch:
    """The events of a submission in order. Writes the checkpoint of the trunk when it is told to."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __call__(self, event) -> None:
        self.events.append((event.kind, event.job.name))

    def place(self, kind: str, name: str) -> int:
        return self.events.index((kind, name))

    def names(self, kind: str) -> list[str]:
        return [name for one, name in self.events if one == kind]


def test_the_trunk_of_the_largest_cost_goes_first_and_a_branch_waits_for_its_checkpoint(sweep_dir):
    small = make_family("c", trunk="small")
    small[-1].flops = {"full_masked_head": 2e9}
    plan, watch, seen = make_plan(small, make_family("a", "b"), [make_cell("single")]), Watch(), []
    ask_mode(sweep_dir, "trunk", "wait")  # until it is told to stop

    def write_when_all_others_are_done():
        if not seen and len(watch.names("ended")) == 3:
            seen.extend(watch.names("started"))
            write_checkpoint(sweep_dir, "trunk")
        if len(watch.names("ended")) == 5 and (run_dir(sweep_dir, "trunk") / "status.json").is_file():
            cancel(["trunk"], sweep_dir)

    write_checkpoint(sweep_dir, "small")
    done = submit(plan, sweep_dir, on_event=watch, on_tick=write_when_all_others_are_done)
    assert watch.names("started")[:3] == ["trunk", "small", "single"]
    assert seen == ["trunk", "small", "single", "c"]  # c's checkpoint is there, that of a and b is not
    assert done.exit_codes == {"small": 0, "single": 0, "c": 0, "a": 0, "b": 0, "trunk": 75}
    assert not watch.names("alone") and done.skipped == {}


def test_a_branch_starts_from_nothing_when_its_trunk_has_ended_without_the_checkpoint(sweep_dir):
    plan, watch = make_plan(make_family("a", "b")), Watch()
    done = submit(plan, sweep_dir, on_event=watch)
    assert done.exit_codes == {"trunk": 0, "a": 0, "b": 0}
    assert watch.place("ended", "trunk") < watch.place("alone", "a") < watch.place("started", "a")
    assert watch.names("alone") == ["a", "b"]


@pytest.mark.parametrize("mode", ["fail", "kill"])
def test_branches_of_a_trunk_that_goes_on_next_time_are_left_until_then(sweep_dir, mode):
    plan, watch = make_plan(make_family("a"), [make_cell("single")]), Watch()
    ask_mode(sweep_dir, "trunk", mode)
    done = submit(plan, sweep_dir, on_event=watch)
    assert done.exit_codes.keys() == {"trunk", "single"} and "has to go on first" in done.skipped["a"]
    ask_mode(sweep_dir, "trunk", "done")
    assert submit(plan, sweep_dir).exit_codes == {"trunk": 0, "a": 0}


def test_branches_of_a_trunk_that_failed_for_good_or_was_cancelled_start_from_nothing(sweep_dir):
    plan, watch = make_plan(make_family("a")), Watch()
    ask_mode(sweep_dir, "trunk", "config")  # exit code 2: not tried again
    done = submit(plan, sweep_dir, on_event=watch)
    assert done.exit_codes == {"trunk": 2, "a": 0} and watch.names("alone") == ["a"]
    shutil.rmtree(run_dir(sweep_dir, "a"))
    again = Watch()  # the trunk is not even submitted
    assert submit(plan, sweep_dir, on_event=again).exit_codes == {"a": 0} and again.names("alone") == ["a"]


def test_a_cancelled_trunk_is_not_waited_for(sweep_dir):
    plan, watch = make_plan(make_family("a")), Watch()
    ask_mode(sweep_dir, "trunk", "wait")

    def cancel_it():
        if (run_dir(sweep_dir, "trunk") / "status.json").is_file() and not watch.names("ended"):
            cancel(["trunk"], sweep_dir)

    done = submit(plan, sweep_dir, on_event=watch, on_tick=cancel_it)
    assert done.exit_codes == {"trunk": 75, "a": 0} and watch.names("alone") == ["a"]


def test_a_trunk_that_is_deleted_while_its_branches_wait_is_not_waited_for(sweep_dir):
    write_result(run_dir(sweep_dir, "trunk"), result("trunk"))
    write_checkpoint(sweep_dir, "trunk")
    plan, watch = make_plan(make_family("a", "b")), Watch()

    def delete():
        if watch.names("ended"):
            shutil.rmtree(run_dir(sweep_dir, "trunk"))

    assert submit(plan, sweep_dir, make_pool(cores=1), on_event=watch, on_tick=delete).exit_codes == {"a": 0, "b": 0}


def test_a_trunk_that_another_process_trains_is_waited_for(sweep_dir):
    plan, watch = make_plan(make_family("a")), Watch()
    lease = Lease(run_dir(sweep_dir, "trunk"))
    lease.__enter__()
    ticks = []

    def finish():
        ticks.append(watch.names("started"))
        if len(ticks) == 20:
            write_checkpoint(sweep_dir, "trunk")
            write_result(run_dir(sweep_dir, "trunk"), result("trunk"))
            lease.__exit__()

    done = submit(plan, sweep_dir, on_event=watch, on_tick=finish)
    assert ticks[18] == [] and done.exit_codes == {"a": 0} and not watch.names("alone")


def test_a_branch_with_a_checkpoint_of_its_own_waits_for_nothing(sweep_dir):
    write_checkpoint(sweep_dir, "a", step=7)
    plan, watch = make_plan(make_family("a")), Watch()
    submit(plan, sweep_dir, on_event=watch)
    assert watch.place("started", "a") < watch.place("ended", "trunk") and not watch.names("alone")


def dependency_of(slurm, array: str) -> str | None:
    found = re.search(r"#SBATCH --dependency=(.*)", (slurm / f"{array}.script").read_text())
    return None if found is None else found[1]


def test_on_slurm_the_branches_of_a_trunk_start_when_its_task_has_ended(slurm, sweep_dir):
    plan = make_plan(make_family("a", "b"), make_family("c", trunk="other"), [make_cell("single")])
    done = submit(plan, sweep_dir, Slurm())
    assert done.job_ids == {"trunk": "1001_0", "other": "1001_1", "single": "1001_2", "a": "1002_0", "b": "1002_1",
                            "c": "1003_0"}  # fmt: skip
    found = [dependency_of(slurm, array) for array in ("1001", "1002", "1003")]
    assert found == [None, "afterany:1001_0", "afterany:1001_1"]


def test_a_branch_depends_on_a_trunk_that_is_already_queued(slurm, sweep_dir):
    submit(make_plan([make_cell("trunk")]), sweep_dir, Slurm())
    settings = SlurmSettings(additional_parameters={"dependency": "singleton"})
    assert submit(make_plan(make_family("a")), sweep_dir, Slurm(settings)).job_ids == {"a": "1002_0"}
    assert dependency_of(slurm, "1002") == "singleton,afterany:1001_0"


def test_it_is_said_which_branches_will_find_no_checkpoint(slurm, sweep_dir):
    families = make_plan(make_family("a", "b"), make_family("c", trunk="other"), make_family("d", trunk="here"))
    write_result(run_dir(sweep_dir, "trunk"), result("trunk", step=3, stopped_early=True))
    watch = Watch()
    with Lease(run_dir(sweep_dir, "here")):
        submit(families, sweep_dir, Slurm(), on_event=watch)
    assert watch.events == [("alone", "a"), ("alone", "b")]
    line = alone_line(run_dir(sweep_dir, "a"), BranchPoint(trunk="trunk", step=AT))
    assert line.endswith("its trunk trunk will not write the checkpoint of step 4, because it stopped early, at step 3")


def test_a_branch_depends_on_nothing_once_its_trunk_has_ended(slurm, sweep_dir):
    submit(make_plan([make_cell("trunk")]), sweep_dir, Slurm())
    write_result(run_dir(sweep_dir, "trunk"), result("trunk"))
    write_status(run_dir(sweep_dir, "trunk"), status(State.DONE, step=10, exit_code=0))
    end(slurm, "1001_0", "COMPLETED|0:0")
    assert submit(make_plan(make_family("a")), sweep_dir, Slurm()).job_ids == {"a": "1002_0"}
    assert dependency_of(slurm, "1002") is None


def test_a_cluster_without_dependencies_is_named_as_the_cause(slurm, sweep_dir, monkeypatch):
    accepted = Executor.send

    def send(self, script):
        if "--dependency" in script.read_text():
            words = "sbatch: error: Batch job submission failed: Job dependency problem"
            raise UserError(f"sbatch refused {script}: {words} (change {key_behind(words)})")
        return accepted(self, script)

    monkeypatch.setattr(Executor, "send", send)
    with pytest.raises(UserError, match="change branches of the definition to false"):
        submit(make_plan(make_family("a")), sweep_dir, Slurm())
    assert Ledger(sweep_dir).read()["trunk"].job_id == "1001_0"  # the trunk stays submitted


def test_a_trunk_that_is_continued_goes_before_branches_that_wait_for_nothing(sweep_dir):
    write_checkpoint(sweep_dir, "trunk")
    watch = Watch()
    submit(make_plan(make_family("a", "b")), sweep_dir, make_pool(cores=1), on_event=watch)
    assert watch.names("started") == ["trunk", "a", "b"]
