"""Run a module of dlm in a process of its own, and measure the most memory that it used."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass

CAP_BYTES = 4 * 2**30  # of address space: a fault may not take the memory of the machine

# The peak is that of this process alone. What wait4 reports begins with the memory of the process that started it.
_RUN = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, ({CAP_BYTES}, {CAP_BYTES}))
sys.argv[:] = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""


@dataclass(frozen=True)
class Limited:
    """How a command ended."""

    code: int
    said: str  # what it printed to stderr
    peak_mb: float

    @property
    def complaint(self) -> str:
        """The one line of a refusal."""
        assert self.code == 2, (self.code, self.said[-2000:])
        (line,) = self.said.splitlines()
        assert line.startswith("dlm: ") and len(line) < 1000, line[:1000]
        assert self.peak_mb < 1000, self.peak_mb
        return line


def run_limited(module: str, *words: object) -> Limited:
    """Run `python -m module words`."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, module, *map(str, words)], capture_output=True, text=True, check=False
    )
    said, peak_kb = re.search(r"(?s)(.*)VmHWM:\s+(\d+) kB\s*$", done.stderr).groups()
    return Limited(done.returncode, said, int(peak_kb) / 1000)
