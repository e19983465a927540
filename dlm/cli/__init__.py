"""The `dlm` command, which turns a command line into a plan, jobs, tables or a report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
