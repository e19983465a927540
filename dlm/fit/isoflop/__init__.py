"""Runs at a few budgets go in; the minimum of each budget and the lines through them come out."""
