"""Runs at several learning rates or batches go in; laws of the best ones, and what the others lose, come out."""
