"""dlm turns a compute budget into a scaling law for diffusion language models.

    sweeps/*.yaml -> plan -> submit -> train -> collect -> fit -> report

The base and the sweep half never import torch; the training half is dlm.launch and what it calls.
"""

from __future__ import annotations

__version__ = "0.1.0"
