"""Store the tables of a collected sweep here, small enough for git: `python analysis/results/store.py SWEEP ...`.

runs.csv and excluded.csv are copied; of several folders of one sweep, their rows are joined, without the runs that are
in both. Of history.parquet, the losses are kept: every validation, and at most 40 training losses of each run. The
lines to put into README.md are printed.
"""

import hashlib
import sys
from pathlib import Path

import pandas as pd

from dlm.fit.csv_file import as_csv, read_csv

HERE = Path(__file__).parent
KEPT = ["run_id", "step", "tokens", "train/loss", "val/loss"]
TRAINING = 40  # training losses that are kept of each run


def thinned(history: pd.DataFrame) -> pd.DataFrame:
    """Return every validation and at most TRAINING training losses of each run."""
    place = history.groupby("run_id").cumcount()
    length = history.groupby("run_id")["step"].transform("size")
    every = (length / TRAINING).clip(lower=1).round()
    rows = history.loc[(place % every == 0) | history["val/loss"].notna(), KEPT]
    return rows.astype({"step": "int32", "tokens": "int64", "train/loss": "float32", "val/loss": "float32"})


def stored(folders: list[Path]) -> list[Path]:
    """Write the tables of one sweep, and return their paths."""
    name = folders[0].name
    runs = pd.concat([read_csv(folder / "runs.csv") for folder in folders]).drop_duplicates("run_id")
    left_out = pd.concat([read_csv(folder / "excluded.csv") for folder in folders]).drop_duplicates("run_id")
    left_out = left_out[~left_out["run_id"].isin(runs["run_id"])]
    history = pd.concat([pd.read_parquet(folder / "history.parquet", columns=KEPT) for folder in folders])
    history = thinned(history[history["run_id"].isin([*runs["run_id"], *left_out["run_id"]])])
    paths = [HERE / f"{name}_{what}" for what in ("runs.csv", "excluded.csv", "history.parquet")]
    paths[0].write_text(as_csv(runs))
    paths[1].write_text(as_csv(left_out))
    history.to_parquet(paths[2], index=False, compression="zstd", compression_level=19)
    return paths


if __name__ == "__main__":
    for path in stored([Path(folder) for folder in sys.argv[1:]]):
        print(f"| {path.name} | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |")
