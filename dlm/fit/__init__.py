"""fit: arrays of (params, tokens, loss) -> frozen FitResults.
numpy and scipy only; `dlm.fit.table` reads CSV files.

result = fit_surface(params, tokens, loss, flops=flops, at=[1e21])
print(bootstrap(result, seed=0).report())
"""

from dlm.fit.comparison import SideBySide, side_by_side
from dlm.fit.envelope import fit_envelope
from dlm.fit.gate import judge, optima
from dlm.fit.isoflop import fit_isoflop
from dlm.fit.multiplier import Multiplier, compare
from dlm.fit.points import Points
from dlm.fit.resample import bootstrap
from dlm.fit.result import Allocation, FitResult, Minimum, Optimum
from dlm.fit.surface import fit_surface
from dlm.fit.verdict import Verdict

__all__ = [
    "Allocation",
    "FitResult",
    "Minimum",
    "Multiplier",
    "Optimum",
    "Points",
    "SideBySide",
    "Verdict",
    "bootstrap",
    "compare",
    "fit_envelope",
    "fit_isoflop",
    "fit_surface",
    "judge",
    "optima",
    "side_by_side",
]
