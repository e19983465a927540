"""progress: Lightning's own progress bar on a terminal, nothing in a log file."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """TQDMProgressBar where standard error is a terminal; refreshed seldom, so that it costs nothing."""

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)
        if not sys.stderr.isatty():
            self.disable()

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """No loss value: reading it would stall a GPU at every refresh."""
        return {}
