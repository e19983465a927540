"""Run the `dlm` command as `python -m dlm.cli`."""

from dlm.cli.verbs import main

if __name__ == "__main__":  # processes that `dlm prepare` spawns import this module
    main()
