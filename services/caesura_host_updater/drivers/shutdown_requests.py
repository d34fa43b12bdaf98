"""Which VMs were asked to shut down for an update, on disk: one that is found to have ended since is started again."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

VALID_S = 3600.0
"""s: a VM that ends later than this after the request ended for a reason of its own, and is not started for it."""


class ShutdownRequests:
    """See the module. Every method blocks for as long as the disk takes.

    Args:
        folder: the folder of the driver's run files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file(self, vm: str) -> Path:
        """Where the request is noted."""
        return self._folder / f"{vm}.shutdown"

    def note(self, vm: str) -> None:
        """It is about to be asked. Raises OSError."""
        self.file(vm).write_bytes(b"")

    def left_s(self, vm: str) -> float:
        """How long a request counts from now on, in seconds; 0: there is none."""
        try:
            # Wall clock: it is compared across restarts of the host.
            age_s = time.time() - self.file(vm).stat().st_mtime
        except OSError:
            return 0.0
        return max(0.0, VALID_S - abs(age_s))

    def forget(self, vm: str) -> None:
        """It runs again."""
        with suppress(OSError):
            self.file(vm).unlink(missing_ok=True)
