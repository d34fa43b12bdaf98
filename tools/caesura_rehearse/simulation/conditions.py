"""The time of a rehearsal, and conditions that are waited for: each change has them looked at again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress


class Conditions:
    """What happens in a rehearsal is made known here."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        """The instant (CLOCK_MONOTONIC, seconds) that counts as zero."""
        self._changed = asyncio.Event()

    @property
    def now(self) -> float:
        """Seconds since the rehearsal began."""
        return time.monotonic() - self.began

    def notify(self) -> None:
        """Something changed: conditions that are waited for are looked at."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until it holds, for ``timeout_s`` seconds (None: as long as it takes); whether it does."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()
        return condition()
