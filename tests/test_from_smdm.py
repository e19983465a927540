"""docs/from_smdm.md has every key of other projects for which dlm names a replacement."""

import re

import pytest
from support import ROOT

from dlm.core.replaced_keys import INSTEAD

TABLE = (ROOT / "docs" / "from_smdm.md").read_text().split("## Keys of DLM-Train", 1)[1]
THEIRS = {
    code for row in re.findall(r"^\| (.*?) \|", TABLE, flags=re.MULTILINE) for code in re.findall(r"`(.+?)`", row)
}


@pytest.mark.parametrize("key", [key for key in INSTEAD if not key.endswith("=default")])
def test_a_replaced_key_is_in_the_table(key):
    assert key in THEIRS
