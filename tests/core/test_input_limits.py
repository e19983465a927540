"""A small file or word that means something huge is refused in one line, before it takes memory or time."""

import re

import pytest
from support.limited import run_limited

from dlm.cli.launcher import slurm_of
from dlm.cli.start import check_overrides
from dlm.core.checks import check_values
from dlm.core.configs import load_mapping, nest, parse_setting, parse_yaml
from dlm.core.errors import UserError
from dlm.core.files import read_json, read_jsonl
from dlm.core.flops import check_budget
from dlm.core.limits import MAX_BYTES, MAX_DEPTH, MAX_VALUES, check_override_extents
from dlm.fit import frozen
from dlm.plan.cost import with_estimates
from dlm.plan.definition import load_sweep
from dlm.plan.grid import make_plan

TINY = "name: tiny\nbudgets: [1.0e+10, 3.0e+10]\nconvention: full_masked_head\nmodels: [4k]\n"
DIGITS = "9" * 5000


def bomb(levels: int, each: int = 10) -> str:
    """A YAML text whose last key holds each ** levels values, in some twenty characters for each level."""
    lines = [f"a0: &a0 [{', '.join('x' * each)}]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * each)}]" for k in range(1, levels)]
    return "\n".join(lines) + "\n"


def chain(first: str, rest: str, length: int) -> str:
    """A YAML text of keys whose values have an anchor; *a in ``rest`` is the alias of the key before."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{k}: &a{k} {rest.replace('*a', f'*a{k - 1}')}" for k in range(1, length)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(8), r"x, line 5: with every alias \(\*NAME\) written out, this is more than 20,000 values"),
        ("a: &a " + "y" * 1_000_000 + "\nb: [" + ", ".join(["*a"] * 20) + "]", "more than 20,000 values or 10 MiB"),
        (chain("{k: v}", "{<<: [*a, *a]}", 40), "written out"),
        (chain("[]", "[*a]", 200), "more than 50 lists and mappings"),
        ("[" * 100_000, "x, line 1: more than 50 lists and mappings stand inside each other"),
        ("{a: " * 100_000, "more than 50 lists and mappings"),
        ("- " * 100_000, "more than 50 lists and mappings"),
        (f"a: {DIGITS}", "x, line 1: a number has 5,000 digits, and at most 300 are allowed"),
        (f"a: 1\nb: -0x{'f' * 5000}", "x, line 2: a number has 5,003 digits"),
        (f"{DIGITS}: 1", "a number has 5,000 digits"),
        ("a: !!int foo", "x: a value does not fit its tag, such as !!int: leave out the tag"),
        ("a: !!bool x", "does not fit its tag"),
        ("a: !!timestamp x", "does not fit its tag"),
    ],
    ids=lambda value: value[:12],
)  # fmt: skip
def test_yaml_that_would_grow_is_refused(text, said):
    with pytest.raises(UserError, match=said) as error:
        parse_yaml(text, "x")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_yaml_up_to_the_limits_is_read(tmp_path):
    inner = MAX_DEPTH - 1
    text = f"a: {'[' * inner}{']' * inner}\nb: [{', '.join('x' * (MAX_VALUES - 2 * MAX_DEPTH))}]\nc: {'7' * 300}\n"
    text += f"d: &d {{e: 1}}\nf: {{<<: *d, g: *d}}\nh: '{DIGITS}'\n"
    path = tmp_path / "x.yaml"
    path.write_text(text)
    content = load_mapping(path)
    assert len(content["b"]) == MAX_VALUES - 2 * MAX_DEPTH and content["f"] == {"e": 1, "g": {"e": 1}}
    assert content["h"] == DIGITS
    path.write_bytes(b"a: 1 # " + b"x" * MAX_BYTES)
    with pytest.raises(UserError, match="is larger than 10 MiB"):
        load_mapping(path)


def test_a_setting_is_limited_as_a_file_is():
    for value in ("[" * 100_000, DIGITS, "!!int foo"):
        with pytest.raises(UserError) as error:
            parse_setting(f"set.x={value}", "--set")
        assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        (f'{{"a": {DIGITS}}}', "a number has 5000 digits, and at most 300 are allowed"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('[-Infinity]', "-Infinity is no finite number"),
    ],
    ids=lambda value: value[:12],
)  # fmt: skip
def test_json_that_python_cannot_hold_is_refused(text, said, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path} is not valid JSON (")


def test_a_log_is_read_without_the_lines_that_python_cannot_hold(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = ['{"a": 1}', "[" * 100_000, f'{{"a": {DIGITS}}}', '{"a":' * 100_000, '{"a": 2}']
    path.write_text("\n".join(rows) + "\n")
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (f"++a={'[' * 1000}{']' * 1000}", "more than 50 brackets stand inside each other"),
        (f"++a={'{b:' * 1000}1{'}' * 1000}", "more than 50 brackets stand inside each other"),
        (f"training.budget={DIGITS}", "a number has 5,000 digits, and at most 300 are allowed"),
        (f"++{'a.' * 5000}b=1", "a key has at most 50 dots"),
    ],
    ids=["lists", "mappings", "digits", "dots"],
)
def test_an_override_that_hydra_cannot_read_is_refused(word, said):
    assert said in run_limited("dlm.launch", word, "--cfg", "job").complaint
    for check in (
        check_overrides,
        lambda words: slurm_of([f"hydra.launcher.{words[0].lstrip('+')}"], allow_dirty=True),
    ):
        with pytest.raises(UserError, match=said):
            check([word])
    check_override_extents(["a=[[1,2],[3,4]]", "b={c:{d:1}}", f"e={'7' * 300}", "f='a(b]'"])


@pytest.mark.parametrize("value", [DIGITS, 10**400, 1e308, "1e999", "inf", -1, 1.1e40])
def test_a_budget_out_of_range_is_refused(value):
    with pytest.raises(UserError, match="must be a number of FLOPs above zero, at most 1e\\+40") as error:
        check_budget(value, "--budget")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (f"budgets=[{DIGITS}]", "a number has 5,000 digits"),
        ("seeds=[4294967296]", "it must be a whole number of at least 0 and at most 4294967295"),
        (f"seeds=[1{'0' * 299}]", "it must be a whole number of at least 0 and at most 4294967295"),
        (f"data.batch_size=1{'0' * 299}", "it must be a whole number from 1 to 9223372036854775807"),
        ("data.batch_size=1e308", "it must be a whole number from 1 to 9223372036854775807"),
        (f"model.n_embd=1{'0' * 299}", "it must be a whole number from 1 to 9223372036854775807"),
        ("scheduler.warmup_tokens_per_param=1e308", "it must be a number from 0 to 1e+12"),
        ("hardware={device: H100, mfu: 1e-300}", "hardware.mfu is 1e-300"),
        ("proof={factor: 1e300}", "proof.factor is 1e+300"),
        (f"vary={{seed: {'[' * 100_000}", "more than 50 lists and mappings"),
    ],
    ids=lambda value: value[:24],
)
def test_a_number_out_of_range_is_refused_in_a_definition(setting, said, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        with_estimates(make_plan(load_sweep(path, [setting]), read=lambda node: None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [10**400, 1e308, float("nan"), float("inf")])
def test_a_value_of_a_config_out_of_range_is_refused(value):
    for key in ("seed", "validation.seed", "data.batch_size"):
        with pytest.raises(UserError, match="must be a whole number"):
            check_values(nest({key: value}))


def test_a_bomb_of_aliases_takes_neither_memory_nor_time(tmp_path):
    path = tmp_path / "bomb.yaml"
    path.write_text(TINY + "vary:\n" + "".join(f"  {line}\n" for line in bomb(9).splitlines()))
    assert path.stat().st_size < 1000
    assert "written out" in run_limited("dlm.cli", "plan", path, "--dry-run").complaint


def test_frozen_predictions_that_python_cannot_hold_are_refused(tmp_path):
    path = tmp_path / "frozen.json"
    for content in ("[" * 100_000, f'{{"format": 2, "level": {DIGITS}}}', '{"format": 2, "level": 1e999}'):
        path.write_text(content)
        with pytest.raises(UserError, match="is no file of frozen predictions"):
            frozen.load(path)
