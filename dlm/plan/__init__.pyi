from .cells import Cell as Cell
from .cells import Plan as Plan
from .cost import with_estimates as with_estimates
from .definition import SweepSpec as SweepSpec
from .definition import load_sweep as load_sweep
from .grid import make_plan as make_plan
from .store import read_plan as read_plan
from .store import write_plan as write_plan
