"""dlm turns a compute budget into a scaling law for diffusion language models.

    sweeps/*.yaml -> plan -> submit -> train -> collect -> fit -> report

Each package is one stage of this flow. Only dlm.train, dlm.convert and dlm.launch import torch.
"""

from __future__ import annotations

__version__ = "0.1.0"
