"""A service's state folder: no other user can read it, and one process at a time uses it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from caesura.runtime.errors import CaesuraError


class StateFolderUnusable(CaesuraError):
    """The state folder cannot be made or written to; the text says why."""


class InUse(CaesuraError):
    """Another process uses this state folder."""


def private_dir(path: str) -> Path:
    """Create the state folder if needed, unreadable for other users.

    Raises:
        StateFolderUnusable: it cannot be made, or belongs to another user.
    """
    folder = Path(path)
    with translate_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    return folder


@contextmanager
def translate_os_errors(folder: Path) -> Iterator[None]:
    """Report errors of the operating system in the block as errors of the state folder.

    Raises:
        StateFolderUnusable: the operating system refused something.
    """
    try:
        yield
    except OSError as error:
        raise StateFolderUnusable(f"cannot use the state folder {folder}: {error}") from error


@contextmanager
def exclusive_lock(folder: str) -> Iterator[None]:
    """Hold the folder's lock while the block runs; the kernel releases it when the process dies.

    Raises:
        InUse: another process holds it.
        StateFolderUnusable: it cannot be made or written to.
    """
    with translate_os_errors(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = (Path(folder) / "lock").open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InUse(
                f"the state folder {folder} is in use by another process: stop it first, or choose another folder"
            ) from error
        yield
