"""What a sweep may use at once: cells and GPUs in all its arrays, jobs in the queue, and a pilot before the rest."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import slurm_stand_in
from support.stub_cell import result
from support.submissions import make_cell, make_plan, plan_of, run_dir, submit, write_command

from dlm.core.errors import UserError
from dlm.plan.definition import LauncherRule
from dlm.record.outcomes import State
from dlm.record.run import write_result
from dlm.submit.cell_now import CellNow, CellRecord
from dlm.submit.cluster import Request
from dlm.submit.executor import refusal
from dlm.submit.job import Job, Resources, SlurmSettings, slurm_settings, with_changes
from dlm.submit.ledger import Ledger
from dlm.submit.limits import Room, room_left, shares
from dlm.submit.slurm import Slurm
from dlm.submit.slurm_commands import JobLimitError

POLICY = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)"


def make_array(num_jobs: int, gpus: int) -> Request:
    jobs = [
        Job(name=f"c{i}", overrides=(), run_dir=Path("/w/runs/c"), resources=Resources(gpus_per_node=gpus))
        for i in range(num_jobs)
    ]
    return Request(submission="s", jobs=jobs, ledger=Ledger(Path("/w")), code=Path("/c"), environment={})


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 8)), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(1, 30)),
    st.one_of(st.none(), st.integers(8, 40)),
)
def test_arrays_together_stay_within_the_limits_and_leave_no_room_that_one_of_them_could_use(sizes, cells, gpus):
    arrays = [make_array(*size) for size in sizes]
    settings = SlurmSettings(max_running=cells, max_gpus=gpus, array_parallelism=16)
    counts = shares(arrays, room_left(settings, ()), settings)
    used_gpus = sum(count * need for count, (_, need) in zip(counts, sizes, strict=True))
    assert sum(counts) <= (cells or math.inf) and used_gpus <= (gpus or math.inf)
    left = Room(cells=(cells or math.inf) - sum(counts), gpus=(gpus or math.inf) - used_gpus)
    for count, (num_jobs, need) in zip(counts, sizes, strict=True):
        assert count <= min(num_jobs, 16)
        assert count == min(num_jobs, 16) or not left.fits(need)


def test_what_runs_already_leaves_less_room():
    def cells(count: int, **record) -> list[CellNow]:
        return [CellNow(state=State.SUBMITTED, record=CellRecord(**record))] * count

    live = [*cells(5, submission="a", at_once=2, gpus=4), *cells(1, submission="b", at_once=3)]
    assert room_left(SlurmSettings(max_running=8, max_gpus=9), live) == Room(cells=5, gpus=1)
    old = cells(3, submission="c")  # a ledger that does not say how many run at once
    assert room_left(SlurmSettings(max_running=2), old) == Room(cells=-1)


def test_gpus_that_gres_asks_for_count_now_and_while_the_cells_are_queued(slurm, sweep_dir):
    cluster = Slurm(SlurmSettings(max_gpus=16, gres="gpu:a100:8"))
    assert set(submit(make_plan("a", "b"), sweep_dir, cluster, only={"a"}).submitted) == {"a"}
    assert submit(make_plan("a", "b", "c", "d"), sweep_dir, cluster).submitted == ("b", "c", "d")
    assert throttles(slurm) == ["0-0%1", "0-2%1"]  # 16 GPUs allow two cells of eight


def test_a_job_that_can_never_fit_is_refused():
    settings = SlurmSettings(max_gpus=8)
    with pytest.raises(UserError, match=r"c0 needs 16 GPUs, and hydra\.launcher\.max_gpus is 8"):
        shares([make_array(1, 16)], room_left(settings, ()), settings)


def throttles(db: Path) -> list[str]:
    """The numbers of tasks and how many of them run at once, of the arrays that the stand-in has accepted."""
    lines = [line for path in sorted(db.glob("*.script")) for line in path.read_text().splitlines()]
    return [line.partition("=")[2] for line in lines if "--array=" in line]


def test_two_classes_share_what_may_run_and_a_third_waits_for_its_turn(slurm, sweep_dir):
    sizes = {"a": 1, "b": 2, "c": 4}
    plan = plan_of(make_cell(f"{kind}{i}", gpus_per_node=gpus) for kind, gpus in sizes.items() for i in range(4))
    cluster = Slurm(slurm_settings({"max_running": 2, "max_gpus": 8}))
    done = submit(plan, sweep_dir, cluster, extra=["trainer=cpu"])
    assert throttles(slurm) == ["0-3%1", "0-3%1"] and set(done.postponed) == {"c0", "c1", "c2", "c3"}
    assert "max_running" in done.postponed["c0"]
    assert submit(plan, sweep_dir, cluster, extra=["trainer=cpu"]).postponed.keys() == done.postponed.keys()
    for i in range(4):
        write_result(run_dir(sweep_dir, f"a{i}"), result(f"a{i}"))
        slurm_stand_in.end(slurm, f"1001_{i}", "COMPLETED|0:0")
    assert set(submit(plan, sweep_dir, cluster, extra=["trainer=cpu"]).submitted) == {"c0", "c1", "c2", "c3"}
    assert throttles(slurm)[-1] == "0-3%1"


def test_what_slurm_takes_goes_in_and_the_rest_follows(slurm, sweep_dir, bin_dir):
    write_command(bin_dir, "sbatch", only_up_to(5, slurm, bin_dir))
    names = [f"c{i}" for i in range(9)]
    done = submit(make_plan(*names), sweep_dir, Slurm())
    assert len(done.submitted) == 5 and set(done.submitted) | set(done.postponed) == set(names)
    assert "job submit limit" in next(iter(done.postponed.values()))
    assert len(list(slurm.glob("*.live"))) == 5
    records = Ledger(sweep_dir).read()
    assert {records[name].submissions for name in done.submitted} == {1}  # refusals are no submissions
    for job in done.jobs.values():
        slurm_stand_in.end(slurm, job.job_id, "COMPLETED|0:0")
    for name in done.submitted:
        write_result(run_dir(sweep_dir, name), result(name))
    assert set(submit(make_plan(*names), sweep_dir, Slurm()).submitted) == set(done.postponed)


def test_halves_of_an_array_share_what_may_run_at_once(slurm, sweep_dir, bin_dir):
    write_command(bin_dir, "sbatch", only_up_to(7, slurm, bin_dir))
    submit(make_plan(*(f"c{i}" for i in range(10))), sweep_dir, Slurm(SlurmSettings(max_running=4)))
    assert sum(int(word.partition("%")[2]) for word in throttles(slurm)) <= 4


def test_a_full_qos_does_not_hold_up_another(slurm, sweep_dir, bin_dir):
    taken = (bin_dir / "sbatch").read_text().removeprefix("#!/bin/bash\n")
    write_command(bin_dir, "sbatch", f'if grep -q qos=debug "$2"; then echo "{POLICY}" >&2; exit 1; fi' + taken)
    plan = plan_of([make_cell("small", num_params=10), make_cell("large", num_params=1000)])
    plan.spec = SimpleNamespace(launcher=(LauncherRule(below=100, set={"qos": "debug"}),))
    done = submit(plan, sweep_dir, Slurm())
    assert done.submitted == ("large",) and set(done.postponed) == {"small"}


def test_another_limit_is_no_full_queue():
    line = "QOSMaxWallDurationPerJobLimit sbatch: error: Job violates accounting/QOS policy (job submit limit, ...)"
    assert type(refusal(Path("x"), line)) is UserError
    assert type(refusal(Path("x"), "AssocMaxSubmitJobLimit ... (job submit limit, ...)")) is JobLimitError


def only_up_to(most: int, db: Path, bin_dir: Path) -> str:
    """The body of an sbatch that refuses an array if more than so many tasks would wait or run."""
    taken = (bin_dir / "sbatch").read_text().removeprefix("#!/bin/bash\n")
    limit = f"""
        has=$(ls {db}/*.live 2>/dev/null | wc -l)
        asks=$(grep -oP '(?<=--array=0-)[0-9]+' "$2")
        if [ $((has + asks + 1)) -gt {most} ]; then echo "{POLICY}" >&2; exit 1; fi
    """
    return limit + taken


def test_a_limit_that_lets_nothing_in_is_an_error(slurm, sweep_dir, bin_dir):
    write_command(bin_dir, "sbatch", f'echo "{POLICY}" >&2; exit 1')
    with pytest.raises(UserError, match="job submit limit"):
        submit(make_plan("a", "b"), sweep_dir, Slurm())
    assert all(record.submission is None for record in Ledger(sweep_dir).read().values())


def test_a_pilot_goes_first_and_the_others_when_it_is_done(slurm, sweep_dir):
    plan = make_plan("a", "b", "c")
    plan.cells[1].flops["full_masked_head"] = 1e8
    done = submit(plan, sweep_dir, Slurm(), pilot=True)
    assert done.submitted == ("b",) and done.postponed == dict.fromkeys("ac", "the pilot b comes first")
    again = submit(plan, sweep_dir, Slurm(), pilot=True)
    assert not again.submitted and set(again.postponed) == {"a", "c"}
    write_result(run_dir(sweep_dir, "b"), result("b"))
    slurm_stand_in.end(slurm, "1001_0", "COMPLETED|0:0")
    assert set(submit(plan, sweep_dir, Slurm(), pilot=True).submitted) == {"a", "c"}


def test_a_pilot_that_failed_for_good_is_followed_by_nothing(slurm, sweep_dir):
    plan = make_plan("a", "b")
    submit(plan, sweep_dir, Slurm(), pilot=True)
    slurm_stand_in.end(slurm, "1001_0", "FAILED|2:0")
    done = submit(plan, sweep_dir, Slurm(), pilot=True)
    assert not done.submitted and not done.postponed and "the pilot a is bad_config" in done.skipped["b"]


def test_a_pilot_may_be_a_branch_if_nothing_else_is_left(slurm, sweep_dir):
    plan = plan_of([make_cell("branch", parent="trunk", branch_step=4, own_share=0.1)])
    assert submit(plan, sweep_dir, Slurm(), pilot=True).submitted == ("branch",)


def test_a_pilot_runs_here_too(sweep_dir):
    done = submit(make_plan("a", "b"), sweep_dir, pilot=True)
    assert done.submitted == ("a",) and set(done.postponed) == {"b"}


def test_only_the_named_cells_start(slurm, sweep_dir):
    assert submit(make_plan("a", "b"), sweep_dir, Slurm(), only={"b"}).submitted == ("b",)


def test_rules_of_the_definition_give_some_cells_other_keys_and_an_array_of_their_own(slurm, sweep_dir, bin_dir):
    write_command(
        bin_dir, "sinfo", 'case "$*" in *--partition=big*) echo "big|2:00:00";; *) echo "small*|30:00";; esac'
    )
    plan = plan_of([make_cell("a", hours=1.0), make_cell("b", num_params=200, hours=1.0)])
    big = LauncherRule(at_least=1000, set={"partition": "big", "qos": "long", "constraint": "ib"})
    plan.spec = SimpleNamespace(launcher=(LauncherRule(set={"comment": "ours"}), big))
    submit(plan, sweep_dir, Slurm())
    first, second = (path.read_text() for path in sorted(slurm.glob("*.script")))
    assert "--partition=big" in first and "--qos=long" in first and "--constraint=ib" in first
    assert "--partition" not in second and "constraint" not in second
    assert "--comment='ours dlm" in first and "--comment='ours dlm" in second
    limits = [int(line.partition("=")[2]) for line in f"{first}{second}".splitlines() if "--time=" in line]
    assert limits[0] > 60 and limits[1] == 30  # of the partition of each


def test_a_rule_may_only_hold_keys_of_single_jobs():
    for changes, said in (
        ({"max_gpus": 8}, r"launcher\.set\.max_gpus: this key holds for the whole sweep"),
        ({"partitoin": "x"}, "unknown key of hydra.launcher 'partitoin': did you mean partition"),
        ({"mem_gb": 8}, "mem_gb=8 and mem_per_cpu=2G, which contradict each other"),
    ):
        with pytest.raises(UserError, match=said):
            with_changes(SlurmSettings(mem_per_cpu="2G"), changes)


def test_a_branch_waits_where_there_is_no_room_for_its_trunk(slurm, sweep_dir):
    """It would train from nothing otherwise."""
    costs = {"flops": {"full_masked_head": 9e9}}
    plan = plan_of(
        [
            make_cell("branch", parent="trunk", branch_step=4, own_share=0.1, gpus_per_node=1),
            make_cell("trunk", gpus_per_node=8),
            make_cell("other", gpus_per_node=4, **costs),
        ]
    )
    done = submit(plan, sweep_dir, Slurm(SlurmSettings(max_gpus=8)), extra=["trainer=cpu"])
    assert done.submitted == ("other",) and set(done.postponed) == {"trunk", "branch"}
