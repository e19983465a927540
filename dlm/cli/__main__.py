"""Run the `dlm` command as `python -m dlm.cli`."""

from dlm.cli.entry import main

if __name__ == "__main__":  # the processes that `dlm prepare` spawns import this module and must not run the command
    main()
