"""Turn planned cells into processes on this machine or SLURM job arrays, and report the state of every cell."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
