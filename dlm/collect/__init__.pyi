from .tables import Collected as Collected
from .tables import collect as collect
from .tables import collect_mapped as collect_mapped
from .upload import sync as sync
