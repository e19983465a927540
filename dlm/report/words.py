"""prose: fits and runs -> the sentences of the report, in plain English. Called by report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.core.objectives import OBJECTIVES
from dlm.fit.fitted import Optimum
from dlm.fit.laws import LAW_NAMES
from dlm.fit.result import FitResult

if TYPE_CHECKING:
    import pandas as pd


SAY = dict.fromkeys(LAW_NAMES, "says") | {"isoflop": "say"}


PARAMETERS = {
    "E": "the loss that no size and no amount of data gets below, nats/token",
    "A": "weight of the size term A / N^alpha",
    "B": "weight of the data term B / D^beta",
    "alpha": "how fast loss falls with size",
    "beta": "how fast loss falls with tokens",
    "N0": "best size is N0 C^a",
    "D0": "best number of tokens is D0 C^b",
    "L0": "loss there is L0 C^c",
    "R": "weight of the data term beside the size term",
    "k": "how the two terms mix: 1 adds them, 0 takes the larger",
    "R_D": "how many repetitions of the data are worth something",
    "R_N": "the same for parameters beyond what the unique tokens need",
    "a": "the best size grows as C^a",
    "b": "the best number of tokens grows as C^b",
    "c": "the loss falls as C^c within the runs",
}


RUN_COLUMNS = {
    "run_id": "run",
    "objective": "objective",
    "model": "model",
    "params": "parameters N",
    "tokens": "tokens D",
    "epochs": "epochs",
    "budget": "budget",
    "flops": "FLOPs spent",
    "loss": "loss ± s.e.",
    "steps": "steps",
    "time": "training time",
    "attempts": "attempts",
    "device": "device",
}


OFTEN_SAME = ("objective", "attempts", "device", "epochs")


WORDS = ("run_id", "objective", "model", "device")


CONVENTIONS = {
    "6n": "6 FLOPs per non-embedding parameter and token. Embeddings, attention scores and head do not count.",
    "6n_total": "6 FLOPs per parameter and token, embeddings and head included. Attention scores do not count.",
    "full": "body, attention scores and output head, forward and backward: what the hardware really computes.",
    "full_masked_head": "body and attention scores for every token, the output head for masked tokens only, forward "
    "and backward: what masked-diffusion training in dlm really computes.",
}


GLOSSARY = {
    "parameters N": "the weights of the model without its embedding table and output head.",
    "tokens D": "how many tokens the model was trained on, repeats counted.",
    "compute C, budget": "training FLOPs; a budget is the C that a run aims at, always with a counting convention.",
    "isoFLOP curve": "runs of one budget and many sizes. A small model sees many tokens, a large one few; the lowest "
    "loss lies in between.",
    "N*, D*, L*": "at a given C: the size with the lowest loss, the tokens that C then pays for, and that loss.",
    "a, b": "the exponents of N* ~ C^a and D* ~ C^b.",
    "fitted surface": "L(N, D) = E + A/N^alpha + B/D^beta through all runs (Hoffmann et al., arXiv 2203.15556).",
    "95 % interval": "found by refitting to resampled runs. Those of N*, D* and L* are taken over two forms of the law "
    "and the isoFLOP curves, and that of L* is widened by what the forms differ and by what was missed on held-out "
    "budgets; those of single parameters take their form for granted.",
    "Skaling": "the second form, L(N, D) = E + A (N^-alpha + R D^-beta)^k (arXiv 2608.07222); with k = 1 it is the "
    "fitted surface.",
    "nats/token": "the unit of the loss; divide by 0.693 for bits per token.",
}


NELBO = "the loss of a diffusion model: an upper bound on its negative log-likelihood, estimated by sampling masks."


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The first paragraph: the answer, what it would cost to be wrong, how it grows, and what lies beyond the runs."""

    lead: str
    more: tuple[str, ...] = ()
    is_refusal: bool = False


def answer(fits: Sequence[FitResult]) -> Answer:
    """What to train with the highest budget that was run, in one paragraph; or why the data do not say."""
    usable = [fit for fit in fits if fit.params and fit.at]
    if not usable:
        reasons = [fit.warnings[0] for fit in fits if fit.warnings]
        lines = tuple(map(_sentence, dict.fromkeys(reasons)))
        return Answer(lead="The data do not support a law yet.", more=(*_alone(fits), *lines), is_refusal=True)
    top = _top(usable)
    main = max(usable, key=lambda fit: (_bounded(fit, top), fit.law == "chinchilla"))
    if main.draws is not None and not _bounded(main, top):
        return _unbounded(fits, main, top)
    more = [_sure(usable, top), _second(usable, main, top), _open(fits, top), _growth(main), _beyond(usable, main, top)]
    more.append(next((fit.verdict.sentence() for fit in (main, *usable) if fit.verdict is not None), ""))
    return Answer(lead=_lead(main, top), more=tuple(line for line in more if line))


