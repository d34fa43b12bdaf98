"""Reading files that an operator writes: regular files only, and no larger than such a file can be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_MAX_BYTES = 1 << 20
_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_regular(path: Path) -> str:
    """The text of a regular file; anything else is refused without waiting.

    A FIFO would block open(2) until somebody writes, a device may do anything: both are refused unopened. Between
    the check and the open the name may become another file, so O_NONBLOCK and a second check of what was opened.

    Raises:
        OSError: the kernel refused.
        ValueError: it is not a regular file, is too large, or is not UTF-8 text.
    """
    _check_regular(path.stat())
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with os.fdopen(handle, "rb") as file:
        _check_regular(os.fstat(file.fileno()))
        return file.read(_MAX_BYTES + 1).decode("utf-8")


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "something else")
        raise ValueError(f"it is {kind}, not a regular file: put a regular file there, or move it away")
    if found.st_size > _MAX_BYTES:
        raise ValueError(f"it has {found.st_size} bytes; such a file has {_MAX_BYTES} at most")
