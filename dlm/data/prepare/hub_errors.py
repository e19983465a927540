"""Say in one line why the Hugging Face hub, or a library that talks to it, gives no data."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from dlm.core.errors import TryAgainError, UserError, causes, without_passwords
from dlm.core.files import explain_os_error

BUSY = (408, 429)  # the HTTP statuses below 500 with which a server asks to be called again


@contextlib.contextmanager
def naming_refusals(source: str) -> Iterator[None]:
    """Convert what the libraries of the hub raise to UserError or, if the hub does not answer, TryAgainError.

    Errors of the file system that the user can mend, such as a full disk, pass unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{source} needs the package {error.name}: run {sys.executable} -m pip install datasets"
        ) from error
    except UserError:
        raise
    except Exception as error:  # datasets raises types without a common base
        if isinstance(error, OSError) and explain_os_error(error):
            raise
        told = _told(error, source)
        if told is None:
            raise
        raise told from error


def _told(error: Exception, source: str) -> UserError | None:
    """Return the error to raise for one of the libraries of the hub, or None if it is none of theirs."""
    import datasets.data_files
    import datasets.exceptions
    import huggingface_hub.errors as hub

    said = one_line(error)

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes(error))

    if is_a(hub.GatedRepoError):
        return UserError(
            f"{source} is gated: accept its terms on its page, and log in with `hf auth login` or set HF_TOKEN"
        )
    if is_a(hub.RevisionNotFoundError):
        return UserError(f"{source} has no such revision: give a branch, a tag or a commit after the @")
    if is_a(hub.RepositoryNotFoundError, hub.HFValidationError):
        return UserError(f"the hub has no data set {source}, or you may not read it: check OWNER/NAME, or set HF_TOKEN")
    if is_a(datasets.data_files.EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError):
        return UserError(f"{source} holds no files of data: choose another data set, or another revision of it")
    if is_a(datasets.exceptions.DatasetsError, RuntimeError):
        return UserError(f"{source} is no data set that the library datasets can read: {said}")
    if is_a(OSError, hub.HTTPError):  # type: ignore[attr-defined]
        endpoint = without_passwords(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        statuses = [cause.response.status_code for cause in causes(error) if isinstance(cause, hub.HfHubHTTPError)]
        if is_a(hub.OfflineModeIsEnabled) or any(status < 500 and status not in BUSY for status in statuses):
            return UserError(f"{endpoint} does not give {source}: {said}")
        return TryAgainError(
            f"cannot get {source} from {endpoint} ({said}): the same command continues when the hub answers"
        )
    return None


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line and without the passwords of URLs."""
    return without_passwords(" ".join(str(error).split()))
