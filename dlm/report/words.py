"""Turn fits and runs into the sentences and the formatted values of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.core.objectives import OBJECTIVES
from dlm.fit.fitted import Optimum
from dlm.fit.hparams.untuned import where_tuned
from dlm.fit.laws import LAW_NAMES
from dlm.fit.points import UNBOUNDED
from dlm.fit.result import FitResult

if TYPE_CHECKING:
    import pandas as pd

INSIDE = 1.05  # a C up to this multiple of the highest budget counts as run: runs miss their budget by some per cent
SAME_SIZE = 0.03  # two methods agree if their N* differ by less than this fraction
WIDE = 10.0  # if the ends of the interval of N* differ by a larger factor, the size is not determined
MISSING = "–"

PARAMETERS = {
    "E": "the loss that remains at any size and with any amount of data, nats/token",
    "A": "weight of the size term A / N^alpha",
    "B": "weight of the data term B / D^beta",
    "alpha": "how fast the loss falls with size",
    "beta": "how fast the loss falls with tokens",
    "N0": "the best size is N0 C^a",
    "D0": "the best number of tokens is D0 C^b",
    "L0": "the loss of the best size is L0 C^c",
    "R": "weight of the data term relative to the size term",
    "k": "how the two terms combine: 1 adds them, 0 takes the larger",
    "R_D": "how many repetitions of the data are worth something",
    "R_N": "the same for parameters beyond those that the unique tokens need",
    "a": "the best size grows as C^a",
    "b": "the best number of tokens grows as C^b",
    "c": "the loss falls as C^c within the runs",
}
CONVENTIONS = {
    "6n": "6 FLOPs per non-embedding parameter and token. Embeddings, attention scores and head do not count.",
    "6n_total": "6 FLOPs per parameter and token, embeddings and head included. Attention scores do not count.",
    "full": "body, attention scores and output head, forward and backward: what the hardware computes.",
    "full_masked_head": "body and attention scores for every token, the output head for masked tokens only, forward "
    "and backward: what masked-diffusion training in dlm computes.",
}
SIZES = {
    "blocks": "the blocks",
    "with_head": "blocks and output head",
    "with_embeddings": "blocks, head and input embedding",
}
CONVENTIONS_CAPTION = (
    "The exponents of the same runs, if N and C are counted in another way: a changes with the count of N, but at one "
    "count of C, b of the isoFLOP curves, whose minima are then taken over log D, does not, and a + b = 1 only if C is "
    "proportional to N D with that N."
)
COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {  # table of runs: heading, format
    "run_id": ("run", str),
    "objective": ("objective", str),
    "model": ("model", str),
    "params": ("parameters N", text.count),
    "tokens": ("tokens D", text.count),
    "epochs": ("epochs", "{:.2g}".format),
    "budget": ("budget", text.flops),
    "flops": ("FLOPs spent", text.flops),
    "loss": ("loss ± s.e.", "{:.4f}".format),
    "steps": ("steps", str),
    "learning_rate": ("learning rate", text.number),
    "schedule": ("schedule", str),
    "global_batch_size": ("batch (sequences)", str),
    "block_size": ("block (tokens)", str),
    "time": ("training time", text.duration),
    "attempts": ("attempts", str),
    "role": ("role", str),
    "device": ("device", str),
}
WORD_COLUMNS = ("run_id", "objective", "model", "schedule", "device", "role")
RECIPE = ("learning_rate", "schedule", "global_batch_size", "block_size")
CAPTION_COLUMNS = ("objective", *RECIPE, "attempts", "device", "epochs")  # in the caption if equal for all runs


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """The first paragraph of a section: what to train, or why the runs do not determine this."""

    lead: str
    more: Sequence[str] = ()
    is_refusal: bool = False


def conclude(fits: Sequence[FitResult]) -> Conclusion:
    """State what to train with the highest budget that was run, and how certain this is.

    If the runs do not determine what to train, state the reason instead.
    """
    usable = [fit for fit in fits if fit.params and fit.at]
    if not usable:
        reasons = dict.fromkeys(fit.warnings[0] for fit in fits if fit.warnings)
        more = [*_minima(fits), *(sentence(reason) for reason in reasons)]
        return Conclusion(lead="The data do not support a law yet.", more=more, is_refusal=True)
    top = _highest_run(usable)
    main = max(usable, key=lambda fit: (_is_bounded(fit, top), fit.law == "combined"))
    if main.draws is not None and not _is_bounded(main, top):
        return _undetermined(fits, main, top)
    more = [
        _interval(main, top),
        _comparison(usable, main, top),
        _open_minimum(fits, top),
        _growth(main),
        _extrapolation(usable, main, top),
    ]
    best = main.at[top]
    lead = (
        f"With {text.flops(top)} FLOPs, train about {_rough(best.N)} parameters on about {_rough(best.D)} tokens "
        f"({_rough(best.tokens_per_param)} tokens per parameter): expect a validation loss near "
        f"{text.number(best.L, digits=3)} nats/token."
    )
    return Conclusion(lead=lead, more=[sentence for sentence in more if sentence])


def _rough(value: float) -> str:
    return text.count(value, digits=2)


def _highest_run(fits: Sequence[FitResult]) -> float:
    """Return the highest reported C that the runs reach; if they reach none, the highest reported C."""
    run = [flops for fit in fits for flops in fit.at if is_run(fit, flops)]
    return max(run or [flops for fit in fits for flops in fit.at])


def is_run(fit: FitResult, flops: float) -> bool:
    """Whether the runs of a fit reach C = ``flops``; true for a fit without stored points."""
    return fit.points is None or flops <= INSIDE * fit.points.budgets()[-1]


def _is_bounded(fit: FitResult, flops: float) -> bool:
    """Whether the runs reach C = ``flops`` and determine the best size at this C to within a factor of WIDE."""
    if flops not in fit.at:
        return False
    low, high = fit.at[flops].ci.get("N", UNBOUNDED)
    return fit.at[flops].reach <= INSIDE and high <= WIDE * low


def _undetermined(fits: Sequence[FitResult], main: FitResult, top: float) -> Conclusion:
    """Return the conclusion for a law whose refits to resampled runs scatter too widely to determine the best size."""
    ends = main.at[top].ci["N"]
    scatter = f"the 95 % interval runs from {text.interval(ends, 'count')}"
    if not all(math.isfinite(end) for end in ends) and main.draws is not None:
        scatter = f"{main.failed} of {len(main.draws)} refits to resampled runs found no law at all"
    more = (
        f"The best size by the {LAW_NAMES[main.law]} is {_rough(main.at[top].N)} parameters, but {scatter}.",
        *_minima(fits),
        "More budgets, more sizes near the minima, or less noise between runs would change that.",
    )
    lead = f"These runs do not determine the best size at {text.flops(top)} FLOPs."
    return Conclusion(lead=lead, more=more, is_refusal=True)


def _minima(fits: Iterable[FitResult]) -> list[str]:
    """Return a sentence for each usable isoFLOP minimum of a single budget; these minima need no law."""
    return [
        f"The runs at {text.flops(minimum.budget)} FLOPs have their minimum near {_rough(minimum.N)} parameters "
        f"({text.interval(minimum.ci.get('N'), 'count')})."
        for fit in fits
        if fit.law == "isoflop"
        for minimum in fit.usable
    ]


def _interval(main: FitResult, top: float) -> str:
    """State the interval of the answer, and what the worst size inside it costs."""
    best = main.at[top]
    if not math.isfinite(sum(best.ci.get("N", UNBOUNDED))):
        return ""
    size, tokens = (text.interval(best.ci[key], "count") for key in ("N", "D"))
    said = f"The 95 % interval is {size} for the parameters and {tokens} for the tokens."
    if not math.isfinite(best.regret):
        return said
    return f"{said} Any size in that range costs at most {text.number(best.regret, digits=1)} nats/token."


def _comparison(usable: Sequence[FitResult], main: FitResult, top: float) -> str:
    """Compare the best size with the best size by a second method."""
    name = LAW_NAMES[main.law]
    other = next((fit for fit in usable if fit is not main and top in fit.at), None)
    if other is None:
        missing = LAW_NAMES["isoflop" if main.law == "combined" else "combined"]
        return f"This answer rests on the {name} alone: there is no law from the {missing} to check it."
    second, size, ratio = LAW_NAMES[other.law], _rough(other.at[top].N), other.at[top].N / main.at[top].N
    beyond = ", by extrapolation" if other.at[top].reach > INSIDE else ""
    if abs(ratio - 1) < SAME_SIZE:
        return f"The {name} and the {second} agree on the size ({size} by the {second}{beyond})."
    apart = (
        f"{abs(ratio - 1):.0%} {'larger' if ratio > 1 else 'smaller'}" if ratio < 2 else f"{ratio:.1f} times as large"
    )
    return f"This size is that of the {name}; that of the {second} is {size}, {apart}{beyond}."


def _open_minimum(fits: Iterable[FitResult], top: float) -> str:
    """Return a warning if the runs of the top budget do not enclose their minimum, otherwise ''."""
    refused = [minimum for fit in fits for minimum in fit.minima if minimum.reason and minimum.budget == top]
    if not refused:
        return ""
    return (
        f"But no runs at {text.flops(top)} FLOPs enclose that size: {refused[0].why}. "
        "The answer rests on the form of the law."
    )


def _growth(main: FitResult) -> str:
    a, b, ends = main.allocation.a, main.allocation.b, main.ci.get("a")
    within = f", {ends[0]:.2f} to {ends[1]:.2f}" if ends and all(math.isfinite(end) for end in ends) else ""
    return (
        f"Within these budgets, ten times the compute calls for {10**a:.1f} times the parameters (a = {a:.2f}{within}) "
        f"and {10**b:.1f} times the tokens."
    )


def _extrapolation(usable: Sequence[FitResult], main: FitResult, top: float) -> str:
    """State the best size at the lowest reported C beyond the runs; '' if all reported C were run."""
    beyond = min((flops for flops in main.at if flops > INSIDE * top), default=None)
    if beyond is None:
        return ""
    sizes = sorted(fit.at[beyond].N for fit in usable if beyond in fit.at and math.isfinite(fit.at[beyond].N))
    if not sizes:
        return f"At {text.flops(beyond)} FLOPs no size is given: {main.at[beyond].withheld}."
    shown = " to ".join(dict.fromkeys(_rough(size) for size in (sizes[0], sizes[-1])))
    return f"At {text.flops(beyond)} FLOPs it would be {shown} parameters, if the law keeps its form that far."


def reservations(fits: Iterable[FitResult]) -> list[str]:
    """Return every warning once, prefixed with the name of the method if only one method gives the warning."""
    return _once((fit.law, warning) for fit in fits for warning in fit.warnings)


def notes(fits: Iterable[FitResult]) -> list[str]:
    """Return every note once, prefixed with the name of the method if only one method gives the note."""
    return _once((fit.law, note) for fit in fits for note in fit.notes)


def _once(said: Iterable[tuple[str, str]]) -> list[str]:
    methods: dict[str, list[str]] = {}
    for law, line in said:
        methods.setdefault(line, []).append(LAW_NAMES[law])
    return [sentence(line if len(names) > 1 else f"{names[0]}: {line}") for line, names in methods.items()]


def sentence(words: str) -> str:
    """Return words as a sentence: with a capital and a full stop."""
    first = words[0] if words.startswith("isoFLOP") else words[0].upper()
    return f"{first}{words[1:]}{'' if words.endswith('.') else '.'}"


def untuned(runs: pd.DataFrame, fits: Sequence[FitResult] = ()) -> str:
    """Return a sentence on how the learning rate was tuned, or that it was not; '' if the table does not show it.

    The first fit with exponents that knows it says what that does to these. Without such a fit, a sentence says where
    the rate was not tuned.
    """
    said = [str(fit.tuning["sentence"]) for fit in fits if fit.tuning is not None and math.isfinite(fit.allocation.a)]
    if said:
        return sentence(said[0])
    where = where_tuned(runs)
    if where is None:
        return ""
    return f"Untuned: these exponents describe this recipe; its learning rate was tuned {where}."


def refused(fits: Iterable[FitResult]) -> list[str]:
    """Return a sentence for each isoFLOP curve without a usable minimum, with the reason."""
    return [sentence(f"{objective(fit.label)}, {one.detail}") for fit in fits for one in fit.minima if one.reason]


def method(fit: FitResult) -> str:
    """Describe how the numbers of a fit were computed."""
    norm = "least squares" if fit.surface is None else f"{fit.how.norm} norm of {fit.how.space} loss"
    delta = f", delta {fit.delta:g}" if math.isfinite(fit.delta) else ""
    intervals = "no intervals"
    if fit.draws is not None and len(fit.draws):
        failed = f" ({fit.failed} of them found no law)" if fit.failed else ""
        intervals = f"intervals from {len(fit.draws)} draws by {fit.interval_method}{failed}"
    return f"{LAW_NAMES[fit.law]}: {fit.n} runs, {norm}{delta}; {fit.allocation.how}; {intervals}."


def objective(name: str) -> str:
    """Return the heading of a training objective. The name '' stands for runs without a stated objective."""
    return OBJECTIVES[name].label if name in OBJECTIVES else name or "Result"


def place(flops: float, best: Optimum) -> str:
    """Format C = ``flops``, with a note when the method extrapolates to this C."""
    return text.flops(flops) + (f" ({best.reach:.2g} × its highest)" if best.reach > INSIDE else "")


def relative_errors(held_out: Mapping[str, float]) -> list[str]:
    """Format the relative errors of N*, D* and L* in per cent; ``held_out`` is one entry of ``FitResult.holdout``."""
    found = (held_out.get(f"{key}_error") for key in "NDL")
    return [MISSING if error is None else f"{error:+.1%}" for error in found]


def cell(name: str, row: Mapping[Any, Any]) -> str:
    """Format one cell of the table of runs.

    Args:
        name: A key of COLUMNS.
        row: A row of runs.csv, with None for missing values.
    """
    value = row.get(name)
    if name == "time" and row.get("tokens") and row.get("tokens_per_sec"):
        value = row["tokens"] / row["tokens_per_sec"]
    if value is None:
        return MISSING
    _, show = COLUMNS[name]
    error = f" ± {row['loss_se']:.4f}" if name == "loss" and row.get("loss_se") else ""
    return show(value) + error


def convention(runs: pd.DataFrame) -> list[str]:
    """Explain how the FLOPs of the runs are counted, and what 6 N D would count instead."""
    names = sorted(runs["convention"].dropna().astype(str).unique()) if "convention" in runs else []
    if not names:
        return ["The runs do not say how their FLOPs were counted; without a column of FLOPs, C = 6 N D."]
    lines = [f"{name}: {CONVENTIONS.get(name, 'not one of the conventions that dlm knows.')}" for name in names]
    if names != ["6n"] and "flops_6n" in runs:
        share = (runs["flops_6n"] / runs["flops"]).dropna()
        if len(share):
            lines.append(
                f"The usual 6 N D would count {share.min():.0%} to {share.max():.0%} of these FLOPs, less for smaller "
                "models. Convert budgets and N* before you compare them with other studies."
            )
    return lines