def _top(fits: Iterable[FitResult]) -> float:
    """The highest C that is reported and was run."""
    levels = [(c, fit) for fit in fits for c in fit.at]
    inside = [c for c, fit in levels if fit.points is None or c <= 1.05 * fit.points.budgets()[-1]]
    return max(inside or [c for c, _ in levels])


def _bounded(fit: FitResult, flops: float) -> bool:
    """Whether the fit says the best size at C, from runs that reach it, to better than a factor of ten."""
    best = fit.at.get(flops)
    low, high = (math.nan, math.nan) if best is None else best.ci.get("N", (math.nan, math.nan))
    return best is not None and best.reach <= 1.05 and high <= 10 * low


def _unbounded(fits: Sequence[FitResult], main: FitResult, top: float) -> Answer:
    """A law was found, but resampled runs scatter without bound."""
    size, ends = text.count(main.at[top].N, digits=2), main.at[top].ci["N"]
    scatter = f"its 95 % interval runs from {text.interval(ends, 'count')}"
    if not all(map(math.isfinite, ends)) and main.draws is not None:
        scatter = f"{main.failed} of {len(main.draws)} refits to resampled runs found no law at all"
    lines = (
        f"The {LAW_NAMES[main.law]} {SAY[main.law]} {size}, but {scatter}.",
        *_alone(fits),
        "More budgets, more sizes near the minima, or less noise between runs would change that.",
    )
    lead = f"These runs do not determine the best size at {text.flops(top)} FLOPs."
    return Answer(lead=lead, more=lines, is_refusal=True)


def _alone(fits: Iterable[FitResult]) -> list[str]:
    """The minima that stand on their own budget's runs."""
    minima = [m for fit in fits if fit.law == "isoflop" for m in fit.minima if m.usable]
    return [
        f"The runs at {text.flops(m.budget)} FLOPs have their minimum near {text.count(m.N, digits=2)} parameters "
        f"({text.interval(m.ci.get('N'), 'count')})."
        for m in minima
    ]


def _open(fits: Iterable[FitResult], top: float) -> str:
    """Whether the runs of that very budget enclose their minimum."""
    refused = [m for fit in fits for m in fit.minima if m.reason and m.budget == top]
    if not refused:
        return ""
    why = refused[0].detail.split(": ", 1)[1]
    return f"But no runs at {text.flops(top)} FLOPs enclose that size: {why}. The answer rests on the form of the law."


def _lead(main: FitResult, top: float) -> str:
    best = main.at[top]
    return (
        f"With {text.flops(top)} FLOPs, train about {text.count(best.N, digits=2)} parameters on about "
        f"{text.count(best.D, digits=2)} tokens ({text.count(best.D / best.N, digits=2)} tokens per parameter): "
        f"expect a validation loss near {text.number(best.L, digits=3)} nats/token."
    )


def _sure(usable: Sequence[FitResult], top: float) -> str:
    """The union of the methods' intervals: an interval should hold whichever method is right."""
    sure = [f for f in usable if top in f.at and math.isfinite(sum(f.at[top].ci.get("N", (math.nan,))))]
    if not sure:
        return ""
    pairs = {k: [f.at[top].ci[k] for f in sure] for k in "ND"}
    union = {k: (min(p[0] for p in v), max(p[1] for p in v)) for k, v in pairs.items()}
    size, tokens = text.interval(union["N"], "count"), text.interval(union["D"], "count")
    methods = " over both methods" if len(pairs["N"]) > 1 else ""
    lost = max(f.at[top].regret for f in sure)
    flat = (
        f" Any size in that range costs at most {text.number(lost, digits=1)} nats/token."
        if math.isfinite(lost)
        else ""
    )
    return f"The best size is sure to within {size} parameters, the tokens to within {tokens} (95 %{methods}).{flat}"


def _second(usable: Sequence[FitResult], main: FitResult, top: float) -> str:
    others = [fit for fit in usable if fit is not main and top in fit.at]
    if not others:
        missing = "isoFLOP curves" if main.law == "chinchilla" else "fitted surface"
        return f"This is the word of the {LAW_NAMES[main.law]} alone; there is no {missing} law to check it."
    other = others[0]
    ratio, size = other.at[top].N / main.at[top].N, text.count(other.at[top].N, digits=2)
    beyond = ", an extrapolation for them" if other.at[top].reach > 1.05 else ""
    if abs(ratio - 1) < 0.03:
        return f"The {LAW_NAMES[main.law]} and the {LAW_NAMES[other.law]} agree on it ({size} by the latter{beyond})."
    apart = (
        f"{abs(ratio - 1):.0%} {'larger' if ratio > 1 else 'smaller'}" if ratio < 2 else f"{ratio:.1f} times as large"
    )
    return f"That is the {LAW_NAMES[main.law]}; the {LAW_NAMES[other.law]} {SAY[other.law]} {size}, {apart}{beyond}."


