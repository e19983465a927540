"""Collect run directories, .wandb files and runs on a W&B server into runs.csv, excluded.csv and history.parquet."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
