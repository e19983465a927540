"""`dlm --debug`: a log of all that a command did, for a report of a bug."""

from __future__ import annotations

import faulthandler
import logging
import platform
import sys
import traceback
from pathlib import Path
from typing import TextIO

from dlm.core.errors import UserError
from dlm.core.files import explain_os_error

LOG = "dlm-debug.log"  # in the current folder; each command with --debug adds to it

_log: TextIO | None = None


def start() -> None:
    """Write what the libraries log to LOG from now on, and the stacks of all threads if Python itself crashes.

    Raises:
        UserError: The file cannot be written.
    """
    global _log
    try:
        _log = open(LOG, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  (until the process ends)
    except OSError as error:
        raise UserError(f"--debug writes {LOG} into the current folder: {explain_os_error(error) or error}") from error
    faulthandler.enable(_log)
    form = "%(asctime)s %(process)d %(name)s %(levelname)s %(message)s"
    logging.basicConfig(stream=_log, level=logging.DEBUG, format=form, force=True)
    logging.captureWarnings(True)
    from importlib.metadata import version

    python = f"Python {platform.python_version()} on {platform.platform()}"
    logging.getLogger("dlm").info("%s: dlm %s, %s, in %s", " ".join(sys.argv), version("dlm"), python, Path.cwd())


def note(error: BaseException, *, is_mistake: bool) -> None:
    """With --debug, write the traceback of the error that ends a command to the log, and say where that is.

    Args:
        error: The error. SystemExit is how a command ends in good order.
        is_mistake: Whether it is a mistake of the user, whose traceback Python will not print.
    """
    if _log is None or isinstance(error, SystemExit):
        return
    lines = "".join(traceback.format_exception(error))
    logging.getLogger("dlm").error("%s", lines)
    if is_mistake:
        print(lines, end="", file=sys.stderr)
    print(f"dlm: the log is {Path(LOG).absolute()}; it may hold names of folders and hosts", file=sys.stderr)
