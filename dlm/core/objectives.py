"""The objectives that dlm knows, in one table."""

from __future__ import annotations

OBJECTIVE_HEADS = {"masked_diffusion": "mdm", "autoregressive": "ar"}
