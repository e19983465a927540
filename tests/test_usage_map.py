"""docs/usage_map.md has every usage example of the document that first described dlm."""

import os
import re
from pathlib import Path

import pytest
from support import ROOT

ORIGIN = Path(os.environ.get("DLM_REFERENCE_DATA", "nowhere")).parent / "origin.md"
SCRIPT = re.compile(r"python (?:src/cli/)?(train\.py.*)")


def examples() -> set[str]:
    """Every command of the document that trains, on one line, without Python and the folder of the script."""
    text = re.sub(r"\s*\\\n\s*", " ", ORIGIN.read_text())
    return {" ".join(found.split("`")[0].split()) for found in SCRIPT.findall(text)}


@pytest.mark.skipif(not ORIGIN.is_file(), reason="DLM_REFERENCE_DATA names no folder beside the origin document")
def test_every_usage_example_of_the_origin_is_in_the_map():
    table = (ROOT / "docs" / "usage_map.md").read_text()
    wanted = examples() - {"train.py"}
    assert len(wanted) >= 9, wanted
    rows = [line for line in table.splitlines() if line.startswith("| `train.py")]
    assert not [example for example in sorted(wanted) if not any(f"| `{example}` |" in row for row in rows)]
