"""Start the `dlm` command, so that Ctrl-C ends it without a traceback while Python still imports it."""

from __future__ import annotations

from dlm.core import signals, terminal


def main() -> None:
    """Run the `dlm` command."""
    signals.exit_at_ctrl_c()
    from dlm.cli.verbs import main as run

    terminal.guard()

    run()
