"""Frozen predictions as versions before format 2 wrote them."""

import hashlib

from dlm.fit.frozen import extended


def as_format_1(content):
    """The content of a file as earlier versions wrote it, with a hash of N, D and the loss for each run."""
    runs = content["runs"]["table"]
    rows = zip(runs["params"], runs["tokens"], runs["loss"], strict=True)
    cells = [hashlib.sha256(f"{n},{d},{loss:.9g}".encode()).hexdigest()[:12] for n, d, loss in rows]
    kept = {key: value for key, value in content.items() if key not in ("git_sha", "git_dirty", "runs", "format")}
    return extended({"format": 1, **kept, "runs": {"n": len(cells), "top": content["runs"]["top"], "cells": cells}})
