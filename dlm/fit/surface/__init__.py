"""Runs go in; a loss surface L(N, D), its noise and the warnings about both come out."""
