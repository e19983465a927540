"""Stands in for dlm.launch: `python -m support.stub_cell +cell=ID paths.workdir=W sweep=S [mode=...]`.

It takes the lease and writes the status and the result that a training run would write. The override ``mode``, or else
the content of the file `mode` in the run directory, determines how it ends: done, fail, kill, quiet (exit 0 without a
result), config (exit 2), wait (until SIGTERM, then exit 75) or boot (until SIGTERM, without a lease until then).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from dlm.core import signals
from dlm.core.lease import Lease
from dlm.record.outcomes import State
from dlm.record.run import Result, Status, write_result, write_status

STEPS = 10


def result(cell_id: str, **changes) -> Result:
    values = {
        "cell_id": cell_id,
        "step": STEPS,
        "tokens": 10240,
        "loss": 2.5,
        "loss_se": 0.01,
        "estimator": "nelbo",
        "wall_sec": 1.0,
        "tokens_per_sec": 10240.0,
        "device": "cpu",
        "num_devices": 1,
        "gpu_hours": 0.0,
        "attempts": 1,
        "steps_redone": 0,
        "unique_tokens": 10240,
        "epochs": 0.5,
        "data_hash": "abc",
        "unigram_entropy": 3.3,
        "finished": time.time(),
    }
    return Result(**{**values, **changes})


def status(state: State, step: int = 3, **changes) -> Status:
    now = time.time()
    return Status(
        **{"state": state, "step": step, "steps": STEPS, "attempts": 1, "started": now, "updated": now, **changes}
    )


def main() -> int:
    given = dict(item.lstrip("+").split("=", 1) for item in sys.argv[1:])
    cell_id = given["cell"]
    run_dir = Path(given["paths.workdir"].strip("'")) / given.get("sweep", "adhoc").strip("'") / "runs" / cell_id
    asked = run_dir / "mode"
    mode = given.get("mode") or (asked.read_text() if asked.is_file() else "done")
    if mode == "boot":  # as during the imports: there is no lease, and a signal is only remembered
        while not signals.asked_to_stop():
            time.sleep(0.02)
        return 75
    asked_to_stop = []
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    with Lease(run_dir):
        (run_dir / "argv.json").write_text(json.dumps(sys.argv[1:]))
        write_status(run_dir, status(State.RUNNING))
        print(f"{mode} threads={os.environ['OMP_NUM_THREADS']} pythonpath={os.environ['PYTHONPATH']}", flush=True)
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "fail":
            write_status(run_dir, status(State.FAILED, exit_code=1, reason="RuntimeError: as asked"))
            return 1
        if mode == "config":
            print("dlm: optimizer.lr is -1: it must be above zero", flush=True)
            return 2
        if mode == "wait":
            while not asked_to_stop:
                time.sleep(0.02)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the pool may send SIGTERM during the exit
            write_status(run_dir, status(State.PREEMPTED, exit_code=75, reason="stopped by a signal"))
            return 75
        time.sleep(float(given.get("sec", 0)))
        if mode == "done":
            write_result(run_dir, result(cell_id))
        write_status(run_dir, status(State.DONE, step=STEPS, exit_code=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
