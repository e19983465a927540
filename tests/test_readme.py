"""Whatever README, the pages of docs/ and CONTRIBUTING name exists: commands, options, configs, links, files, names."""

import ast
import importlib
import os
import pkgutil
import re
import subprocess
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import typer
import yaml
from omegaconf import DictConfig
from support import ROOT, TESTS
from support.markdown import Page
from typer.testing import CliRunner

from dlm.cli.verbs import FOR_ALL_VERBS, app
from dlm.collect.mapping import load_mapping
from dlm.core import classes
from dlm.core.configs import choices
from dlm.core.errors import ExitCode, UserError
from dlm.core.flops import CONVENTIONS
from dlm.core.paths import configs_dir
from dlm.data.prepare import command as command_of_prepare
from dlm.fit.table import LAWS
from dlm.plan.definition import SweepSpec

README, CONTRIBUTING = Page(ROOT / "README.md"), Page(ROOT / "CONTRIBUTING.md")
MADE = [Page(ROOT / "docs" / f"{name}.md") for name in ("api", "commands", "config_keys", "sweep_keys")]  # by the code
DOCS = [page for path in sorted((ROOT / "docs").glob("*.md")) if (page := Page(path)) not in MADE]
PAGES = [README, CONTRIBUTING, *DOCS]
BENCHMARKS = Page(ROOT / "BENCHMARKS.md")
ALL_PAGES = [*PAGES, *MADE, BENCHMARKS, Page(ROOT / "CHANGELOG.md")]
FOLDERS = ("dlm", "configs", "sweeps", "tests", "benchmarks", "docs", "analysis")
PYTHON = (".venv/bin/python", "python")
DLM = (".venv/bin/dlm", "dlm")
EXAMPLES = ("configs/data/mine.yaml", "data=mine")  # what the reader is told to make
COMMAND = typer.main.get_command(app)

each_page = pytest.mark.parametrize("page", PAGES, ids=str)


def commands(*programs: str) -> list[list[str]]:
    """Every command of these programs in any page, once: the words after the program, where there are some."""
    found = [words[1:] for page in PAGES for words in page.commands() if words[0] in programs and words[1:]]
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


def test_the_readme_has_at_most_1500_words():
    assert len(README.text.split()) <= 1500


def test_the_readme_links_every_page_that_a_newcomer_needs():
    """All pages are in the navigation of the site (tests/test_site.py); README has no room for all of them."""
    pages = "sweeps cluster training data collecting fitting repeated_data conventions tuning files security"
    assert {f"docs/{name}.md" for name in pages.split()} <= set(README.links())


@pytest.mark.parametrize("page", ALL_PAGES, ids=str)
def test_every_link_leads_somewhere(page):
    for link in page.links():
        name, _, anchor = link.partition("#")
        target = page.path.parent / name if name else page.path
        assert target.exists(), link
        assert not anchor or anchor in Page(target).anchors(), link


@each_page
def test_every_path_exists(page):
    """A path is code that begins with a folder of the repository; it may hold wildcards."""
    for code in page.inline():
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", code) and code not in EXAMPLES:
            assert list(ROOT.glob(code.rstrip("/"))), code


def test_every_name_that_is_said_to_be_in_a_file_is_there():
    """Where CONTRIBUTING says `A`, or `A` and `B`, in `FILE`."""
    for names, path in re.findall(r"((?:`\w[\w.]*`(?:,? and |, | or )?)+)\s+in\s+`([\w/]+\.\w+)`", CONTRIBUTING.prose):
        for name in re.findall(r"`(?:\w+\.)*(\w+)`", names):
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{path} has no {name}"


@each_page
def test_every_python_name_exists(page):
    for code in page.inline():
        if re.fullmatch(r"dlm(\.\w+)+", code):
            pkgutil.resolve_name(code)


