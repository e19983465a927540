"""CITATION.cff and the entry in docs/citing.md name the version and the licence of the package."""

import re
import tomllib

import yaml
from support import ROOT

PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_file_is_of_this_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["message"]
    assert cited["title"].startswith(PACKAGE["name"]) and cited["authors"] == [{"name": "The dlm authors"}]
    assert (str(cited["version"]), cited["license"]) == (PACKAGE["version"], "MIT")
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_bibtex_entry_says_the_same():
    entry = (ROOT / "docs" / "citing.md").read_text()
    fields = dict(re.findall(r"^  (\w+) += \{(.+?)\},?$", entry, flags=re.MULTILINE))
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert fields["title"] == cited["title"] and fields["author"] == "{The dlm authors}"
    assert (fields["version"], fields["license"]) == (str(cited["version"]), cited["license"])
