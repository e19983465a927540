"""loggers: W&B's logger for runs that must outlive W&B. Named in configs/logger/wandb.yaml; its end is called by train.

What W&B misses is in metrics.jsonl and in its own file on disk, and `dlm sync` brings it there later.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger

from dlm.core.errors import ExitCode, UserError
from dlm.record.wandb import REFUSED_BY_WANDB, RESULT_PREFIX

PATIENCE_SEC = 60.0  # for W&B's last uploads at the end of a run: meanwhile it holds its devices


PATIENCE_PREEMPTED_SEC = 10.0  # the scheduler's own patience is short, and the next attempt goes on in the same W&B run


class WandbLogger(LightningWandbLogger):
    """Lightning's, but the end of W&B's own process is not the end of the run, and neither is a server that is away.

    SLURM sends SIGTERM to every process of a job: W&B's ends at once, while the run still takes a step to its last
    checkpoint. What it logs then is in metrics.jsonl, and the next attempt goes on in the same W&B run. A server that
    does not answer at the start is replaced by a file; one that refuses the login, the entity or the project is the
    user's mistake.
    """

    _ended = False

    def __init__(self, **options: Any) -> None:
        # A short run that is killed would lose everything: the default flushes every 15 s (tried, W&B 0.31).
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.5")
        if options.get("offline"):  # online W&B has something to say: where the run is, and what it cannot upload
            os.environ.setdefault("WANDB_SILENT", "true")
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # W&B 0.31 warns of it, even of None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, begun when it is first asked for. Raises UserError for a login or a place that is refused."""
        if self._experiment is not None or self._offline:
            return super().experiment
        import wandb

        try:
            return super().experiment
        except wandb.errors.Error as error:
            said = " ".join(str(error).split())
            if any(words in said for words in REFUSED_BY_WANDB):
                raise UserError(
                    f"W&B refuses to begin the run: {said}; log in (`wandb login`, WANDB_API_KEY), mend logger.entity "
                    "or logger.project, or log offline (logger.offline=true)"
                ) from error
            print(f"W&B does not answer ({said}): this attempt logs offline, `dlm sync` uploads it", flush=True)
        wandb.teardown()  # its process still waits for the server, and holds the id
        self._offline = True
        return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log, as long as there is somebody to log to."""
        with self._while_it_lives(f"from step {step} on metrics.jsonl alone is written"):
            super().log_metrics(metrics, step)

    def log_result(self, result: Mapping[str, Any]) -> None:
        """Put the result of the run into its summary, number by number (record.logged_result reads it)."""
        with self._while_it_lives("it has no result, result.json has"):
            if not self._ended:
                self.experiment.summary.update({RESULT_PREFIX + key: value for key, value in result.items()})

    @contextlib.contextmanager
    def _while_it_lives(self, loss: str) -> Iterator[None]:
        """Say once that W&B's process has ended, and what that costs."""
        try:
            yield
        except ConnectionError as error:
            if not self._ended:
                print(f"W&B's process has ended ({error}): {loss}; `dlm sync` mends it", flush=True)
            self._ended = True


def end_wandb(exit_code: int) -> None:
    """Let W&B write and upload what it has, and end its process; not for longer than its patience.

    A server that is away would be waited for without end. What it then lacks is on disk.
    """
    if "wandb" not in sys.modules:
        return
    patience = PATIENCE_PREEMPTED_SEC if exit_code == ExitCode.PREEMPTED else PATIENCE_SEC
    timer = threading.Timer(patience, _give_up, [patience])
    timer.start()
    try:
        # It may have ended before, by the signal that ended us; and the exit code that it would end us with is its own.
        with contextlib.suppress(ConnectionError, SystemExit):
            sys.modules["wandb"].teardown(exit_code)
    finally:
        timer.cancel()


def _give_up(patience: float) -> None:
    print(f"W&B has not taken everything within {patience:.0f} s: `dlm sync` uploads the rest", flush=True)
    for pid in _cores():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # all that it has is in its file; SIGTERM it would wait through


def _cores() -> Iterator[int]:
    """The W&B processes that this process started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended just now
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            if name.startswith("wandb-core") and int(rest.split()[1]) == os.getpid():
                yield int(stat.parent.name)
