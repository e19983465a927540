"""Sum up a fitted law in at most ten lines: the answer, how far it can be trusted, and what limits it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from dlm.core import text
from dlm.fit.fitted import Fitted, Optimum
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.epochs import Epochs

MOST_LINES, WIDTH = 10, 80
MOST_BUDGETS = 4  # of which the best use is shown
CUT = " ..."  # ends a sentence that does not fit


def brief(result: Fitted, head: str, *, at: Sequence[float], width: int, rest: str) -> str:
    """Sum up a law in at most MOST_LINES lines of WIDTH characters. What was refused or withheld comes first.

    Args:
        result: The fitted law.
        head: What was fitted to what, in a few words.
        at: The C in FLOPs that were asked for. Empty: the highest C of the runs, and those beyond it.
        width: The width of the terminal. Below WIDTH, the same words take more lines.
        rest: Where the rest can be read.
    """
    page = _Page()
    page.add(f"{head}: {result.status}", most=2)
    asked = [flops for flops in dict.fromkeys(at) if flops in result.at] or _top(result.at)
    limits = [f"{_kind(result)}: {warning}" for warning in result.warnings]
    hidden = 0  # the number of C that are not shown
    if result.status != "refused":
        for line in _withheld(result, asked):
            page.add(line, most=2)
        trust = _trust(result)
        kept = 1 + bool(trust) + bool(limits)  # a line for the exponents, and one each for the other two
        hidden = _add_best(page, result, asked, page.room - kept, is_wide=width >= WIDTH)
        page.add(_exponents(result))
        free = page.room - bool(limits)
        page.add(trust, most=min(3, free, max(free - 1, 1)))
    unread = sum(not page.add(line, most=3) for line in limits)
    page.lines.append(_more(result, unread, hidden, rest))
    return "\n".join(part for line in page.lines for part in _parts(line, min(width, WIDTH)))


class _Page:
    """The sentences and rows above the last line, which says where the rest is."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.room = MOST_LINES - 1  # how many lines of WIDTH characters are left

    def add(self, line: str, *, most: int = 1) -> bool:
        """Add a sentence, which may take ``most`` lines and is cut between words if it takes more.

        Returns:
            Whether the whole sentence is there.
        """
        if not line:
            return True
        parts, most = _parts(line, WIDTH), min(most, self.room)
        if most < 1:
            return False
        is_whole = len(parts) <= most
        if not is_whole:
            last = textwrap.wrap(parts[most - 1], WIDTH - len(CUT), break_on_hyphens=False)[0]
            line = " ".join(part.strip() for part in [*parts[: most - 1], last]) + CUT
        self.lines.append(line)
        self.room -= min(len(parts), most)
        return is_whole


def _parts(line: str, width: int) -> list[str]:
    """Break a line between words; further parts are indented."""
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, max(width, 10), subsequent_indent="  ", break_on_hyphens=False)


def _kind(result: Fitted) -> str:
    return "refused" if result.status == "refused" else "warning"


def _top(flops: Iterable[float]) -> list[float]:
    """Return the two highest C: by default the highest of the runs, and ten times as much."""
    return sorted(flops)[-2:]


def _withheld(result: Fitted, asked: Sequence[float]) -> list[str]:
    """Say what is withheld of the optima that were asked for, and of the exponents."""
    reasons: dict[str, list[str]] = {}
    for flops in () if _is_repeated(result) else asked:
        if reason := result.at[flops].withheld:
            reasons.setdefault(reason, []).append(text.flops(flops))
    lines = [f"withheld at {text.listed(where)} FLOPs: {reason}" for reason, where in reasons.items()]
    has_powers = not isinstance(result.surface, Epochs)
    if has_powers and not math.isfinite(result.allocation.a):
        lines.append(f"exponents of N* and D*: {result.allocation.how}")
    return lines


def _is_repeated(result: Fitted) -> bool:
    """Whether the optima depend on the unique tokens."""
    return isinstance(result.surface, DataConstrained | Epochs)


def _add_best(page: _Page, result: Fitted, asked: Sequence[float], room: int, *, is_wide: bool) -> int:
    """Add the best use of each C that was asked for, and return of how many there was no room for it."""
    if _is_repeated(result):
        return _add_repeated(page, result, asked, room)
    known = [flops for flops in asked if not math.isnan(result.at[flops].N)]
    shown = known[: max(min(MOST_BUDGETS, room - 1), 1)]
    rows = [("C", "N*", "D*", "L*"), *((text.flops(flops), *_values(result.at[flops])) for flops in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if is_wide and shown and sum(widths) + 6 <= WIDTH:
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            page.add("  ".join(cells).rstrip())
        return len(known) - len(shown)
    shown = shown[: max(room // 2, 1)]
    for _, (flops, n, d, loss) in zip(shown, rows[1:], strict=False):
        page.add(f"best at {flops} FLOPs: N* = {n}, D* = {d}, L* = {loss}", most=2)
    return len(known) - len(shown)


def _values(best: Optimum) -> tuple[str, str, str]:
    """N*, D* and L*, each with its interval."""
    loss = "withheld" if math.isnan(best.L) else f"{text.number(best.L)} ({text.interval(best.ci.get('L'))})"
    n, d = (f"{text.count(getattr(best, key))} ({text.interval(best.ci.get(key), 'count')})" for key in "ND")
    return n, d, loss


def _add_repeated(page: _Page, result: Fitted, asked: Sequence[float], room: int) -> int:
    """Add for how many unique tokens the optima hold, and the best size and epochs of the highest C."""
    from dlm.fit.repeated import summary  # which needs `Fitted` and its optima

    found = summary(result)
    uses = [use for use in found["allocation"] if use.C in asked]
    uses.sort(key=lambda use: not use.withheld)
    for use in uses[:2]:
        page.add(f"best for {use.sentence()}", most=2)
    page.add(str(found["holds"]), most=2)
    return len(uses[2:])


def _exponents(result: Fitted) -> str:
    """The exponents of N* and D* with their intervals; empty if no power law gives them, or if they are withheld."""
    powers = result.allocation
    if isinstance(result.surface, Epochs) or not math.isfinite(powers.a):
        return ""
    a, b = (f"{text.number(getattr(powers, key))} ({text.interval(result.ci.get(key))})" for key in "ab")
    return f"N* ~ C^a, a = {a}; D* ~ C^b, b = {b}"


def _trust(result: Fitted) -> str:
    """How far the law can be trusted, in one or two sentences; empty if nothing shows it."""
    if result.verdict is not None:
        return f"trust: {result.verdict.first_words()}"
    held: Mapping[str, float] = result.holdout.get("without_top_1", {})
    if "L_rms_error" not in held:
        return ""
    error = f"{held['L_rms_error']:.2%} (root mean square)"
    return f"trust: fitted without the top budget, the law predicts its losses with an error of {error}"


def _more(result: Fitted, unread: int, hidden: int, rest: str) -> str:
    """What is not on the page, and where it can be read."""
    parts = [text.counted(hidden, "budget")] if hidden else []
    parts += [text.counted(unread, "warning")] if unread else []
    parts += [text.counted(len(result.notes), "note")] if result.notes else []
    return f"more ({', '.join([*parts, 'all parameters'])}): {rest}"
