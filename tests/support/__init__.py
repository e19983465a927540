"""Helpers that several test files share, and the paths of the tests and the checkout."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
