"""What must not change a fit: units, the order of the rows, a row written twice with half its weight."""

import numpy as np
import pytest

from dlm.fit import fit_envelope, fit_isoflop, fit_surface
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.points import as_points

BUDGETS = np.geomspace(1e18, 1e20, 4)
SURFACES = [
    (law, norm, space)
    for law in ("chinchilla", "skaling", "tied")
    for norm, space in (("mse", "raw"), ("mse", "log"), ("huber", "log"))
] + [("data-constrained", "mse", "log")]


def points(world, law):
    n, d, loss, c = world.grid(BUDGETS, sizes=7, sigma=0.003, seed=5, width=20.0)
    found = {"params": n, "tokens": d, "loss": loss, "flops": c}
    if law == "data-constrained":  # two thirds of the runs repeat their text, 10 or 50 times
        unique = d * np.tile([1.0, 0.1, 0.02], len(d))[: len(d)]
        truth = DataConstrained(vars(world), 1e9)
        row = np.array([[vars(world).get(name, {"R_D": 12.0, "R_N": 4.0}.get(name)) for name in truth.params]])
        features = truth.features(as_points(n, d, loss, unique_tokens=unique))
        exact = truth.loss(truth.theta(row, np.zeros(4)), tuple(v[None] for v in features))[0]
        found |= {"unique_tokens": unique, "loss": exact * loss / world.loss(n, d)}
    return found


def fit(columns, law, norm, space, **options):
    return fit_surface(**columns, law=law, norm=norm, space=space, holdout=False, **options)


@pytest.mark.parametrize(("law", "norm", "space"), SURFACES)
def test_units_change_the_scales_only(world, law, norm, space):
    columns = points(world, law)
    plain = fit(columns, law, norm, space)
    scaled = columns | {"params": columns["params"] / 1e6, "tokens": columns["tokens"] / 1e9}
    scaled |= {"unique_tokens": columns["unique_tokens"] / 1e9} if "unique_tokens" in columns else {}
    other = fit(scaled | {"flops": columns["flops"] / 1e15}, law, norm, space)
    assert other.value == pytest.approx(plain.value, rel=1e-6)
    same = [name for name in plain.params if name not in ("A", "B", "R")]
    assert {k: other.params[k] for k in same} == pytest.approx({k: plain.params[k] for k in same}, rel=2e-4)


@pytest.mark.parametrize(("law", "norm", "space"), SURFACES)
def test_order_changes_nothing(world, law, norm, space):
    columns = points(world, law)
    order = np.random.default_rng(0).permutation(len(columns["loss"]))
    plain, other = (fit(c, law, norm, space) for c in (columns, {k: v[order] for k, v in columns.items()}))
    assert other.value == pytest.approx(plain.value, rel=1e-8)
    assert other.params == pytest.approx(plain.params, rel=2e-4)


@pytest.mark.parametrize(("law", "norm", "space"), SURFACES)
def test_a_row_twice_with_half_its_weight_changes_nothing(world, law, norm, space):
    columns = points(world, law)
    size = len(columns["loss"])
    weights = np.ones(size)
    weights[:5] = 0.5
    doubled = {k: np.concatenate([v, v[:5]]) for k, v in columns.items()}
    plain = fit(columns, law, norm, space)
    other = fit(doubled, law, norm, space, weights=np.concatenate([weights, weights[:5]]))
    assert other.value == pytest.approx(plain.value, rel=1e-8)
    assert other.params == pytest.approx(plain.params, rel=2e-4)


def test_lines_keep_their_exponents_in_any_unit(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=7, sigma=0.001)
    for line in (
        lambda n, d, c: fit_isoflop(n, d, loss, c, flops=c),
        lambda n, d, c: fit_envelope(n, d, loss, flops=c),
    ):
        plain, other = line(n, d, c), line(n / 1e6, d / 1e9, c / 1e15)
        for name in "abc":
            assert other.params[name] == pytest.approx(plain.params[name], rel=1e-9)
