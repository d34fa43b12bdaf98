"""The live page's readers: each is a cursor into ``Live``, not a queue.

A reader gets what changed since its cursor, merged, when it has taken what it got before. So a slow one costs no memory
and no time, and misses only what the next change has replaced. Readers at the same cursor share one encoding.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from caesura.runtime.errors import CaesuraError
from caesura_metrics_exporter.live import Live

READERS = 32  # streams at once: a browser tab each
LEAST_S = 0.25  # s between two changes, however many messages come
SHARE = 0.05  # of the event loop's time that encoding may take: where it takes long, changes come more seldom
MOST_S = 5.0  # s: no more seldom than this
_EXPIRE_S = 10.0


class TooManyReaders(CaesuraError):
    """All streams are taken."""


class LiveStream:
    """``Live`` as text for streams.

    Args:
        wall: unix time, seconds.
        broker: how the exporter's connection is; empty when well.
        readers: streams at once.
        least_s: seconds between two changes.
    """

    def __init__(
        self,
        live: Live,
        wall: Callable[[], float],
        broker: Callable[[], str],
        *,
        readers: int = READERS,
        least_s: float = LEAST_S,
    ) -> None:
        self.live = live
        self.readers = 0
        self.limit = readers
        self.closing = False
        self._wall = wall
        self._broker = broker
        self._least_s = least_s
        self._boot = secrets.token_hex(4)  # revisions count from one again after a restart
        self._told = 0
        self._changed = asyncio.Event()
        self._encoder = msgspec.json.Encoder()
        self._cost_s = 0.0
        self._shared: dict[tuple[int, int], bytes] = {}

    async def run(self) -> None:
        """Say now and then that something changed; for ever."""
        loop = asyncio.get_running_loop()
        expire_at = loop.time() + _EXPIRE_S
        while True:
            now = self._wall()
            self.live.connection(self._broker(), now)
            if loop.time() >= expire_at:
                expire_at = loop.time() + _EXPIRE_S
                self.live.expire(now)
            if self.live.revision != self._told:
                self._told = self.live.revision
                self._shared.clear()
                self._wake()
            pace_s = min(max(self._least_s, self._cost_s / SHARE), MOST_S)
            self._cost_s = 0.0
            await asyncio.sleep(pace_s)

    def close(self) -> None:
        """Let every reader end."""
        self.closing = True
        self._wake()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Be a reader while the block runs.

        Raises:
            TooManyReaders: with the number.
        """
        if self.readers >= self.limit:
            raise TooManyReaders(
                f"{self.limit} live streams are open, more are not served: close another tab, or ask for "
                "/live/state now and then instead"
            )
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1

    def cursor(self, last_event_id: str) -> int:
        """Where a reader goes on that had this event last; 0 for from the beginning."""
        boot, _, revision = last_event_id.partition("-")
        known = boot == self._boot and revision.isascii() and revision.isdigit() and len(revision) < 16
        return int(revision) if known else 0

    def state(self) -> bytes:
        """Everything, as JSON."""
        return self._encoder.encode(self.live.snapshot(self._wall()))

    def event(self, cursor: int) -> tuple[bytes, int]:
        """What a reader with this cursor is sent now, as a server-sent event, and its new cursor."""
        at = (cursor, self.live.revision)
        text = self._shared.get(at)
        if text is None:
            began = time.perf_counter()
            now = self._wall()
            change = self.live.since(cursor, now) if cursor else self.live.snapshot(now)
            name = b"snapshot" if change.whole else b"change"
            head = b"event: %b\nid: %b-%d\ndata: " % (name, self._boot.encode(), at[1])
            text = head + self._encoder.encode(change) + b"\n\n"
            self._cost_s += time.perf_counter() - began
            self._shared[at] = text
        return text, at[1]

    async def wait(self, cursor: int, timeout_s: float) -> bool:
        """Wait until there is more than ``cursor``, or the end; false when the time passed first."""
        while not self.closing and self._told <= cursor:
            changed = self._changed
            try:
                async with asyncio.timeout(timeout_s):
                    await changed.wait()
            except TimeoutError:
                return False
        return True

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
