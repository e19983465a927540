"""A stand-in for SLURM: shell scripts for sbatch, squeue, sacct and scancel that read and write files.

The state is a folder with one file per task, or per job that is no array: TASK.live holds the state of a queued or
running task, and TASK.ended holds state|code:signal. If there is a file `refuse`, sbatch refuses; if there is a file
`down`, squeue and sacct fail.
"""

import textwrap
from pathlib import Path

from support.submissions import write_command

SBATCH = """
    [ "$1" = --parsable ] || exit 9
    if [ -f {db}/refuse ]; then echo "sbatch: error: Batch job submission failed: Invalid partition" >&2; exit 1; fi
    n=$(ls {db}/*.script 2>/dev/null | wc -l); id=$((1001 + n)); cp "$2" {db}/$id.script
    last=$(grep -oP '#SBATCH --array=0-\\K[0-9]+' "$2")
    [ -n "$last" ] || echo "PENDING" > {db}/$id.live
    for i in ${{last:+$(seq 0 $last)}}; do echo "PENDING" > {db}/${{id}}_$i.live; done
    echo $id
"""
TELL = """
    cd {db}; [ -f down ] && exit 1
    name() {{ grep -oP '(?<=--job-name=).*' ${{1%%_*}}.script; }}
"""
WHY = "$(cat ${{f%.live}}.why 2>&-)"
SQUEUE = TELL + 'for f in *.live; do [ -f $f ] && echo "${{f%.live}}|$(cat $f)|0|' + WHY + '|$(name $f)|"; done; true'
SACCT = TELL + 'for f in *.ended; do [ -f $f ] && echo "${{f%.ended}}|$(cat $f)|None|$(name $f)"; done; true'
SCANCEL = 'cd {db}; for id in "$@"; do rm $id.live; echo "CANCELLED by 0|0:15" > $id.ended; done'


def install(bin_dir: Path, db: Path) -> None:
    """Write the commands to ``bin_dir``, and create the folder ``db`` for their state."""
    db.mkdir()
    for name, body in {"sbatch": SBATCH, "squeue": SQUEUE, "sacct": SACCT, "scancel": SCANCEL}.items():
        write_command(bin_dir, name, textwrap.dedent(body).format(db=db))


def end(db: Path, task: str, said: str) -> None:
    """End a task; ``said`` is its line state|code:signal for sacct."""
    (db / f"{task}.live").unlink()
    (db / f"{task}.ended").write_text(said)
