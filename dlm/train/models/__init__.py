"""The transformer and its Lightning module."""
