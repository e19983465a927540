"""Planned cells go in; processes on this machine or SLURM job arrays, and the state of every cell, come out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
