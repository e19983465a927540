"""The files of a run directory: what is written is what is read, and two finished runs are compared in pairs."""

import errno
import math

import pytest
import yaml

from dlm.core.errors import UserError
from dlm.record import Result, paired_difference
from dlm.record.outcomes import State
from dlm.record.run import (
    Status,
    finished,
    merge_metrics,
    read_result,
    read_status,
    read_validation,
    run_directory,
    write_result,
    write_status,
    write_validation,
)

RESULT = Result(
    cell_id="a", step=10, tokens=100, loss=2.0, loss_se=0.1, estimator="mc", wall_sec=1.0, tokens_per_sec=100.0,
    device="cpu", num_devices=1, gpu_hours=0.0, attempts=1, steps_redone=0, unique_tokens=100, epochs=0.1,
    data_hash="d", unigram_entropy=3.0, finished=0.0,
)  # fmt: skip


def write_run(folder, losses, *, num_sequences=3):
    folder.mkdir()
    write_result(folder, RESULT)
    write_validation(folder, losses, [0.01] * len(losses))
    config = {
        "validation": {"num_sequences": num_sequences, "seed": 1, "times": 2},
        "data": {"block_size": 128, "stride": 128},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["strings", "paths"])
def test_the_folders_of_a_paired_difference_are_strings_or_paths(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = write_run(tmp_path / "a", [2.0, 3.0, 4.0]), write_run(tmp_path / "b", [1.0, 2.5, 3.0])
    difference, error = paired_difference(kind(first), kind(second))
    assert difference == pytest.approx(2.5 / 3) and error == pytest.approx(math.sqrt(1 / 12 / 3))
    assert paired_difference("a", "b") == (difference, error)


def test_runs_that_were_validated_on_different_sequences_are_not_paired(tmp_path):
    first, second = write_run(tmp_path / "a", [1.0, 2.0]), write_run(tmp_path / "b", [1.0, 2.0], num_sequences=2)
    with pytest.raises(UserError, match=r"a and b were validated differently: validation\.num_sequences is 3 and 2"):
        paired_difference(str(first), str(second))
    with pytest.raises(UserError, match=r"c holds no result\.json: give the folder of a finished run"):
        paired_difference(str(first), str(tmp_path / "c"))


def test_the_losses_of_a_validation_are_read_back_exactly(tmp_path):
    losses = [0.1, 1 / 3, 2.0]
    write_validation(tmp_path, losses, [0.0, 0.1, 0.2])
    assert read_validation(tmp_path) == losses
    (tmp_path / "validation.csv").write_text("sequence\n1\n")
    with pytest.raises(UserError, match=r"validation\.csv cannot be read"):
        read_validation(tmp_path)


def test_a_cell_is_finished_by_its_own_result_at_its_last_step(tmp_path):
    folder = run_directory(tmp_path, "a")
    assert folder == tmp_path / "runs" / "a" and finished(folder, "a", 10) is None
    folder.mkdir(parents=True)
    write_result(folder, RESULT)
    assert read_result(folder) == RESULT == finished(folder, "a", 10) == finished(folder, "a", None)
    assert finished(folder, "b", 10) is None and finished(folder, "a", 11) is None
    (folder / "result.json").write_text('{"cell_id": "a"')
    assert read_result(folder) is None


def test_where_a_resume_repeated_a_step_the_later_row_counts():
    rows = [{"step": 2, "loss": 3.0, "lr": 0.1}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.5}]
    assert merge_metrics(rows) == [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.5, "lr": 0.1}]


def test_on_a_full_disk_a_status_overwrites_the_earlier_one_in_place(tmp_path, monkeypatch):
    running = Status(state=State.RUNNING, step=50, steps=100, attempts=1, reason="r" * 80, started=1.0, updated=2.0)
    write_status(tmp_path, running)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dlm.record.run.write_atomic", full)
    failed = Status(state=State.FAILED, step=50, steps=100, attempts=1, started=1.0, updated=3.0)
    write_status(tmp_path, failed)
    assert read_status(tmp_path) == failed
    with pytest.raises(OSError, match="No space"):
        write_status(tmp_path / "new", failed)
