"""A table of runs that is not one, or that a small file unpacks to, is refused in one line without much memory."""

import bz2
import gzip
import lzma

import numpy as np
import pytest
from support.limited import run_limited

from dlm.core.errors import UserError
from dlm.fit.rows import MAX_BYTES, read_runs

HEAD = "params,tokens,loss\n"


def test_a_compressed_table_of_gigabytes_is_refused(tmp_path):
    path = tmp_path / "runs.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(HEAD.encode())
        for _ in range(MAX_BYTES // 2**24 + 1):
            stream.write(b"3" * 2**24)
    said = f"dlm: {path} holds more than 256 MiB, too much for a table of runs: divide it"
    assert run_limited("dlm.cli", "fit", path).complaint == said


def test_a_cell_of_megabytes_is_named_in_one_short_line(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(f"{HEAD}1e6,2e7,{'3' * 20_000_000}x\n")
    with pytest.raises(UserError, match=r"row 2: loss is '3333.*, not a number above 0") as error:
        read_runs(path)
    assert len(str(error.value)) < 300
    path.write_text(f'{HEAD}1e6,2e7,"{"3" * 20_000_000}\n')
    with pytest.raises(UserError, match="is not a CSV file"):
        read_runs(path)


@pytest.mark.parametrize("suffix", [".gz", ".GZ", ".bz2", ".xz"])
def test_a_compressed_table_is_read_and_a_damaged_one_is_named(suffix, tmp_path):
    rows = np.random.default_rng(0).uniform(1, 9, (300, 3))
    path = tmp_path / f"runs.csv{suffix}"
    opens = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with opens[suffix.lower()](path, "wt") as stream:
        stream.write(HEAD + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    assert len(read_runs(path)) == 300
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=f"is damaged or no {suffix} file"):
        read_runs(path)
    path.write_text(HEAD)
    with pytest.raises(UserError, match=f"is damaged or no {suffix} file"):
        read_runs(path)
