"""Measure how often the 95 % intervals of isoFLOP fits hold the truth, and print a table with one row for each design.

    python -m benchmarks.coverage_isoflop --worlds 4000 --seed 2

The truth is the law of Hoffmann et al. (arXiv 2203.15556: E 1.69, A 406.4, B 410.7, alpha 0.34, beta 0.28) with
C = 6 N D. Losses have normal noise, a fraction of the loss. The sizes of each budget are evenly spaced in log N, from
1/width to width times the budget's optimum (or `off` times the optimum). A world is one draw of the noise, which is
fitted and bootstrapped through the public functions. `given` is the share of worlds that gave an interval; coverage
is counted over those.

The last rows show what happens when the curve's shape is wrong instead of the design: a parabola over more than a
factor of 20 in size is off by more than its noise. The fit warns there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dlm.fit import FitResult, bootstrap, fit_isoflop

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
SHARE = BETA / (ALPHA + BETA)  # the true exponent of N*
COLUMNS = ("a", "N mid", "N top", "N 10x", "N of a curve", "L mid", "L top", "L of a curve")


@dataclass(frozen=True, kw_only=True)
class Design:
    """The budgets (FLOPs), the sizes of each budget, the noise of the losses, and how they are fitted."""

    budgets: tuple[float, ...]
    sizes: int
    width: float = 4.0
    off: float = 1.0
    sigma: float = 0.01
    curve: str = "parabola"
    axis: str = "params"
    method: str = "auto"

    def __str__(self) -> str:
        said = [f"{len(self.budgets)} x {self.sizes}", f"+-{self.width:g}x", f"{self.sigma:.1%}"]
        said += [f"grid off by {self.off:g}x"] if self.off != 1 else []
        said += [self.curve] if self.curve != "parabola" else []
        said += ["log D"] if self.axis != "params" else []
        said += [self.method] if self.method != "auto" else []
        return ", ".join(said)


SEVEN = tuple(np.geomspace(1e18, 1e20, 5).tolist())  # with 7 sizes: n = 35
FIVE = tuple((1e20 * np.array([1 / 30, 1 / 10, 1 / 3, 1])).tolist())  # with 5 sizes: n = 20
THREE = (1e18, 1e19, 1e20)
DESIGNS = (
    Design(budgets=SEVEN, sizes=7),
    Design(budgets=FIVE, sizes=5),
    Design(budgets=SEVEN, sizes=7, off=1.5),
    Design(budgets=FIVE, sizes=5, off=1.5),
    Design(budgets=SEVEN, sizes=7, axis="tokens"),
    Design(budgets=FIVE, sizes=5, axis="tokens"),
    Design(budgets=SEVEN, sizes=7, width=3.0),
    Design(budgets=FIVE, sizes=5, width=3.0),
    Design(budgets=THREE, sizes=6),
    Design(budgets=SEVEN, sizes=7, width=8.0, curve="cubic"),
    Design(budgets=FIVE, sizes=5, width=8.0, curve="cubic"),
    Design(budgets=SEVEN, sizes=7, width=8.0, curve="akima"),
    Design(budgets=FIVE, sizes=5, width=8.0, curve="akima"),
    Design(budgets=SEVEN, sizes=7, sigma=0.005),
    Design(budgets=FIVE, sizes=5, sigma=0.005),
    Design(budgets=SEVEN, sizes=7, width=8.0),
    Design(budgets=FIVE, sizes=5, width=8.0),
)


def best(flops: float) -> tuple[float, float, float]:
    """The true N*, D* and L* at a budget."""
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    n = g * (flops / 6) ** SHARE
    d = flops / 6 / n
    return n, d, loss_of(n, d)


def loss_of(n: float, d: float) -> float:
    return float(E + A / n**ALPHA + B / d**BETA)


def world(design: Design, seed: int, number: int) -> FitResult:
    """Draw the noise once and fit, without intervals."""
    budgets = np.repeat(design.budgets, design.sizes)
    ratios = design.off * np.geomspace(1 / design.width, design.width, design.sizes)
    n = np.concatenate([best(c)[0] * ratios for c in design.budgets])
    d = budgets / 6 / n
    noise = np.random.default_rng([seed, number]).standard_normal(len(n))
    loss = (E + A / n**ALPHA + B / d**BETA) * (1 + design.sigma * noise)
    at = (middle(design), design.budgets[-1], 10 * design.budgets[-1])
    return fit_isoflop(n, d, loss, budgets, curve=design.curve, axis=design.axis, at=at)


def middle(design: Design) -> float:
    return float(np.exp(np.log(design.budgets).mean()))


def intervals(design: Design, fit: FitResult) -> Iterator[tuple[str, tuple[float, float], float]]:
    """Yield the name, the interval and the truth of every quantity that is checked."""
    yield "a", fit.ci["a"], SHARE
    for name, flops in (("mid", middle(design)), ("top", design.budgets[-1]), ("10x", 10 * design.budgets[-1])):
        yield f"N {name}", fit.at[flops].ci["N"], best(flops)[0]
        if name != "10x":  # a straight line has no floor: withheld there
            yield f"L {name}", fit.at[flops].ci["L"], best(flops)[2]
    for m in fit.usable:
        yield "N of a curve", m.ci["N"], best(m.budget)[0]
        yield "L of a curve", m.ci["L"], best(m.budget)[2]


def measure(design: Design, worlds: int, replicates: int, seed: int) -> tuple[dict[str, tuple[int, int]], int, float]:
    """Returns {name: (intervals holding the truth, intervals given)}, worlds that gave a law, seconds per world."""
    count = {name: [0, 0] for name in COLUMNS}
    laws, began = 0, time.perf_counter()
    for number in range(worlds):
        fit = world(design, seed, number)
        if fit.status == "refused":
            continue
        laws += 1
        fit = bootstrap(fit, replicates=replicates, seed=number, method=design.method)
        for name, (low, high), truth in intervals(design, fit):
            if np.isfinite([low, high]).all():
                count[name][0] += low <= truth <= high
                count[name][1] += 1
    return {k: (held, given) for k, (held, given) in count.items()}, laws, (time.perf_counter() - began) / worlds


def line(design: Design, worlds: int, replicates: int, seed: int) -> str:
    count, laws, seconds = measure(design, worlds, replicates, seed)
    shares = [f"{100 * held / given:.1f}" if given else "-" for held, given in count.values()]
    given = count["a"][1] / worlds
    return f"| {' | '.join([str(design), *shares, f'{laws / worlds:.1%}', f'{given:.1%}', f'{1e3 * seconds:.1f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage, in %, of the 95 %% intervals of isoFLOP fits")
    parser.add_argument("--worlds", type=int, default=4000)
    parser.add_argument("--replicates", type=int, default=999)
    parser.add_argument("--seed", type=int, default=2, help="of the noise (1 was used while the method was made)")
    parser.add_argument("--rows", type=int, nargs="*", help="only these designs, counted from 0")
    wanted = parser.parse_args()
    head = ["design", *COLUMNS, "law", "given", "ms"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for k, design in enumerate(DESIGNS):
        if wanted.rows is None or k in wanted.rows:
            print(line(design, wanted.worlds, wanted.replicates, wanted.seed), flush=True)


if __name__ == "__main__":
    main()
