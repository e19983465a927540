"""a and b under every count of N and C: published values, a known shift between counts, and what does not change."""

import numpy as np
import pandas as pd
import pytest
from support.counted_runs import EXPONENTS, counted_runs, exponents_of_blocks
from support.demo_runs import demo_runs

from dlm.core.errors import UserError
from dlm.core.shape import load_shape
from dlm.fit.counts import counts_of
from dlm.fit.rows import read_runs
from dlm.fit.table import fit_runs

SCALING_DLLMS = "scaling_dllms_isoflop_digitised.csv"


def rows_of(result):
    return {(row.by, row.N, row.C): row for row in result.conventions.rows}


@pytest.mark.parametrize(
    ("objective", "a", "b"),
    [("mdlm_low_var", (0.537, 0.459, 0.442), 0.534), ("autoregressive", (0.628, 0.562, 0.549), 0.430)],
)
def test_published_runs_have_the_exponents_of_each_count_of_n(reference, objective, a, b):
    result = fit_runs(reference(SCALING_DLLMS), law="isoflop", objective=objective, bootstrap=0)
    rows = rows_of(result)
    counted = [rows["isoflop", size, "6n_head"] for size in ("blocks", "with_head", "with_embeddings")]
    assert [row.a for row in counted] == pytest.approx(a, abs=6e-4)
    assert [row.b for row in counted] == pytest.approx([b] * 3, abs=6e-4)
    assert result.conventions.size["with_head"] == "column params_published_non_embed"


@pytest.mark.parametrize(("law", "form"), [("isoflop", "isoflop"), ("chinchilla", "chinchilla")])
def test_a_law_in_all_parameters_has_the_predicted_exponent_in_those_of_the_blocks(law, form):
    result = fit_runs(counted_runs(), law=law, bootstrap=0, holdout=law == "isoflop")
    rows = rows_of(result)
    total, blocks = (rows[form, size, "6n_total"] for size in ("with_embeddings", "blocks"))
    assert (total.a, total.b) == pytest.approx(EXPONENTS, abs=0.006)
    assert blocks.a == pytest.approx(exponents_of_blocks(), abs=0.02)
    assert blocks.a > total.a + 0.05


def test_the_exponent_of_d_of_isoflop_curves_does_not_depend_on_the_count_of_n():
    rows = rows_of(fit_runs(counted_runs(sigma=0.005), law="isoflop", bootstrap=0))
    blocks, total = (rows["isoflop", size, "6n_total"] for size in ("blocks", "with_embeddings"))
    assert blocks.b == pytest.approx(total.b, abs=1e-12)
    assert abs(blocks.a - total.a) > 0.05


def test_the_exponent_of_d_of_a_surface_hardly_depends_on_the_count_of_n_even_where_n_costs_nothing(reference):
    """As with all parameters under C = 6 N D of the blocks: the embedding of a small model costs nothing."""
    published = fit_runs(
        reference(SCALING_DLLMS), law="chinchilla", objective="mdlm_low_var", bootstrap=0, holdout=False
    )
    for runs in (fit_runs(counted_runs(), law="chinchilla", bootstrap=0, holdout=False), published):
        rows = rows_of(runs)
        blocks, total = (rows["chinchilla", size, "6n"] for size in ("blocks", "with_embeddings"))
        assert total.b == pytest.approx(blocks.b, abs=0.025)  # without the inverse cost, they are 0.1 apart
        assert total.a + total.b < 0.95 < blocks.a + blocks.b


def test_a_and_b_add_up_to_1_only_where_c_is_proportional_to_n_d():
    result = fit_runs(counted_runs(), law="chinchilla", bootstrap=0)
    sums = {(row.N, row.C): row.a + row.b for row in result.conventions.rows}
    own = {pair for pair, total in sums.items() if abs(total - 1) < 1e-9}
    assert own == {("blocks", "6n"), ("with_embeddings", "6n_total")}
    assert own == {(row.N, row.C) for row in result.conventions.rows if row.is_proportional}
    assert "blocks with 6n and with_embeddings with 6n_total" in result.report()


def test_a_table_with_one_count_of_n_and_c_gets_no_table(world):
    n, d, loss, c = world.grid([1e18, 1e19, 1e20], sizes=6)
    runs = pd.DataFrame({"params": n, "tokens": d, "loss": loss, "flops": c, "budget": c})
    result = fit_runs(runs, law="isoflop", bootstrap=0)
    assert result.conventions is None and result.to_dict()["conventions"] is None
    assert "other counts" not in result.report()


def test_the_table_of_runs_of_dlm_has_all_counts_of_flops_and_fits_80_columns():
    runs = demo_runs()
    per_token = runs["flops"] / runs["tokens"]
    runs["params_total"] = (runs["params"] * 1.3).astype(int)
    for name, factor in {"flops_6n_total": 1.1, "flops_full": 1.2, "flops_full_masked_head": 1.0}.items():
        runs[name] = per_token * factor * runs["tokens"]
    result = fit_runs(runs, bootstrap=0, holdout=False)
    lines = result.conventions.lines()
    table = lines[: len(lines) - len(result.conventions.sentences())]
    assert table[1].split()[0] == "isoflop" and table[2].split().count("-") == 3
    assert next(line for line in table if "chinchilla" in line).split() == [
        "chinchilla",
        *("6n", "6n_total", "full", "full_masked_head"),
    ]
    assert max(len(f"  {line}") for line in table) <= 80
    shown = result.to_dict()["conventions"]
    assert shown["budgets_in"] == "full_masked_head"
    assert {(row["N"], row["C"]) for row in shown["exponents"] if row["by"] == "chinchilla"} == {
        (size, c) for size in ("blocks", "with_embeddings") for c in ("6n", "6n_total", "full", "full_masked_head")
    }


def test_sizes_of_dlm_are_known_by_their_exact_number_of_parameters():
    shapes = [load_shape(name) for name in ("19M", "66M", "170M", "472M")]
    runs = pd.DataFrame({"params": [shape.num_params for shape in shapes], "tokens": 1e9, "loss": [3.0, 2.9, 2.8, 2.7]})
    heads = np.array([shape.n_embd * shape.vocab_size for shape in shapes])
    masked = counts_of(read_runs(runs.assign(objective="masked_diffusion")))
    assert np.array_equal(masked.size["with_head"].values, runs["params"] + heads)
    assert masked.size["with_embeddings"].values.tolist() == [s.num_params_total(causal=False) for s in shapes]
    causal = counts_of(read_runs(runs.assign(objective="autoregressive")))
    assert causal.size["with_embeddings"].values.tolist() == [s.num_params_total(causal=True) for s in shapes]
    small = runs["params"] + [2 * 256 * shape.n_embd for shape in shapes]  # the same blocks with another vocabulary
    assert np.array_equal(
        counts_of(read_runs(runs.assign(params_total=small))).size["with_head"].values,
        runs["params"] + [256 * shape.n_embd for shape in shapes],
    )
    assert list(counts_of(read_runs(runs.assign(params=runs["params"] + 1))).size) == ["blocks"]


def test_params_that_equal_the_column_of_another_count_are_that_count():
    runs = counted_runs()
    runs["params"] = runs["params_total"]
    counts = counts_of(read_runs(runs))
    assert list(counts.size) == ["with_embeddings"] and counts.own == "6n_total"


def test_a_count_that_is_no_number_is_refused():
    runs = counted_runs().astype({"params_total": object})
    runs.loc[3, "params_total"] = "12M"
    with pytest.raises(UserError, match="params_total is '12M' in one row: it must be a number above 0"):
        fit_runs(runs, law="isoflop", bootstrap=0)
