"""loggers: W&B's logger for runs that must outlive W&B. Named in configs/logger/wandb.yaml.

What W&B misses is in metrics.jsonl and in its own file on disk, and `dlm sync` brings it there later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger

from dlm.record import RESULT_PREFIX


class WandbLogger(LightningWandbLogger):
    """Lightning's, but the end of W&B's own process is not the end of the run.

    SLURM sends SIGTERM to every process of a job: W&B's ends at once, while the run still takes a step to its last
    checkpoint. What it logs then is in metrics.jsonl, and the next attempt goes on in the same W&B run.
    """

    _ended = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # W&B 0.31 warns of it, even of None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log, as long as there is somebody to log to."""
        if self._ended:
            return
        try:
            super().log_metrics(metrics, step)
        except ConnectionError as error:
            self._ended = True
            print(f"W&B's process has ended ({error}): from step {step} on metrics.jsonl alone is written", flush=True)

    def log_result(self, result: Mapping[str, Any]) -> None:
        """Put the result of the run into its summary, number by number (record.logged_result reads it)."""
        if self._ended:
            return
        try:
            self.experiment.summary.update({RESULT_PREFIX + key: value for key, value in result.items()})
        except ConnectionError as error:
            self._ended = True
            print(f"W&B's process has ended ({error}): it has no result, result.json has", flush=True)
