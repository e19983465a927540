"""What a run measured goes in; the files of its run directory come out, and are read back from there."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
