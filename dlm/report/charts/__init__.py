"""Describe the figures of the report: each function takes fits and tables and returns a ``Chart``, or None."""