@pytest.mark.parametrize("page", [page for page in PAGES if page.blocks("python")], ids=str)
def test_every_name_that_a_python_block_imports_exists(page):
    for block in page.blocks("python"):
        for node in ast.walk(ast.parse(block)):
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                assert hasattr(importlib.import_module(node.module), alias.name), ast.unparse(node)


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_every_target_and_variable_of_make_exists(words):
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        wanted = rf"\$\({name}\)" if equals else rf"^{name}: .*## "
        assert re.search(wanted, makefile, flags=re.MULTILINE), f"the Makefile has no {name}"


def test_every_target_of_make_is_phony_and_begins_with_what_exists():
    """`make -n` resolves the prerequisites of a target and prints its commands without running them."""
    makefile = (ROOT / "Makefile").read_text()
    phony = {name for line in re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE) for name in line.split()}
    assert set(re.findall(r"^([a-z-]+): .*## ", makefile, flags=re.MULTILINE)) <= phony
    for target in sorted(phony):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def parse(words: list[str]) -> None:
    """Let the `dlm` command read a command line without carrying it out; an unknown word or option fails."""
    while words[1:] and words[0] in FOR_ALL_VERBS:
        words = words[1:]
    if len(words) == 1 or words == ["VERB", "--help"]:  # a verb that is named in the text
        assert words[0] in (*COMMAND.commands, *FOR_ALL_VERBS, "VERB", "--help"), words
        return
    verb, *rest = words
    context = COMMAND.make_context("dlm", [verb, *rest], resilient_parsing=False)
    name, command, rest = COMMAND.resolve_command(context, [verb, *rest])
    if "--help" not in rest:
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("words", commands(*DLM), ids=" ".join)
def test_every_verb_and_option_of_dlm_exists(words):
    parse(words)


