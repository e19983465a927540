"""Against files that the real W&B wrote here: whole, resumed, cut off at every kind of place, and corrupted."""

import json
import math
import random
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.killed_run import kill_logging_run
from support.wandb_runs import write_runs
from wandb.proto.wandb_internal_pb2 import Record

from dlm.collect.history import from_rows
from dlm.collect.wandb_file import (
    BLOCK_BYTES,
    HEADER_BYTES,
    WandbRun,
    read_messages,
    read_wandb_file,
    read_wandb_run,
    wandb_files,
)
from dlm.core.errors import UserError

ROWS = 600  # some 100 KiB: several blocks


def row(step: int, **more) -> dict:
    return {"step": step, "tokens": 1024 * step, "train/loss": 3.0 + 1 / (step + 1), "lr": 1e-3 / (step + 1), **more}


def log_of(messages: list[bytes]) -> bytes:
    """A LevelDB log as W&B writes it: records never cross a block, less than a header's room is padding."""
    data = bytearray(b":W&B\xe1\xbe\x00")
    for message in messages:
        rest, first = message, True
        while first or rest:
            room = BLOCK_BYTES - len(data) % BLOCK_BYTES
            if room < 7:
                data += bytes(room)
                continue
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not rest]
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
    return bytes(data)


def message_ends(messages: list[bytes]) -> list[int]:
    """The byte after each message of ``log_of(messages)``."""
    return [len(log_of(messages[: place + 1])) for place in range(len(messages))]


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    config = {"optimizer": {"lr": 1e-3}, "seed": 3, "name": "é"}
    final = {"step": ROWS - 1, "val/loss": 2.5, "val/loss_se": 0.125}
    rows = [row(step) for step in range(ROWS)]
    write_runs(
        folder,
        [
            {"dir": "long", "id": "s-a", "group": "s", "config": config, "rows": [*rows, final]},
            {"dir": "failed", "id": "s-b", "group": "s", "rows": [row(0, odd=float("nan"))], "exit": 3},
        ],
    )
    return folder


def long_file(real: Path) -> Path:
    (path,) = wandb_files(real / "long")
    return path


def test_everything_that_was_logged_is_read_back_exactly(real):
    run = read_wandb_file(long_file(real))
    assert (run.run_id, run.group, run.exit_code, run.warnings) == ("s-a", "s", 0, [])
    assert run.config["optimizer"] == {"lr": 1e-3} and run.config["seed"] == 3 and run.config["name"] == "é"
    keys = ("step", "tokens", "train/loss", "lr")
    assert [{key: logged[key] for key in keys} for logged in run.history[:ROWS]] == [row(step) for step in range(ROWS)]
    assert [logged["_step"] for logged in run.history] == list(range(ROWS + 1))  # W&B's own
    assert run.history[ROWS]["val/loss"] == run.summary["val/loss"] == 2.5
    assert run.summary["step"] == ROWS - 1 and run.summary["val/loss_se"] == 0.125
    assert long_file(real).stat().st_size > 2 * BLOCK_BYTES  # messages that cross blocks were among them


def test_not_a_number_and_the_exit_code_survive(real):
    (path,) = wandb_files(real / "failed")
    run = read_wandb_file(path)
    assert math.isnan(run.history[0]["odd"]) and run.exit_code == 3


def test_a_log_written_by_the_tests_is_the_one_that_wandb_writes(real):
    data = long_file(real).read_bytes()
    assert log_of(list(read_messages(data, [], ""))) == data


