"""What a run measured goes in; the files of its run directory and its row of runs.csv come out, and back."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
