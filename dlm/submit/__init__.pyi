from .cells import cancel as cancel
from .cells import submit_plan as submit_plan
from .local import LocalPool as LocalPool
from .logs import logs_of as logs_of
from .slurm import Slurm as Slurm
from .state import cells_now as cells_now
from .table import sweep_status as sweep_status
