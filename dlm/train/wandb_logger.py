"""Log to W&B without depending on it: a run continues when W&B's process has ended or its server does not answer.

Data that does not reach the server is in metrics.jsonl and in W&B's own file on disk; `dlm sync` uploads it later.
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

from dlm.core.errors import ExitCode, UserError, without_passwords
from dlm.record.wandb import REFUSED_BY_WANDB, RESULT_PREFIX, fitting_tags

PATIENCE_SEC = 60.0  # limit for W&B's last uploads at the end of a run, which still holds its devices
PATIENCE_PREEMPTED_SEC = 10.0  # less, because the scheduler ends the job soon; the next attempt continues the W&B run


class WandbLogger(LightningWandbLogger):
    """Lightning's W&B logger, made independent of W&B's process and of its server.

    SLURM sends SIGTERM to every process of a job. W&B's process ends at once, while the run still takes a step and
    writes its last checkpoint. Metrics logged after that are only in metrics.jsonl; the next attempt continues the same
    W&B run. If the server does not answer at the start, the run logs offline. If the server rejects the login, the
    entity or the project, the run ends with a UserError.

    Args:
        options: The arguments of Lightning's WandbLogger.
    """

    _ended = False

    def __init__(self, **options: Any) -> None:
        # W&B 0.31 writes to its file every 15 s by default, so a short run that is killed would lose everything.
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.5")
        # Online, the output is kept: the address of the run and failed uploads. But W&B also prints the address of the
        # server, with its password if it has one, and in a job this goes into log.txt.
        if options.get("offline") or "@" in os.environ.get("WANDB_BASE_URL", ""):
            os.environ.setdefault("WANDB_SILENT", "true")
        # W&B would record the user name in the URL of the git remote, which may be a token: https://TOKEN:x@github.com.
        # It would also describe the repository of the working directory; record.git_sha is the commit of the code.
        os.environ.setdefault("WANDB_DISABLE_GIT", "true")
        super().__init__(**{**options, "tags": fitting_tags(options.get("tags"))})
        self._wandb_init.pop("anonymous", None)  # W&B 0.31 warns of this argument, even when it is None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, which begins at the first access. Raises UserError if the server rejects the run."""
        if self._experiment is not None or self._offline:
            return super().experiment
        import wandb

        try:
            return super().experiment
        except wandb.errors.Error as error:
            said = without_passwords(" ".join(str(error).split()))
            if any(words in said for words in REFUSED_BY_WANDB):
                raise UserError(
                    f"W&B refuses to begin the run: {said}; log in (`wandb login`, WANDB_API_KEY), mend logger.entity "
                    "or logger.project, or log offline (logger.offline=true)"
                ) from error
            print(f"W&B does not answer ({said}): this attempt logs offline, `dlm sync` uploads it", flush=True)
        wandb.teardown()  # end W&B's process, which still waits for the server and holds the id of the run
        self._offline = True
        return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row of metrics. If W&B's process has ended, print a note once instead."""
        with self._while_it_lives(f"from step {step} on metrics.jsonl alone is written"):
            super().log_metrics(metrics, step)

    def log_result(self, result: Mapping[str, Any]) -> None:
        """Write the fields of the result to the run's summary, where dlm.record.wandb.logged_result reads them."""
        with self._while_it_lives("it has no result, result.json has"):
            if not self._ended:
                self.experiment.summary.update({RESULT_PREFIX + key: value for key, value in result.items()})

    @contextlib.contextmanager
    def _while_it_lives(self, loss: str) -> Iterator[None]:
        """When W&B's process has ended, print a note once; ``loss`` describes the data that W&B lacks."""
        try:
            yield
        except ConnectionError as error:
            if not self._ended:
                print(f"W&B's process has ended ({error}): {loss}; `dlm sync` mends it", flush=True)
            self._ended = True


def end_wandb(exit_code: int) -> None:
    """Let W&B write and upload its remaining data, then end its process.

    W&B would wait forever for a server that does not answer, so its process is killed after a time limit. Data that has
    not reached the server by then is on disk.

    Args:
        exit_code: The exit code of this process. The time limit is PATIENCE_PREEMPTED_SEC for a preempted run, else
            PATIENCE_SEC.
    """
    if "wandb" not in sys.modules:
        return
    patience = PATIENCE_PREEMPTED_SEC if exit_code == ExitCode.PREEMPTED else PATIENCE_SEC
    timer = threading.Timer(patience, _give_up, [patience])
    timer.start()
    try:
        # The signal that ended this run may have ended W&B's process too; teardown may raise SystemExit.
        with contextlib.suppress(ConnectionError, SystemExit):
            sys.modules["wandb"].teardown(exit_code)
    finally:
        timer.cancel()
        vars(sys.modules["wandb"])["run"] = (
            None  # else the next run of this process would log to this one, which has ended
        )


def _give_up(patience: float) -> None:
    print(f"W&B has not taken everything within {patience:.0f} s: `dlm sync` uploads the rest", flush=True)
    for pid in _cores():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # W&B ignores SIGTERM while it waits; all its data is in its file on disk


def _cores() -> Iterator[int]:
    """Yield the process ids of the W&B processes that this process started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just ended
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            if name.startswith("wandb-core") and int(rest.split()[1]) == os.getpid():
                yield int(stat.parent.name)
