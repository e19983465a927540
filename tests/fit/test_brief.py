"""A law in ten lines: the answer, what is withheld or refused, and what limits it."""

import dataclasses

import pytest

from dlm.core import text
from dlm.fit import bootstrap, fit_isoflop, fit_surface, judge
from dlm.fit.brief import MOST_LINES, WIDTH

AT = [1e18, 1e19, 1e20, 3e20, 1e21, 1e22, 1e23]
LONG = "a run was left out of the law, because its loss is far above that of the other runs of its budget " * 3


@pytest.fixture(scope="module")
def surface(world):
    n, d, loss, c = world.grid([1e18, 1e19, 1e20], sizes=6, sigma=0.003)
    return judge(bootstrap(fit_surface(n, d, loss, budget=c, at=AT, label="masked_diffusion"), replicates=100))


@pytest.fixture(scope="module")
def refused(world):
    n, d, loss, c = world.grid([1e20], sizes=3)
    return fit_isoflop(n, d, loss, c, at=[1e20])


def variants(surface):
    many = tuple(f"{number}: {LONG}" for number in range(12))
    yield surface
    yield dataclasses.replace(surface, warnings=many, notes=many)
    yield dataclasses.replace(surface, verdict=None, holdout={}, warnings=many[:1])
    yield dataclasses.replace(surface, label="a long name of an objective " * 6, warnings=many)


@pytest.mark.parametrize("at", [(), AT[:1], AT])
def test_a_law_takes_at_most_ten_lines_of_80_columns(surface, refused, at):
    for law in (*variants(surface), refused):
        lines = law.summary(at=at, rest="see the report").splitlines()
        assert len(lines) <= MOST_LINES and max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("width", [30, 40, 60, 79])
def test_on_a_narrow_terminal_the_ten_lines_break_between_words(surface, width):
    for law in variants(surface):
        lines = law.summary(at=AT[:3], width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert text.count(law.at[AT[0]].N) in " ".join(lines).split()


def test_the_ten_lines_give_the_best_use_the_exponents_and_how_far_to_trust_them(surface):
    lines = surface.summary(at=[1e20]).splitlines()
    best = surface.at[1e20]
    row = next(line for line in lines if line.startswith("1e20 "))
    assert text.count(best.N) in row and text.interval(best.ci["D"], "count") in row and text.number(best.L) in row
    powers = next(line for line in lines if line.startswith("N* ~ C^a"))
    assert text.number(surface.allocation.a) in powers and text.interval(surface.ci["b"]) in powers
    assert any(line.startswith("trust: L* may be read") for line in lines)


def test_without_a_choice_the_two_highest_budgets_are_shown(surface):
    within = dataclasses.replace(surface, at={flops: surface.at[flops] for flops in AT[:4]})
    assert [line.split()[0] for line in within.summary().splitlines() if line[0] in "13"] == ["1e20", "3e20"]


def test_what_is_withheld_comes_before_any_number(surface):
    """For every C that was asked for, also for those that the ten lines have no room for."""
    above = surface.summary(at=AT).split("\nC  ")[0]
    withheld = [flops for flops in AT if surface.at[flops].withheld]
    assert 1e23 in withheld and all(f" {text.flops(flops)} " in above for flops in withheld)
    unknown = dataclasses.replace(surface.allocation, a=float("nan"), b=float("nan"), how="withheld, as a test wants")
    lines = dataclasses.replace(surface, allocation=unknown).summary().splitlines()
    assert any(line == "exponents of N* and D*: withheld, as a test wants" for line in lines[1:6])
    assert not any("~ C^a" in line or "nan" in line for line in lines)


def test_the_first_warning_is_always_there_and_the_last_line_counts_the_others(surface):
    law = list(variants(surface))[1]
    for at in ((), AT):
        *lines, last = law.summary(at=at, rest="--verbose").splitlines()
        assert any(line.startswith("warning: 0: a run was left out") for line in lines)
        assert "12 warnings, 12 notes" in last and last.endswith(": --verbose")


def test_a_refused_law_shows_its_reasons_and_no_numbers(refused):
    assert refused.status == "refused"
    first, *lines = refused.summary().splitlines()
    assert first.startswith("isoflop") and ": refused" in " ".join([first, *lines[:1]])
    assert f"refused: {refused.warnings[0]}"[:70] in " ".join(lines)
    assert not any(line.startswith(("C  ", "N* ~")) for line in lines)


def test_a_reason_names_every_c_that_it_withholds(surface):
    flops = AT[:2]
    held = {c: dataclasses.replace(surface.at[c], withheld="a test withholds it") for c in flops}
    lines = dataclasses.replace(surface, at={**surface.at, **held}).summary(at=flops).splitlines()
    assert "withheld at 1e18 and 1e19 FLOPs: a test withholds it" in lines


def test_without_a_verdict_the_error_of_the_hold_out_is_stated(surface):
    held = {"without_top_1": {"L_rms_error": 0.0123}}
    words = dataclasses.replace(surface, verdict=None, holdout=held).summary().split()
    assert "predicts its losses with an error of 1.23% (root mean square)" in " ".join(words)