@pytest.mark.parametrize("keep", [0, 3, 7, 10, 4000, 32768 + 5, 70001])
def test_a_truncated_file_gives_the_rows_before_the_cut_and_says_so(real, tmp_path, keep):
    data = long_file(real).read_bytes()[:keep]
    ends_with_a_message = log_of(list(read_messages(data, [], ""))) == data  # by chance; then nothing is torn
    whole = read_wandb_file(long_file(real)).history
    cut = tmp_path / "run-s-a.wandb"
    cut.write_bytes(data)
    run = read_wandb_file(cut)
    assert run.history == whole[: len(run.history)] and len(run.history) < len(whole)
    assert run.exit_code is None
    if keep <= 7:
        assert len(run.warnings) == 1 and "holds nothing" in run.warnings[0]
    elif ends_with_a_message:
        assert run.warnings == []
    else:
        assert len(run.warnings) == 1 and "cut off at byte" in run.warnings[0]
    if keep == 70001:
        assert len(run.history) > 100


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_near_the_end_of_a_record_keeps_every_whole_message_and_is_named_if_it_tears_one(seed):
    chance = random.Random(seed)
    sizes = [3, 200, BLOCK_BYTES // 3, 2 * BLOCK_BYTES, 40, *(chance.randrange(2 * BLOCK_BYTES) for _ in range(4))]
    messages = [chance.randbytes(size) for size in sizes]
    for room in (0, 3, 6, 7, 8):  # what the next message leaves of its block
        messages.append(chance.randbytes((-len(log_of(messages)) - HEADER_BYTES - room) % BLOCK_BYTES))
        messages.append(chance.randbytes(90))
    messages += [crc_ends_in_zero(chance), chance.randbytes(10)]
    data, ends = log_of(messages), message_ends(messages)
    assert ends[-1] == len(data)
    for place in {*ends, *range(BLOCK_BYTES, len(data), BLOCK_BYTES)}:
        for cut in range(place - HEADER_BYTES - 2, min(place + HEADER_BYTES + 2, len(data)) + 1):
            warnings = []
            found = list(read_messages(data[:cut], warnings, "x"))
            before = [end for end in ends if end <= cut]
            assert found == messages[: len(before)], cut
            begin = max([HEADER_BYTES, *before])
            padding = -begin % BLOCK_BYTES  # what is left of the block there; a header does not fit into six bytes
            is_clean = cut == begin or (padding < HEADER_BYTES and cut <= begin + padding)
            assert len(warnings) == (0 if is_clean else 1), (cut, warnings)


def crc_ends_in_zero(chance: random.Random) -> bytes:
    """A message whose record begins with a zero byte: after a cut behind that byte it looks like padding."""
    while zlib.crc32(b"\x01" + (message := chance.randbytes(20))) % 256:
        pass
    return message


def test_corruption_costs_one_block_and_says_where(real, tmp_path):
    whole = read_wandb_file(long_file(real)).history
    data = bytearray(long_file(real).read_bytes())
    for byte in range(BLOCK_BYTES + 1000, BLOCK_BYTES + 1040):
        data[byte] ^= 0xFF
    path = tmp_path / "run-s-a.wandb"
    path.write_bytes(data)
    run = read_wandb_file(path)
    steps = [logged["step"] for logged in run.history]
    assert steps[0] == 0 and steps[-1] == ROWS - 1 and run.exit_code == 0  # before and after are there
    lost = len(whole) - len(run.history)
    assert 0 < lost <= len(whole) * BLOCK_BYTES / len(data) + 3
    assert len(run.warnings) == 1 and f"corrupt at byte {BLOCK_BYTES}"[:17] in run.warnings[0]
    assert all(logged in whole for logged in run.history)


def test_no_damage_makes_it_raise_or_invent_a_row(real, tmp_path):
    data, chance = long_file(real).read_bytes(), random.Random(0)
    whole = {json.dumps(logged, sort_keys=True) for logged in read_wandb_file(long_file(real)).history}
    path = tmp_path / "run-s-a.wandb"
    for _ in range(25):
        broken = bytearray(data[: chance.randrange(8, len(data))])
        for _ in range(chance.randrange(4)):
            broken[chance.randrange(7, len(broken))] = chance.randrange(256)
        path.write_bytes(broken)
        for logged in read_wandb_file(path).history:
            assert json.dumps(logged, sort_keys=True) in whole


@given(st.lists(st.integers(0, 3 * BLOCK_BYTES), max_size=5), st.integers(0, 20))
@example([BLOCK_BYTES - 7 - 7 - 3, 10], 0)  # leaves three bytes of the block: padding
@example([BLOCK_BYTES - 7 - 7 - 7, 10], 0)  # leaves a header and nothing after it
def test_messages_of_any_size_survive_the_blocks(sizes, seed):
    messages = [random.Random(seed + index).randbytes(size) for index, size in enumerate(sizes)]
    warnings = []
    assert list(read_messages(log_of(messages), warnings, "x")) == messages and warnings == []


def test_a_corrupt_length_costs_its_block_and_not_the_rest():
    messages = [bytes([index]) * 5000 for index in range(19)]  # three blocks, nearly full
    data = bytearray(log_of(messages))
    offset = BLOCK_BYTES  # the first record of the second block
    data[offset + 4 : offset + 6] = b"\xff\xff"
    warnings = []
    found = list(read_messages(bytes(data), warnings, "x"))
    assert found[0] == messages[0] and found[-1] == messages[-1] and "corrupt" in warnings[0]


def test_a_value_that_python_cannot_hold_costs_its_record_and_is_named(tmp_path):
    path = tmp_path / "run-x.wandb"
    values = ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "1e999", "NaN", "3.5"]
    messages = []
    for value in values:
        record = Record()
        record.history.item.add(key="loss", value_json=value)
        messages.append(record.SerializeToString())
    path.write_bytes(log_of(messages))
    run = read_wandb_file(path)
    assert [str(row["loss"]) for row in run.history] == ["inf", "nan", "3.5"]
    reasons = ["it is nested too deeply"] * 2 + ["a number has 5000 digits, and at most 300 are allowed"]
    assert run.warnings == [f"run-x.wandb: skipped a record that cannot be decoded ({reason})" for reason in reasons]


