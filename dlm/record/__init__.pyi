from .columns import RunRow as RunRow
from .outcomes import State as State
from .run import Result as Result
from .run import Status as Status
from .run import paired_difference as paired_difference
from .run import read_result as read_result
from .wandb import run_id as run_id
