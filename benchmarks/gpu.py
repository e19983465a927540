"""Measure dlm on one GPU in a given time: numbers, speed, peers. The most important measurements come first.

    python benchmarks/gpu.py --seconds 540 --out card --peers DIR     # on a card
    python benchmarks/gpu.py --seconds 600 --out toy --toy            # on a CPU: shows that every row runs

On a new card: run the first command; read the table that it prints and the numbers in card/card_*.json; run it again
to go on where it stopped. Rows that are measured are skipped; rows that failed are tried again after all others. The
file is written after every measurement, so nothing is lost when the script is killed. It belongs to one device, one
version of the code and one scale; after a change of the code, the script begins a new file.

Every row is measured in a process beside this one. If a row raises an exception, hangs or takes the process down, only
that row is lost, and its record says what happened. A row whose micro-batch needs too much memory, by the estimate or
in fact, is tried with half of it; its record says so. The script ends within its seconds: it does not start a row whose
estimate is more than what is left, names it in not_run, and stops a row that is not finished at the end.

Rows (--rows takes groups or names), with the goals that they decide: product (of matrices); numbers (loss and gradients
on the device against the CPU); steps (170M by micro-batch, compilation and attention kernel); smdm (its own training
step beside ours, G1); mfu (6M to 1028M, G5); launch (a whole run beside a bare loop, G6); compile (with an empty and a
full cache, G9); head (on masked positions only, G7); cross_entropy; and nanochat (G2), litgpt (G3) and modernbert (G4)
beside ours. DIR holds checkouts SMDM/, nanochat/ and litgpt/; without one, its rows are absent. Rows that dlm refuses,
for a kernel that is not installed for example, say so. The output of the measuring process is in log.txt.

Two sides are measured in turn, A B A B, in windows of 20 steps; results are medians of five windows after a warm-up.
MFU counts what is computed (full_masked_head), and causal attention whole, as nanochat does.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.card.estimates import Device, Estimate, Pace, estimate, fitting
from benchmarks.card.results import Results, code_hash
from benchmarks.card.rows import SCALES, Row, all_rows
from benchmarks.card.worker import Lost, Worker
from benchmarks.side_by_side import ROOT, commit
from dlm.core.errors import UserError

RESERVE = 2.0  # seconds for ending a process and writing the file
USABLE = 0.95  # the share of the free memory that estimates may fill
LEAST_LIMIT = 30.0  # seconds before a row is stopped, however short its estimate
MOST_HALVINGS = 5


class Script:
    """One call of the script: the rows to measure, the time that is left, and the file."""

    def __init__(self, options: argparse.Namespace, began: float) -> None:
        self.options, self.deadline = options, began + options.seconds - RESERVE
        self.scale = SCALES[options.scale]
        self.rows = chosen(options.rows)
        self.pace = Pace()
        self.worker = Worker(
            {"device": options.device, "scale": options.scale, "peers": str(options.peers.resolve()),
             "smdm": options.smdm and str(options.smdm.resolve()),
             "memory_gib": options.memory_gib},
            options.out / "log.txt",
        )  # fmt: skip

    def left(self) -> float:
        """Return the seconds that are left for measurements."""
        return self.deadline - time.monotonic()

    def run(self) -> int:
        """Measure what the time allows; return the exit code."""
        self._check_scale(self.options.device)
        try:
            said = self.worker.start(timeout=max(self.left(), 0))
        except Lost as error:
            print(f"the measuring process gave no answer: {error} (see {self.options.out / 'log.txt'})\n"
                  f"not run: {len(self.rows)}: {', '.join(row.name for row in self.rows)}")  # fmt: skip
            return 1
        self._check_scale(said["type"])
        self.results = Results(self.options.out, self._about(said))
        self.results.call(shlex.join(["python", *sys.argv]))
        free = said["free_gib"] * USABLE
        self.device = Device(
            name=said["device"], type=said["type"], product_flops_per_sec=said["product_flops_per_sec"],
            memory_gib=min(free, self.options.memory_gib or free),
        )  # fmt: skip
        print(f"{said['device']}, {self.device.memory_gib:.3g} GiB, torch {said['torch']}: {self.results.path}")
        todo = self._todo()
        self._print_table(todo)
        for row in todo:
            self._measure(row)
        self.results.write()
        return self._summary()

    def _check_scale(self, device: str | None) -> None:
        """Raise UserError if the sizes of a card would run on a CPU."""
        if device == "cpu" and self.options.scale == "card":
            raise UserError("PyTorch has no GPU here, and these sizes would take days: give --toy or --medium")

    def _about(self, said: dict[str, Any]) -> dict[str, Any]:
        return {
            **{key: value for key, value in said.items() if key not in ("free_gib", "product_flops_per_sec")},
            "memory_gib": self.options.memory_gib,
            "commit": commit(ROOT),
            "code": code_hash(),
            "scale": self.options.scale,
            "is_measurement": self.options.scale == "card",  # the other scales show that the script works
        }

    def _todo(self) -> list[Row]:
        """Return the rows without numbers, in the order of worth; those that were tried before come last."""
        known = [row.name for row in self.rows if self.results.is_measured(row.name)]
        if known:
            print(f"skipped, measured before: {', '.join(known)}")
        return sorted((row for row in self.rows if row.name not in known), key=lambda row: bool(self._tried(row)))

    def _tried(self, row: Row) -> dict[str, Any]:
        return self.results.row(row.name)

    def _estimate(self, row: Row) -> Estimate:
        found = estimate(row, self.scale, self.device)
        return dataclasses.replace(found, seconds=found.seconds * self.pace(row))

    def _print_table(self, rows: Sequence[Row]) -> None:
        """Print the estimates, and which rows fit into the time one after the other."""
        print(f"\n{'row':32} {'micro-batch':>11} {'seconds':>8} {'GiB':>7}  within {self.options.seconds:g} s")
        left = self.left()
        for row in rows:
            smaller, _ = fitting(row, self.scale, self.device)
            found = self._estimate(smaller)
            fits, sizes = found.seconds <= left, self.scale.micro_batch(smaller.micro_batch)
            left -= found.seconds if fits else 0
            halved = "" if smaller == row else f" of {self.scale.micro_batch(row.micro_batch)}"
            print(f"{row.name:32} {f'{sizes}{halved}':>11} {found.seconds:8.1f} {found.memory_gib:7.2f}  "
                  f"{'yes' if fits else 'no'}")  # fmt: skip
        print(flush=True)

    def _measure(self, row: Row) -> None:
        """Measure one row, with smaller micro-batches while the memory is not enough; keep what became of it."""
        smaller, halvings = fitting(row, self.scale, self.device)
        out_of_memory: list[str] = []
        while True:
            found = self._estimate(smaller)
            if found.seconds > self.left():
                self.results.leave_out(row.name, estimated_sec=found.seconds, left_sec=max(self.left(), 0.0))
                return
            answer = self._ask(smaller, found)
            if "out_of_memory" not in answer:
                break
            out_of_memory.append(answer["out_of_memory"])
            if smaller.micro_batch == 1 or halvings == MOST_HALVINGS:
                answer["failed"] = answer.pop("out_of_memory")
                break
            smaller, halvings = smaller.halved(1), halvings + 1
        if "measured" in answer:
            self.pace.learn(row, estimate(smaller, self.scale, self.device).seconds, answer["seconds"])
        record = {
            **answer,
            "estimated_sec": found.seconds,
            "estimated_gib": found.memory_gib,
            "model": self.scale.model(row.size),
            "micro_batch": self.scale.micro_batch(smaller.micro_batch),
            "asked_micro_batch": self.scale.micro_batch(row.micro_batch),
            "halvings": halvings,
            "out_of_memory": out_of_memory,
            "overrides": dict(row.overrides),
        }
        self.results.add(row.name, record)
        print(f"{row.name}: {in_short(record)}", flush=True)

    def _ask(self, row: Row, found: Estimate) -> dict[str, Any]:
        began = time.monotonic()
        limit = max(LEAST_LIMIT, self.scale.patience * found.seconds)
        try:
            answer = self.worker.ask(dataclasses.asdict(row), limit=limit, left=self.left())
        except Lost as error:
            return {"failed": str(error), "seconds": time.monotonic() - began}
        if "failed" in answer:
            self.worker.end()  # the device may answer nothing any more; the next row begins with a clean one
        return answer

    def _summary(self) -> int:
        """Say what is measured and what is not. Returns 1 if a row failed."""
        records = {row.name: self._tried(row) for row in self.rows}
        for word in ("measured", "absent", "refused", "failed"):
            names = [name for name, record in records.items() if word in record]
            print(f"{word}: {len(names)}{'' if word == 'measured' or not names else ': ' + ', '.join(names)}")
        left_out = [name for name in records if name in self.results.content["not_run"]]
        why = f", their estimates are more than what was left: {', '.join(left_out)}" if left_out else ""
        print(f"not run: {len(left_out)}{why}")
        return int(any("failed" in record for record in records.values()))


def in_short(record: dict[str, Any]) -> str:
    """Return one line about a record."""
    if "measured" not in record:
        word = next(word for word in ("absent", "refused", "failed") if word in record)
        return f"{word}: {record[word].splitlines()[0][:200]}"
    found = record["measured"]
    shown = ("mfu", "tokens_per_sec", "flops_per_sec", "gradient_relative_error", "is_rounding", "overhead",
             "first_step_sec", "cold_sec", "warm_sec", "gradient_relative_difference")  # fmt: skip
    parts = [f"{key} {_number(found[key])}" for key in shown if key in found]
    halved = f", micro-batch {record['micro_batch']}" if record["halvings"] else ""
    return f"{', '.join(parts)}{halved} ({record['seconds']:.1f} s, estimated {record['estimated_sec']:.1f})"


def _number(value: Any) -> str:
    if isinstance(value, dict):
        both = [f"{name} {_number(value[name])}" for name in ("ours", "peer") if name in value]
        return f"{', '.join(both)}" + (f" ({value['ratio']:.2f}x)" if "ratio" in value else "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def chosen(words: str | None) -> list[Row]:
    """Return the rows of --rows, in the order of worth. Raises UserError for a name that is none."""
    rows = all_rows()
    if words is None:
        return rows
    names = words.split(",")
    groups = list(dict.fromkeys(row.group for row in rows))
    if strange := [name for name in names if name not in groups and name not in {row.name for row in rows}]:
        raise UserError(f"--rows {', '.join(strange)}: allowed are {', '.join(groups)}, and names of rows")
    return [row for row in rows if row.group in names or row.name in names]


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=540.0, help="end within this time")
    parser.add_argument("--out", type=Path, default=Path("card"), help="the folder of the results file")
    parser.add_argument("--rows", help="groups or names of rows, separated by commas; by default all")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="the folder of the peers' checkouts")
    parser.add_argument("--smdm", type=Path, help="the checkout of SMDM, if it is not in the folder of the peers")
    parser.add_argument("--memory-gib", type=float, help="use no more memory, for example 75 to compare with an H100")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="by default cuda where there is one")
    scales = parser.add_mutually_exclusive_group()
    scales.add_argument("--toy", dest="scale", action="store_const", const="toy", help="tiny models, about a minute")
    scales.add_argument("--medium", dest="scale", action="store_const", const="medium", help="models for a CPU")
    parser.set_defaults(scale="card")
    return parser.parse_args()


def main() -> int:
    """Measure; return the exit code: 0, 1 if a row failed, 2 for a mistake in the command."""
    began = time.monotonic()
    options = parsed()
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    script = None
    try:
        script = Script(options, began)
        return script.run()
    except UserError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    finally:
        if script is not None:
            script.worker.end()


if __name__ == "__main__":
    sys.exit(main())
