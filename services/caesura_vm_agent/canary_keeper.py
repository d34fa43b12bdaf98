"""Holds the canary in this process's memory: fills it at start, rewrites it continuously, compares it after a pause.

Everything is done in slices of a millisecond: an answer of a clock-sync must not wait behind it.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress

from caesura.contract.messages import CanaryReport
from caesura.runtime.logs import get_logger
from caesura_vm_agent.canary import PAGE_BYTES, Canary

_SLICE_S = 0.001
_REWRITE_EVERY_S = 0.25
_REWRITES = 4  # pages each time: 16 pages a second cost 0.3 ms of CPU, and an old copy of memory shows after a quarter second
_NAMED = 5  # bad pages that a report names

_log = get_logger("caesura.agent")


class CanaryKeeper:
    """One canary. With ``size_bytes`` below one page there is none.

    Args:
        size_bytes: guest memory to hold, rounded down to whole pages.
    """

    def __init__(self, size_bytes: int) -> None:
        pages = size_bytes // PAGE_BYTES
        self._memory = _anonymous(max(pages, 1) * PAGE_BYTES)
        self.canary = Canary(self._memory, pages, os.urandom(32))
        self.on_filled: Callable[[], None] = lambda: None
        self.bad_pages = 0
        """Pages that were found bad so far."""

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that are watched; 0 until all of it was written."""
        return self.canary.pages * PAGE_BYTES if self.canary.filled else 0

    @property
    def writes(self) -> int:
        """How many pages were written so far."""
        return self.canary.writes

    async def run(self) -> None:
        """Fill it, then rewrite it for as long as the agent runs."""
        while not self.canary.filled:
            until = time.monotonic() + _SLICE_S
            while not self.canary.filled and time.monotonic() < until:
                self.canary.rewrite()
            await asyncio.sleep(0)
        if self.canary.pages:
            _log.info("canary.filled", bytes=self.held_bytes)
            self.on_filled()
        while True:
            await asyncio.sleep(_REWRITE_EVERY_S)
            for _ in range(_REWRITES):
                self.canary.rewrite()

    async def report(self) -> CanaryReport | None:
        """Compare every page now; None: there is no canary, or it was not filled yet."""
        if not self.held_bytes:
            return None
        until = time.monotonic() + _SLICE_S
        for number in range(self.canary.pages):
            self.canary.check(number)
            if time.monotonic() >= until:
                await asyncio.sleep(0)
                until = time.monotonic() + _SLICE_S
        found = self.canary.take()
        self.bad_pages += len(found)
        named = "; ".join(f"page {each.number} {each.why}" for each in found[:_NAMED])
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        if found:
            _log.error("canary.differs", bad_pages=len(found), pages=self.canary.pages, detail=named + more)
        return CanaryReport(
            pages=self.canary.pages,
            page_bytes=PAGE_BYTES,
            bad_pages=len(found),
            writes=self.writes,
            detail=named + more,
        )


def _anonymous(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Huge pages would put the canary into a few places of the guest's memory; small ones are spread over it.
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
