"""One process at a time in a state folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from caesura.runtime.errors import CaesuraError


class InUse(CaesuraError):
    """Another process works in this state folder."""


@contextmanager
def sole_user(folder: str) -> Iterator[None]:
    """Hold the folder's lock while the block runs; the kernel gives it back when the process dies.

    Raises:
        InUse: another process holds it, or the folder cannot be used.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = (Path(folder) / "lock").open("w")
    except OSError as error:
        raise InUse(f"cannot use the state folder {folder}: {error}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InUse(
                f"the state folder {folder} is in use by another process: stop it first, or choose another folder"
            ) from error
        yield
