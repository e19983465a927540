"""Runs go in; a loss surface L(N, D), its noise and its doubts come out."""
