"""The `dlm` command: a command line goes in; a plan, jobs, tables or a report come out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
