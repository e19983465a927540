"""Real W&B runs from a JSON file, in a process of their own: `python wandb_runs.py SPEC.json`.

The file holds a list of {dir, id, group, config, rows, exit, mode, tags, summary}."""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    os.environ["WANDB_SILENT"] = "true"
    import wandb

    for spec in json.loads(Path(sys.argv[1]).read_text()):
        run = wandb.init(
            mode=spec.get("mode", "offline"),
            tags=spec.get("tags"),
            project="dlm",
            id=spec["id"],
            group=spec["group"],
            dir=spec["dir"],
            resume="allow",
            config=spec.get("config", {}),
            settings=wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off"),
        )
        for row in spec["rows"]:
            run.log(row)
        run.summary.update(spec.get("summary", {}))
        run.finish(exit_code=spec.get("exit", 0))


if __name__ == "__main__":
    main()
