"""Reconcile sets of runs of known laws, and refuse sets that cannot be compared."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.counted_runs import ALPHA, EXPONENTS, counted_runs, exponents_of_blocks

from dlm.core.errors import UserError
from dlm.fit import reconcile
from dlm.fit.spread import Cell, shares, split

QUICK = {"forms": ("isoflop", "chinchilla"), "replicates": 60}


@pytest.fixture
def write(tmp_path):
    def written(**tables):
        for name, table in tables.items():
            table.to_csv(tmp_path / f"{name}.csv", index=False)
        return [tmp_path / f"{name}.csv" for name in tables]

    return written


@pytest.fixture(scope="module")
def same_law():
    """Five sets of one law, which differ by noise."""
    return reconcile([counted_runs(sigma=0.003, seed=seed) for seed in range(5)], **QUICK)


def test_sets_of_one_law_differ_by_noise_only_and_counts_by_their_known_shift(same_law):
    found = same_law
    rest, convention = found.parts["a"]["rest"], found.parts["a"]["convention"]
    assert found.parts["a"]["noise"].sd > 0.005
    assert rest.ci[0] == 0 and rest.sd < found.parts["a"]["noise"].sd
    assert rest.sd < 0.3 * convention.sd
    shift = exponents_of_blocks() - EXPONENTS[0]
    assert convention.sd == pytest.approx(shift / np.sqrt(2), rel=0.25)
    # b of isoFLOP curves does not depend on N, so counts of N and C move b less than a.
    assert convention.sets == 5
    by_count = {cell.N: [own[cell][0] for own in found.exponents["b"]] for cell in found.common if cell.by == "isoflop"}
    assert by_count["blocks"] == pytest.approx(by_count["with_embeddings"], abs=1e-12)


def test_noise_that_moves_two_exponents_of_a_set_together_is_not_taken_from_their_difference():
    """b of isoFLOP curves is equal under all counts of N, and so it is in every refit."""
    found = reconcile([counted_runs(sigma=0.003, seed=k) for k in range(2)], forms=("isoflop",), replicates=60)
    assert found.parts["b"]["noise"].sd > 0.003
    assert found.parts["b"]["convention"].variance == pytest.approx(0, abs=1e-12)


def test_sets_of_different_laws_differ_by_more_than_noise():
    betas = (0.25, 0.28, 0.31, 0.34)
    sets = [counted_runs(sigma=0.001, seed=seed, beta=beta) for seed, beta in enumerate(betas)]
    found = reconcile([one.drop(columns="params") for one in sets], **QUICK)
    true = np.std([beta / (ALPHA + beta) for beta in betas], ddof=1)
    rest = found.parts["a"]["rest"]
    assert rest.sd == pytest.approx(true, rel=0.2)
    assert rest.ci[0] > 0.4 * true and rest.ci[1] > true
    assert shares(found.parts["a"])["rest"] > 0.5
    assert found.parts["a"]["convention"].sets == 0 and "part of the counts is not known" in found.report()


def test_each_part_is_found_in_numbers_that_were_made_from_it():
    rng = np.random.default_rng(0)
    sizes, forms = [f"N{k}" for k in range(12)], [f"form{k}" for k in range(12)]
    cells = [Cell(N=size, C="6n", by=form) for size in sizes for form in forms]
    sets = []
    for _ in range(60):
        errors = 0.02 * rng.standard_normal(400)  # moves all exponents of the set together
        own, by_size, by_form = (
            0.5 + 0.08 * rng.standard_normal(),
            *(
                dict(zip(names, scale * rng.standard_normal(len(names)), strict=True))
                for names, scale in ((sizes, 0.04), (forms, 0.01))
            ),
        )
        noise = 0.02 * rng.standard_normal()
        sets.append({c: (own + by_size[c.N] + by_form[c.by] + noise, errors) for c in cells})
    parts = split(sets, cells)
    assert parts["convention"].sd == pytest.approx(0.04, rel=0.1)
    assert parts["form"].sd == pytest.approx(0.01, rel=0.1)
    assert parts["noise"].sd == pytest.approx(0.02, rel=0.05)
    # Over the sets, an exponent of one cell also varies by what the counts and forms do to that set.
    assert parts["rest"].sd == pytest.approx(np.sqrt(0.08**2 + 0.04**2 + 0.01**2), rel=0.25)
    assert parts["rest"].ci[0] < parts["rest"].sd < parts["rest"].ci[1]


def test_noise_is_part_of_neither_the_counts_nor_the_rest():
    rng = np.random.default_rng(1)
    cells = [Cell(N=f"N{k}", C="6n", by="isoflop") for k in range(4)]
    sets = [
        {cell: (0.5 + 0.03 * rng.standard_normal(), 0.03 * rng.standard_normal(500)) for cell in cells}
        for _ in range(300)
    ]
    parts = split(sets, cells)
    assert parts["noise"].variance == pytest.approx(9e-4, rel=0.05)
    assert parts["convention"].variance == pytest.approx(0, abs=1.2e-4)
    assert parts["rest"].variance == pytest.approx(0, abs=1.2e-4) and parts["rest"].ci[0] < 0.01


def test_the_documented_row_of_the_public_diffusion_sets_is_what_the_command_gives(reference, write):
    names = ("scaling_dllms_isoflop_digitised", "mdm_prime_v2_isoflop", "quokka_isoflop_masked")
    found = reconcile(
        write(**{name: reference(f"{name}.csv") for name in names}),
        objectives=("mdlm_low_var", "duo", "eso_lm", "mdm_prime_v2:mdm", "mdm_prime_v2:prime", "masked_diffusion"),
        columns=("objective=source", *(f"{name}:params_with_head=params" for name in names[1:])),
        forms=("isoflop",),
        replicates=60,
    )
    page = (Path(__file__).parents[2] / "docs" / "conventions.md").read_text()
    rows = [line.split()[-7:] for line in page.splitlines() if "6n_head isoflop " in " ".join(line.split()) + " "]
    rows = [row for row in rows if len(row) == 7]
    shown = [line.split()[-7:] for line in found.report().split("\n\n")[1].splitlines()[1:]]
    assert rows == shown and len(rows) == 3


def test_each_objective_of_a_table_is_a_set(write):
    two = counted_runs(sigma=0.002).assign(objective="one")
    other = counted_runs(sigma=0.002, seed=1).assign(objective="two")
    three = counted_runs(sigma=0.002, seed=2).assign(objective="three")
    [path] = write(runs_of_two=pd.concat([two, other, three]))
    quick = {**QUICK, "forms": ("isoflop",)}
    found = reconcile([path], objectives=["one", "three"], **quick)
    assert [one.label for one in found.sets] == ["runs_of_two/one", "runs_of_two/three"]
    assert len(reconcile([path], **quick).sets) == 3
    with pytest.raises(UserError, match=r"objective 'on'.*one"):
        reconcile([path], objectives=["on", "three"], **quick)


def test_warnings_about_the_runs_of_a_set_are_shown(write):
    broken = counted_runs(sigma=0.001)
    broken.loc[2, "loss"] = np.nan
    found = reconcile(write(full=counted_runs(), broken=broken), forms=("isoflop",), replicates=60)
    assert found.sets[0].warnings == () and "1 row has no finite loss" in found.sets[1].warnings[0]
    assert "1 row has no finite loss" in found.report()


def test_one_set_is_refused(write):
    paths = write(alone=counted_runs())
    with pytest.raises(UserError, match=r"compares two sets of runs or more, and there is one, alone: give another"):
        reconcile(paths)


def test_a_table_without_runs_is_refused_by_its_name(write):
    paths = write(nothing=counted_runs().iloc[:0].drop(columns="objective", errors="ignore"), some=counted_runs())
    with pytest.raises(UserError, match=r"^nothing: there are no runs: give at least one row"):
        reconcile(paths)


def test_the_same_runs_twice_are_refused(write):
    first, second = write(first=counted_runs(), second=counted_runs())
    with pytest.raises(UserError, match=r"first\.csv is given twice: give each set once"):
        reconcile([first, first])
    with pytest.raises(UserError, match="first and second hold the same runs: give each set once"):
        reconcile([first, second])


def test_sets_without_a_common_count_of_n_are_refused_with_the_column_that_gives_one(write):
    blocks = counted_runs().drop(columns=["params_total", "convention"])
    total = counted_runs(sigma=0.001).drop(columns=["params", "convention"])
    both = counted_runs(sigma=0.002)
    paths = write(small=blocks, large=total, both=both)
    with pytest.raises(
        UserError, match=r"no common count of N \(small has N blocks; large .*\): add the column"
    ) as said:
        reconcile(paths)
    assert str(said.value).endswith("add the column params to large") and "\n" not in str(said.value)


def test_curves_whose_budgets_are_counted_differently_are_refused(write):
    total = counted_runs()
    blocks = counted_runs(sigma=0.001)
    blocks["flops"] = blocks["budget"] = 6 * blocks["params"] * blocks["tokens"]
    paths = write(total=total, blocks=blocks.assign(convention="6n", budget=np.repeat(sorted(set(total["budget"])), 7)))
    with pytest.raises(
        UserError, match=r"no form fits all sets under a common count of C \(total has its budgets in 6n_"
    ):
        reconcile(paths, forms=("isoflop",), replicates=60)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["loss"], "--column loss: write NAME=COLUMN or FILE:NAME=COLUMN"),
        (["other:loss=nll"], "--column other:loss=nll: file 'other'"),
        (["loss=nll"], "no table has the column nll and lacks loss"),
    ],
)
def test_foreign_columns_that_do_not_exist_are_refused(write, columns, message):
    paths = write(first=counted_runs(), second=counted_runs(sigma=0.001))
    with pytest.raises(UserError, match=message):
        reconcile(paths, columns=columns)


def test_foreign_columns_are_read_under_their_names_in_dlm(write):
    foreign = counted_runs(sigma=0.002).rename(columns={"loss": "nll", "params_total": "size"}).drop(columns="params")
    first, second = write(first=foreign, second=counted_runs(sigma=0.001))
    found = reconcile(
        [first, second], columns=["loss=nll", "first:params_total=size"], forms=("isoflop",), replicates=60
    )
    assert [list(one.size) for one in found.sets] == [["with_embeddings"], ["blocks", "with_embeddings"]]
    assert [(cell.N, cell.C) for cell in found.common] == [("with_embeddings", "6n_total")]
    assert found.parts["a"]["convention"].sets == 1


def test_a_form_that_a_set_does_not_support_is_named_and_the_others_are_compared(write):
    lone = counted_runs(sigma=0.001).drop(columns="budget")
    lone["tokens"] *= np.geomspace(0.01, 100, len(lone)).round(4)
    lone["flops"] = 6 * lone["params_total"] * lone["tokens"]
    found = reconcile(write(full=counted_runs(), lone=lone), **QUICK)
    assert {cell.by for cell in found.common} == {"chinchilla"}
    assert found.sets[1].missing[0].startswith("no isoflop: isoFLOP curves need")
    assert "no isoflop" in found.report()


def test_the_text_and_the_json_have_every_cell_and_part(same_law):
    table = same_law.report().split("\n\n")
    assert all(len(line) <= 80 for block in table[1:3] for line in block.splitlines())
    assert "the rest has 4 degrees of freedom" in table[-1]
    shown = same_law.to_dict()
    assert len(shown["cells"]) == len(same_law.cells()) and all(len(cell["a"]) == 5 for cell in shown["cells"])
    assert sum(part["share"] for part in shown["parts"]["a"].values()) == pytest.approx(1)


def test_the_same_seed_gives_the_same_numbers():
    sets = [counted_runs(sigma=0.003, seed=seed) for seed in range(2)]
    first, again = (reconcile(sets, forms=("isoflop",), replicates=60).to_dict() for _ in range(2))
    assert first == again
    assert reconcile(sets, forms=("isoflop",), replicates=60, seed=1).to_dict() != first
