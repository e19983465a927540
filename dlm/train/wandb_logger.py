"""Log to W&B without depending on it: a run goes on when W&B's process has ended or its server does not answer.

What the server misses is in metrics.jsonl and in W&B's own file on disk, and `dlm sync` uploads it later.
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

PATIENCE_SEC = 60.0  # for W&B's last uploads at the end of a run, which still holds its devices
PATIENCE_PREEMPTED_SEC = 10.0  # the scheduler waits only shortly, and the next attempt goes on in the same W&B run


class WandbLogger(LightningWandbLogger):
    """Lightning's W&B logger, made independent of W&B's process and of its server.

    SLURM sends SIGTERM to every process of a job. W&B's process ends at once, while the run still takes a step to its
    last checkpoint; what it logs then is in metrics.jsonl, and the next attempt goes on in the same W&B run. Where the
    server does not answer at the start, the run logs offline. Where it refuses the login, the entity or the project,
    that is a mistake of the user.

    Args:
        options: Those of Lightning's WandbLogger.
    """

    _ended = False

    def __init__(self, **options: Any) -> None:
        # W&B 0.31 writes to its file every 15 s by default, so a short run that is killed would lose everything.
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.5")
        if options.get("offline"):  # online, W&B prints where the run is and what it cannot upload
            os.environ.setdefault("WANDB_SILENT", "true")
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # W&B 0.31 warns of this argument, even when it is None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, which begins at the first access. Raises UserError where the server refuses it."""
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
        wandb.teardown()  # end its process, which still waits for the server and holds the id of the run
        self._offline = True
        return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row, unless W&B's process has ended."""
        with self._while_it_lives(f"from step {step} on metrics.jsonl alone is written"):
            super().log_metrics(metrics, step)

    def log_result(self, result: Mapping[str, Any]) -> None:
        """Put the fields of the result into the run's summary, where dlm.record.wandb.logged_result reads them."""
        with self._while_it_lives("it has no result, result.json has"):
            if not self._ended:
                self.experiment.summary.update({RESULT_PREFIX + key: value for key, value in result.items()})

    @contextlib.contextmanager
    def _while_it_lives(self, loss: str) -> Iterator[None]:
        """Print once that W&B's process has ended and what is lost by it."""
        try:
            yield
        except ConnectionError as error:
            if not self._ended:
                print(f"W&B's process has ended ({error}): {loss}; `dlm sync` mends it", flush=True)
            self._ended = True


def end_wandb(exit_code: int) -> None:
    """Let W&B write and upload what it has, and end its process.

    W&B would wait for a server that is away without end, so its process is killed when its time is over. What the
    server lacks then is on disk.

    Args:
        exit_code: Of this process. A preempted run waits for PATIENCE_PREEMPTED_SEC, others for PATIENCE_SEC.
    """
    if "wandb" not in sys.modules:
        return
    patience = PATIENCE_PREEMPTED_SEC if exit_code == ExitCode.PREEMPTED else PATIENCE_SEC
    timer = threading.Timer(patience, _give_up, [patience])
    timer.start()
    try:
        # Its process may have ended by the signal that ended ours; and teardown may try to exit with its own code.
        with contextlib.suppress(ConnectionError, SystemExit):
            sys.modules["wandb"].teardown(exit_code)
    finally:
        timer.cancel()


def _give_up(patience: float) -> None:
    print(f"W&B has not taken everything within {patience:.0f} s: `dlm sync` uploads the rest", flush=True)
    for pid in _cores():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it ignores SIGTERM while it waits; everything it has is in its file


def _cores() -> Iterator[int]:
    """The process ids of the W&B processes that this process started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just ended
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            if name.startswith("wandb-core") and int(rest.split()[1]) == os.getpid():
                yield int(stat.parent.name)
