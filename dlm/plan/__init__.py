"""Turn a sweep definition into the cells to train and the estimates of their cost."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
