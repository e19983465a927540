from .mapping import load_mapping as load_mapping
from .tables import Collected as Collected
from .tables import collect as collect
from .tables import collect_mapped as collect_mapped
from .upload import sync as sync
from .wandb_folder import WandbFolder as WandbFolder
