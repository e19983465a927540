"""Read a folder of .wandb files, the runs of a project that logged offline, as if a W&B server had them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from dlm.collect.wandb_file import WandbRun, read_wandb_file
from dlm.core.errors import UserError


class WandbFolder:
    """The runs in the .wandb files of a folder and of the folders in it, for `collect_mapped`.

    A file without an exit record belongs to a run that was killed, or that is still running; its state is 'crashed', as
    a W&B server says of a run that no longer answers.

    Args:
        folder: The folder.

    Raises:
        UserError: There is no .wandb file, one cannot be read, or two are of one run.
    """

    def __init__(self, folder: Path) -> None:
        self.runs: dict[str, WandbRun] = {}
        for path in sorted(Path(folder).rglob("*.wandb")):
            run = read_wandb_file(path)
            if run.run_id is None:
                raise UserError(f"{path} does not name its run: it was killed before it began, so remove the file")
            if run.run_id in self.runs:
                first = self.runs[run.run_id].path
                raise UserError(f"{first} and {path} are of one run, {run.run_id}: keep the file of the attempt to use")
            run.state = {None: "crashed", 0: "finished"}.get(run.exit_code, "failed")
            changed = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
            run.version = f"{path.stat().st_size}@{changed}"
            self.runs[run.run_id] = run
        if not self.runs:
            raise UserError(f"there is no .wandb file in {folder}: give a folder of runs that logged to W&B offline")

    def read_histories(self, run_ids: Iterable[str]) -> None:
        """Do nothing: the histories were read with the files."""
