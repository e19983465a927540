"""loggers: W&B's logger for runs that must outlive W&B. Named in configs/logger/wandb.yaml."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger


class WandbLogger(LightningWandbLogger):
    """Lightning's, but the end of W&B's own process is not the end of the run.

    SLURM sends SIGTERM to every process of a job: W&B's ends at once, while the run still takes a step to its last
    checkpoint. What it logs then is in metrics.jsonl, and the next attempt goes on in the same W&B run.
    """

    _ended = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log, as long as there is somebody to log to."""
        if self._ended:
            return
        try:
            super().log_metrics(metrics, step)
        except ConnectionError as error:
            self._ended = True
            print(f"W&B's process has ended ({error}): from step {step} on metrics.jsonl alone is written", flush=True)
