"""Arrays of model sizes, tokens and losses go in; scaling laws with intervals and a verdict come out.

Arrays may be numpy or lists. `dlm.fit.table` reads CSV files.

    law = fit_surface(params, tokens, loss, flops=flops, at=[1e21])
    print(bootstrap(law, seed=0).report())
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
