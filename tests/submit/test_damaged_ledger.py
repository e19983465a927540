"""A ledger with a damaged line: the state of the other cells is shown, and nothing is submitted or cancelled."""

import json

import pytest
from support.submissions import make_plan, run_dir, state_of, submit

from dlm.core.errors import UserError
from dlm.core.files import append_jsonl, write_json
from dlm.record.outcomes import State
from dlm.submit.cells import cancel
from dlm.submit.ledger import Ledger, read_max_gpu_hours
from dlm.submit.state import cells_now

DAMAGED = [
    ({"event": "submitted", "time": 1.0, "submission": "s"}, "ids is missing"),
    ({"event": "intent", "time": 1.0, "submission": "s", "cluster": "local", "cells": 7, "was": {}}, "cells is 7"),
    ({"event": "ended", "time": 1.0, "cell": "a", "state": "happy", "reason": None}, "state is 'happy'"),
    ({"event": "cancelled", "time": float("nan"), "cells": ["a"]}, "time is nan"),
    ({"event": "cancelled", "time": 1.0, "cells": [{}]}, r"cells\[0\] is {}"),
    (["a"], r"the content is \[\"a\"\]"),
]


@pytest.mark.parametrize(("line", "words"), DAMAGED)
def test_a_damaged_line_is_named_and_nothing_is_submitted_or_cancelled(sweep_dir, line, words):
    ledger = Ledger(sweep_dir)
    ledger.cancelled(["b"])
    with open(ledger.path, "a") as stream:
        stream.write(json.dumps(line) + "\n" + '{"event": "cancelled", "ti')  # and a torn last line, which is no damage
    for command in (lambda: submit(make_plan("a"), sweep_dir), lambda: cancel(["a"], sweep_dir)):
        with pytest.raises(UserError, match=f"ledger.jsonl, line 2, is damaged: {words}") as refused:
            command()
        assert "\n" not in str(refused.value)
    assert not (run_dir(sweep_dir, "a") / "argv.json").exists()
    states, (warning,) = cells_now([("a", None), ("b", None)], sweep_dir)
    assert states["b"].state is State.CANCELLED and "line 2, is damaged" in warning


def test_a_line_of_a_kind_that_this_version_does_not_know_is_no_damage(sweep_dir):
    ledger = Ledger(sweep_dir)
    ledger.cancelled(["b"])
    append_jsonl(ledger.path, {"event": "moved", "time": 1.0, "to": "x"})
    ledger.check()
    assert state_of(sweep_dir, "b")[0] is State.CANCELLED


def test_a_limit_that_is_no_number_is_named(sweep_dir):
    write_json(sweep_dir / "ledger/limits.json", {"max_gpu_hours": "many"})
    with pytest.raises(
        UserError, match=r"limits\.json is damaged \(max_gpu_hours is 'many', and must be a finite number"
    ):
        read_max_gpu_hours(sweep_dir)
