"""The documentation that `make docs` builds: the pages that the code writes, the navigation, and the links."""

import importlib
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml
from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import reference
import reference_keys
import site_pages

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.fixture(scope="module")
def made():
    return reference.pages()


def in_nav(part: object) -> list[str]:
    """The pages of a part of the navigation, in its order."""
    if isinstance(part, str):
        return [part]
    return [page for one in (part.values() if isinstance(part, dict) else part) for page in in_nav(one)]


def test_every_page_of_docs_is_once_in_the_navigation():
    pages = in_nav(SITE["nav"])
    assert sorted(page for page in pages if (ROOT / "docs" / page).exists()) == sorted(PAGES)
    assert set(pages) - PAGES == {"index.md", *site_pages.top_pages()}


@pytest.mark.parametrize("name", ["sweep_keys.md", "config_keys.md", "commands.md", "api.md"])
def test_a_page_that_the_code_writes_is_as_the_code_says(name, made):
    assert (ROOT / "docs" / name).read_text() == made[name], "run: python tools/reference.py"


def test_check_names_a_stale_page_and_ends_with_1(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference, "pages", lambda: made)
    for name, text in made.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(reference, "DOCS", tmp_path)
    assert reference.main(["--check"]) == 0
    (tmp_path / "commands.md").write_text("old")
    assert reference.main(["--check"]) == 1
    assert "commands.md is out of date" in capsys.readouterr().err
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0


def test_every_public_name_is_on_the_page_and_has_a_docstring():
    text = (ROOT / "docs" / "api.md").read_text()
    for module, names in reference.public_names().items():
        for name in names:
            assert f"::: {module}.{name}\n" in text
            assert getattr(importlib.import_module(module), name).__doc__, f"{module}.{name} has no docstring"


def test_a_comment_of_a_config_file_belongs_to_the_key_beside_it_or_below_it(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text(
        "# The file.\ndefaults: [base]\na: 1 # beside\n# on b\nb:\n  # above\n  # it\n  c: [1, 2] # too\nd: 'x # y'\n"
    )
    file = reference_keys.read_config(path)
    assert (file.head, file.inherits) == ("The file.", ("base",))
    assert file.keys == {"a": ("1", "beside"), "b.c": ("[1, 2]", "above it too"), "d": ("'x # y'", "")}


def test_every_link_of_a_page_leads_to_a_page_of_the_site():
    text = (
        "[a](../README.md) [b](../sweeps/demo.yaml) [c](files.md#exit-codes) [d](../BENCHMARKS.md#x) [e](https://x.org)"
    )
    assert site_pages.with_site_links(text, "docs/sweeps.md") == (
        "[a](index.md) [b](files/sweeps/demo.yaml.md) [c](files.md#exit-codes) [d](BENCHMARKS.md#x) [e](https://x.org)"
    )
    assert site_pages.with_site_links("[a](docs/sweeps.md)", "README.md") == "[a](sweeps.md)"
    for fence in ("```", "````python"):
        code = f"{fence}\n[a](docs/sweeps.md)\n{fence.removesuffix('python')}\n"
        assert site_pages.with_site_links(code, "README.md") == code


def test_a_link_to_a_file_that_is_not_text_leads_to_a_copy_of_it():
    link = "[a](tuned_history.parquet) [b](tuned_runs.csv)"
    assert site_pages.with_site_links(link, "analysis/results/README.md") == (
        "[a](tuned_history.parquet) [b](tuned_runs.csv.md)"
    )


def test_the_site_loads_nothing_from_another_server():
    assert SITE["theme"]["font"] is False
    assert all((ROOT / "docs" / path).is_file() for path in SITE["extra_css"])
    assert "extra_javascript" not in SITE
    assert "offline" not in SITE["plugins"]  # it adds a script of unpkg.com to every page


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs: make docs installs it")
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert "make_plan" in (tmp_path / "api.html").read_text()