@pytest.mark.parametrize(("verb", "module"), [("prepare", "dlm.data.prepare.command"), ("convert", "dlm.convert")])
def test_every_option_of_a_verb_with_its_own_parser_exists(verb, module, monkeypatch, tmp_path):
    """Such a verb accepts the line, and then complains of the absent source; argparse would raise SystemExit."""

    def stop(folder):
        raise UserError("nothing is prepared here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_of_prepare, "prepare_stdlib", stop)
    lines = [words[1:] for words in commands(*DLM) if words[0] == verb and len(words) > 1]
    assert lines
    for words in lines:
        if "--help" not in words:
            assert importlib.import_module(module).main(words) == ExitCode.USER_ERROR, words


def modules() -> list[list[str]]:
    return [words[1:] for words in commands(*PYTHON) if words[0] == "-m"]


@pytest.mark.parametrize("words", [words for words in modules() if words[1:]], ids=" ".join)
def test_every_module_runs_and_its_configs_compose(words, monkeypatch):
    monkeypatch.setenv(classes.VARIABLE, "")  # restored after a command with --allow-target
    module, *overrides = words
    assert find_spec(module) is not None
    if module == "dlm.launch":
        compose([word for word in classes.take_flags(overrides) if word not in ("-m", "--rerun")])


def compose(overrides: list[str]) -> DictConfig:
    """The config of a run; of a list of values, the first."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from dlm.launch import register

    register()
    parsed = OverridesParser.create().parse_overrides(overrides)
    one = [f"{item.key_or_group}={next(item.sweep_string_iterator())}" if item.is_sweep_override() else item.input_line
           for item in parsed]  # fmt: skip
    with hydra.initialize_config_dir(str(configs_dir()), version_base=None):
        return hydra.compose("config", overrides=one, return_hydra_config=True)


@each_page
def test_every_override_in_the_text_composes(page):
    groups = [path.relative_to(configs_dir()).as_posix() for path in configs_dir().rglob("*") if path.is_dir()]
    for code in page.inline():
        key, equals, value = code.partition("=")
        if not equals or code in EXAMPLES or not re.fullmatch(r"[a-z][\w./]*=[\w.-]*", code) or key in os.environ:
            continue
        if key in groups:
            assert value in choices(key), code
        else:
            added = [f"hydra/launcher={name}" for name in ("submitit_slurm",) if key.startswith("hydra.launcher.")]
            chosen = [*added, *(["data=slim_star"] if key.startswith("data.sources") else [])]
            compose([*chosen, f"{key}={value or 'null'}"])


def test_every_choice_of_a_table_is_one(tmp_path):
    """The tables of docs/ list what the code allows, all of it and nothing else."""
    fitting, files = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("fitting", "files"))

    def first_cells(text: str, head: str) -> list[str]:
        table = text.split(f"| {head} |", 1)[1].split("\n\n", 1)[0]
        return [re.findall(r"`?([^`|]+?)`?\s*\|", row)[0].strip() for row in table.splitlines()[2:]]

    assert first_cells(fitting, "law") == list(LAWS)
    assert [int(code) for code in first_cells(files, "code")] == [code.value for code in ExitCode]
    assert all(f"`{name}`" in fitting for name in CONVENTIONS)


@pytest.mark.parametrize("name", ["collecting", "your_wandb"])
def test_every_yaml_block_is_a_mapping_file(name, tmp_path):
    blocks = Page(ROOT / "docs" / f"{name}.md").blocks("yaml")
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        load_mapping(path)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder with the tables that the pages name: runs of Chinchilla's law at four budgets, of two objectives."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLM_WORKDIR", str(tmp_path / "workdir"))
    monkeypatch.setenv("DLM_DATA", str(tmp_path / "data"))
    noise = np.random.default_rng(0)
    budget, size = (grid.ravel() for grid in np.meshgrid(10.0 ** np.arange(18, 22), np.arange(-3, 4)))
    params = 0.1 * budget**0.5 * 2.0 ** (size / 2)
    tokens = budget / 6 / params
    loss = (1.7 + 400 / params**0.34 + 400 / tokens**0.28) * np.exp(0.003 * noise.standard_normal(len(params)))
    one = pd.DataFrame({"params": params, "tokens": tokens, "loss": loss, "budget": budget})
    one["objective"] = "autoregressive"
    both = pd.concat([one, one.assign(loss=1.01 * loss, objective="masked_diffusion")])
    for name in ("demo", "theirs"):
        (tmp_path / "workdir" / name).mkdir(parents=True)
        one.to_csv(tmp_path / "workdir" / name / "runs.csv")
    one.to_csv(tmp_path / "OTHER.csv")
    return one, both


FITTING = ("fit", "predict", "score", "compare")


def fitting_commands() -> list[list[str]]:
    return [words for words in commands(*DLM) if words[0] in FITTING and len(words) > 1 and words[1] != "--help"]


def repeating_runs() -> pd.DataFrame:
    """Runs of two objectives, four sizes and three numbers of unique tokens, whose loss turns with the epochs."""
    axes = np.meshgrid(np.geomspace(1e6, 1e9, 4), [1e7, 5e7, 2e8], 4.0 ** np.arange(6), [0.002, 0.02], indexing="ij")
    n, u, e, p = (axis.ravel() for axis in axes)
    loss = 2 + 300 / n**0.33 + 900 / u**0.33 / e**0.2 + p * (n / u) ** 0.5 * e**0.9
    names = np.where(p < 0.01, "masked_diffusion", "autoregressive")
    return pd.DataFrame({"params": n, "tokens": u * e, "unique_tokens": u, "loss": loss, "objective": names})


def test_every_command_that_fits_runs(tables):
    """In the pages' order within each verb, so that predictions are frozen before they are scored."""
    one, both = tables
    repeats = repeating_runs()
    assert {words[0] for words in fitting_commands()} == set(FITTING)
    for words in sorted(fitting_commands(), key=lambda words: FITTING.index(words[0])):
        table = repeats if {"repeated", "penalty"} & set(words) else both if "--objective" in words else one
        table.to_csv("RUNS.csv")
        if "--freeze" in words:  # it writes a new file only
            Path("larger.json").unlink(missing_ok=True)
        fewer = {"score": [], "predict": ["--bootstrap", "100"]}.get(words[0], ["--bootstrap", "0"])
        ended = CliRunner().invoke(app, [*words, *fewer])
        assert ended.exit_code == 0, (words, ended.output, ended.exception)


def test_every_command_that_reconciles_runs(tables):
    """Those of the tables A.csv and B.csv; the others are of published tables, which the repository does not hold."""
    one, _ = tables
    lines = [words for words in commands(*DLM) if words[0] == "reconcile" and "A.csv" in words]
    assert lines
    for words in lines:
        names = {"loss": "val_nll"} if "loss=val_nll" in words else {}
        one.rename(columns=names).to_csv("A.csv")
        one.assign(size=1.1 * one["params"], loss=1.01 * one["loss"]).rename(columns=names).to_csv("B.csv")
        ended = CliRunner().invoke(app, [*words, "--bootstrap", "50"])
        assert ended.exit_code == 0, (words, ended.output, ended.exception)


def test_every_command_that_plans_runs(tables):
    said = {}
    for words in commands(*DLM):
        if words[0] == "plan" and len(words) > 1:
            ended = CliRunner().invoke(app, words)
            assert ended.exit_code == 0, (words, ended.output, ended.exception)
            said[words[1]] = ended.output
    assert "150 cells" in said["sweeps/smdm.yaml"]  # 30 sizes at 5 budgets


def test_every_command_that_looks_at_a_planned_sweep_runs(tables):
    """`dlm status --watch` ends at once where nothing runs, and there is nothing for `dlm cancel` to stop."""
    looking = [words for words in commands(*DLM) if words[0] in ("status", "cancel") and len(words) > 1]
    assert {words[0] for words in looking} == {"status", "cancel"}
    for target in {words[1] for words in looking}:
        CliRunner().invoke(app, ["plan", target])
    for words in looking:
        ended = CliRunner().invoke(app, words)
        assert ended.exit_code == 0, (words, ended.output, ended.exception)


def python_blocks() -> dict[str, str]:
    """Every block of Python in the pages, once (blocks may differ in their comments), with a name for it."""
    named = [(block, f"{page}-{number}") for page in PAGES for number, block in enumerate(page.blocks("python"))]
    return dict({ast.dump(ast.parse(block)): (block, name) for block, name in named}.values())


@pytest.mark.parametrize("block", python_blocks(), ids=python_blocks().values())
def test_every_python_block_runs(block, tables, capsys):
    """A block that cannot run here says why in its first line: `# not run: REASON`."""
    if re.match(r"# not run: \w+", block):
        return
    one, both = tables
    one.to_csv("A.csv")
    one.assign(loss=1.01 * one["loss"]).to_csv("B.csv")
    (repeating_runs() if "repeated" in block else both).to_csv("RUNS.csv")
    exec(block, {})
    assert "print(" not in block or capsys.readouterr().out


def test_the_numbers_that_the_readme_says_of_the_sweeps_are_theirs():
    isoflop = SweepSpec(**yaml.safe_load((ROOT / "sweeps" / "isoflop.yaml").read_text()))
    assert [Fraction(one).limit_denominator(100) for one in isoflop.budget_fractions[1:]] == [
        Fraction(1, 3), Fraction(1, 10), Fraction(1, 30)]  # fmt: skip
    assert len(isoflop.budgets) == 4 and isoflop.sizes_per_budget == 7


def test_every_test_that_the_benchmarks_name_exists():
    named = {name for code in BENCHMARKS.inline() for name in re.findall(r"\btest_\w+", code)}
    files = list(TESTS.rglob("test_*.py"))
    known = {name for path in files for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named <= known | {path.stem for path in files}, sorted(named - known)


def test_every_script_that_the_pages_run_exists():
    scripts = [word for words in commands(*PYTHON) for word in words[:1] if word.endswith(".py")]
    assert scripts and all((ROOT / script).is_file() for script in scripts)