def test_another_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "run-x.wandb"
    path.write_bytes(b"PK\x03\x04 no")
    with pytest.raises(UserError, match=r"is not a \.wandb file"):
        read_wandb_file(path)
    path.write_bytes(b":W&B\xe1\xbe\x01" + bytes(100))
    with pytest.raises(UserError, match="unknown version"):
        read_wandb_file(path)


def test_a_resumed_run_is_merged_on_the_logged_step_and_the_last_attempt_wins(real, tmp_path):
    first = [row(step, **{"train/loss": 9.0}) for step in range(6)]
    second = [row(step, **{"train/loss": 1.0}) for step in range(4, 8)] + [{"step": 7, "val/loss": 2.0}]
    for index, rows in enumerate((first, second)):
        write_runs(tmp_path, [{"dir": "run", "id": "s-c", "group": "s", "rows": rows, "exit": 75 * (1 - index)}])
    assert len(wandb_files(tmp_path / "run")) == 2
    run = read_wandb_run(tmp_path / "run", "s-c")
    merged = from_rows(run.history, "a", [], []).read().to_pylist()
    assert [logged["step"] for logged in merged] == list(range(8))
    assert [logged["train/loss"] for logged in merged] == [9.0] * 4 + [1.0] * 4
    assert merged[-1]["val/loss"] == 2.0 and run.exit_code == 0 and not run.warnings
    # The killed first attempt, cut off, costs only what the second did not repeat.
    path = wandb_files(tmp_path / "run")[0]
    path.write_bytes(path.read_bytes()[:7])
    run = read_wandb_run(tmp_path / "run", "s-c")
    merged = from_rows(run.history, "a", [], []).read().to_pylist()
    assert [logged["step"] for logged in merged] == [4, 5, 6, 7] and "holds nothing" in run.warnings[0]


def test_a_file_of_another_run_is_left_out_and_without_a_file_the_run_is_empty(real, tmp_path):
    assert read_wandb_run(tmp_path, "s-a") == WandbRun(run_id="s-a")
    shutil.copytree(real / "long", tmp_path / "run")
    run = read_wandb_run(tmp_path / "run", "s-z")
    assert run.history == [] and "is of run s-a, not s-z" in run.warnings[0]


@pytest.mark.long  # tests/long/kills_history.py repeats it fifty times
def test_killed_without_warning_a_run_keeps_its_config_and_all_but_the_last_second(tmp_path):
    kill = kill_logging_run(
        tmp_path / "run", 2.5, every_sec=0.1
    )  # far below the 15 s after which W&B itself would flush
    assert kill["rows"] > 10 and kill["config"]
    assert kill["metrics"]["oldest_lost_sec"] <= 1.0 and kill["wandb"]["oldest_lost_sec"] <= 1.0
