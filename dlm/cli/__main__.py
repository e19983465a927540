"""Run the `dlm` command as `python -m dlm.cli`."""

from dlm.cli.verbs import main

main()
