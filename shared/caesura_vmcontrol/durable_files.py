"""Small files that must outlive the kernel: written whole, fsynced, owned by the folder's owner even when root writes them."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH105, PTH108, PTH116, PTH123

from __future__ import annotations

import os
from contextlib import suppress


def write_durably(folder: str, name: str, data: bytes) -> None:
    """Replace a file; when this has returned, it survives anything short of losing the disk. Raises OSError."""
    path = f"{folder}/{name}"
    temporary = f"{path}.new"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(handle, "wb") as file:
            give_to_owner(file.fileno(), folder)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def give_to_owner(handle: int, folder: str) -> None:
    """A file that root makes in a service's folder is for that service. Raises OSError."""
    owner = os.stat(folder)
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(handle, owner.st_uid, owner.st_gid)


def sync_folder(folder: str) -> None:
    """Make the folder's entries durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
