"""A disk that is slow, hangs or fails: a double for what brings a file to the disk."""

from __future__ import annotations

import errno
import os
import threading


class Disk:
    """Give it to ``GroupCommit`` as ``sync``; it is called in a thread.

    Args:
        hold: syncs wait until ``release``.
    """

    def __init__(self, *, hold: bool = False) -> None:
        self.calls = 0
        """Syncs that were begun."""
        self.synced_bytes = 0
        """How long the file was when the last sync that ended was begun."""
        self.broken = False
        """Whether syncs fail from now on."""
        self._go = threading.Event()
        if not hold:
            self._go.set()

    def __call__(self, file: int) -> None:
        """One sync of an open file.

        Raises:
            OSError: the disk is broken.
        """
        self.calls += 1
        size_bytes = os.fstat(file).st_size
        self._go.wait()
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fdatasync(file)
        self.synced_bytes = size_bytes

    def hold(self) -> None:
        """Syncs that begin from now on wait."""
        self._go.clear()

    def release(self) -> None:
        """All syncs continue."""
        self._go.set()