def _growth(main: FitResult) -> str:
    a, b, ends = main.allocation.a, main.allocation.b, main.ci.get("a")
    within = f", {ends[0]:.2f} to {ends[1]:.2f}" if ends and all(map(math.isfinite, ends)) else ""
    return (
        f"Ten times the compute calls for {10**a:.1f} times the parameters (a = {a:.2f}{within}) "
        f"and {10**b:.1f} times the tokens."
    )


def _beyond(usable: Sequence[FitResult], main: FitResult, top: float) -> str:
    far = [c for c in main.at if c > 1.05 * top]
    if not far:
        return ""
    sizes = sorted(fit.at[far[0]].N for fit in usable if far[0] in fit.at)
    shown = " to ".join(dict.fromkeys(text.count(n, digits=2) for n in (sizes[0], sizes[-1])))
    return f"At {text.flops(far[0])} FLOPs that would be {shown} parameters, if the law keeps its form that far."


def reservations(fits: Iterable[FitResult]) -> list[str]:
    """Every warning once, with the methods that give it."""
    by: dict[str, list[str]] = {}
    for fit in fits:
        for warning in fit.warnings:
            by.setdefault(warning, []).append(LAW_NAMES[fit.law])
    return [_sentence(warning if len(names) > 1 else f"{names[0]}: {warning}") for warning, names in by.items()]


def _sentence(words: str) -> str:
    head = words[0] if words.startswith("isoFLOP") else words[0].upper()
    return f"{head}{words[1:]}{'' if words.endswith('.') else '.'}"


def refused(fits: Iterable[FitResult]) -> list[str]:
    """The isoFLOP curves that give no minimum, each with its reason."""
    return [_sentence(f"{objective(f.label)}, {m.detail}") for f in fits for m in f.minima if m.reason]


def method(fit: FitResult) -> str:
    """How the numbers of a fit were made."""
    norm = "least squares" if fit.surface is None else f"{fit.loss} norm of {fit.space} loss"
    corner = f", delta {fit.delta:g}" if math.isfinite(fit.delta) else ""
    drawn = 0 if fit.draws is None else len(fit.draws)
    failed = f" ({fit.failed} found no law)" if fit.failed else ""
    ends = f"intervals from {drawn} draws by {fit.interval_method}{failed}" if drawn else "no intervals"
    return f"{fit.n} runs, {norm}{corner}; {fit.allocation.how}; {ends}."


def method_name(fit: FitResult) -> str:
    return LAW_NAMES[fit.law]


def objective(name: str) -> str:
    return OBJECTIVES[name].label if name in OBJECTIVES else name or "Result"


def place(flops: float, best: Optimum) -> str:
    """The C of a row, and whether the method has runs there."""
    return text.flops(flops) + (f" ({best.reach:.2g} × its highest)" if best.reach > 1.05 else "")


def left_out(name: str) -> str:
    return {"without_top_1": "the top budget", "without_top_2": "the top two budgets"}.get(name, name)


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


_BOUNDS = [info.label.lower() for info in OBJECTIVES.values() if info.is_bound]
BOUND = (
    f"The loss of {text.listed(_BOUNDS)} is an upper bound on the negative log-likelihood and that of other objectives "
    "is the negative log-likelihood itself, so part of a gap between them is the bound."
)


def cell(name: str, row: Mapping[Any, Any]) -> str:
    """One cell of the table of runs; what is missing is a dash."""
    if name == "time":
        tokens, per_sec = row.get("tokens"), row.get("tokens_per_sec")
        return text.duration(tokens / per_sec if tokens and per_sec else None)
    value = row.get(name)
    if value is None or value != value:
        return "–"
    if name in ("params", "tokens"):
        return text.count(value)
    if name in ("budget", "flops"):
        return text.flops(value)
    if name == "loss":
        error = row.get("loss_se")
        return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None and error == error and error > 0 else "")
    return f"{value:.2g}" if name == "epochs" else str(value)


def convention(runs: pd.DataFrame) -> list[str]:
    """How FLOPs are counted here, and how far the usual 6 N D is from it."""
    names = sorted(runs["convention"].dropna().astype(str).unique()) if "convention" in runs else []
    if not names:
        return ["The runs do not say how their FLOPs were counted; without a column of FLOPs, C = 6 N D."]
    lines = [f"{name}: {CONVENTIONS.get(name, 'not one of the conventions that dlm knows.')}" for name in names]
    if names != ["6n"] and "flops_6n" in runs:
        share = (runs["flops_6n"] / runs["flops"]).dropna()
        if len(share):
            lines.append(
                f"The usual 6 N D would count {share.min():.0%} to {share.max():.0%} of these FLOPs, the less the "
                "smaller the model; so compare budgets and N* with other studies only after converting."
            )
    return lines


def glossary(runs: pd.DataFrame) -> dict[str, str]:
    """The words of the page; the NELBO where there is one."""
    bounds = [name for name, info in OBJECTIVES.items() if info.is_bound]
    has_bound = "objective" in runs and runs["objective"].isin(bounds).any()
    return {**GLOSSARY, **({"NELBO": NELBO} if has_bound else {})}
