"""The live page's readers: each is a cursor into ``LivePageState`` instead of a queue.

A reader gets the merged changes since its cursor once it has read the previous ones, and misses only what a later
change has replaced. So a slow reader costs only the memory of what it is being sent, for as long as ``page`` allows: at most one
snapshot. Readers at the same cursor share one encoding, and so do those that request a snapshot within a short time.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
from msgspec.structs import replace

from caesura.runtime.errors import CaesuraError
from caesura_metrics_exporter.live.page_json import Delta
from caesura_metrics_exporter.live.page_state import LivePageState

READERS = 32  # streams at once: a browser tab each
LEAST_S = 0.25  # s between two changes, however many messages arrive
SHARE = 0.05  # of the event loop's time that encoding may take: if it takes long, changes are sent less often
MOST_S = 5.0  # s: the longest interval
_EXPIRE_S = 10.0


class TooManyReaders(CaesuraError):
    """All streams are taken."""


class LiveStream:
    """``LivePageState`` as text for streams.

    Args:
        wall: unix time, seconds.
        monotonic: the monotonic clock, seconds.
        broker: the problem of the exporter's connection; empty if there is none.
        readers: streams at once.
        least_s: seconds between two changes.
    """

    def __init__(
        self,
        live: LivePageState,
        wall: Callable[[], float],
        monotonic: Callable[[], float],
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
        self._monotonic = monotonic
        self._broker = broker
        self._least_s = least_s
        self._boot = secrets.token_hex(4)  # revisions start at one again after a restart
        self._told = 0
        self._changed = asyncio.Event()
        self._encoder = msgspec.json.Encoder()
        self._cost_s = 0.0
        self._shared: dict[tuple[int, int], tuple[bytes, memoryview]] = {}
        self._whole = (0.0, b"")  # until when the snapshot may be sent again, and its text

    async def run(self) -> None:
        """Signal changes at intervals, indefinitely."""
        loop = asyncio.get_running_loop()
        expire_at = loop.time() + _EXPIRE_S
        while True:
            now = self._wall()
            self.live.connection(self._broker(), now, self._monotonic())
            if loop.time() >= expire_at:
                expire_at = loop.time() + _EXPIRE_S
                self.live.expire(now, self._monotonic())
            if self.live.revision != self._told:
                self._told = self.live.revision
                self._shared.clear()
                self._wake()
            pace_s = self._pace_s(self._cost_s)
            self._cost_s = 0.0
            await asyncio.sleep(pace_s)

    def _pace_s(self, cost_s: float) -> float:
        return min(max(self._least_s, cost_s / SHARE), MOST_S)

    def close(self) -> None:
        """End every reader."""
        self.closing = True
        self._wake()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Register as a reader while the block runs.

        Raises:
            TooManyReaders: with the number.
        """
        if self.readers >= self.limit:
            raise TooManyReaders(
                f"{self.limit} live streams are open, more are not served: close another tab, or poll "
                "/live/state instead"
            )
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1

    def cursor(self, last_event_id: str) -> int:
        """The cursor of a reader whose last event was this; 0 for the beginning."""
        boot, _, revision = last_event_id.partition("-")
        known = boot == self._boot and revision.isascii() and revision.isdigit() and len(revision) < 16
        return int(revision) if known else 0

    def state(self) -> bytes:
        """The snapshot as JSON; a moment old if it was requested then."""
        now_s = self._monotonic()
        until_s, body = self._whole
        if now_s >= until_s:
            body, cost_s = self._encode(self.live.snapshot(self._wall()))
            self._whole = (now_s + self._pace_s(cost_s), body)
        return self._dated() + body

    def event(self, cursor: int) -> tuple[bytes, memoryview, int]:
        """The next server-sent event for a reader with this cursor, in two parts, and its new cursor."""
        at = (cursor, self.live.revision)
        shared = self._shared.get(at)
        if shared is None:
            now = self._wall()
            change = self.live.since(cursor, now) if cursor else self.live.snapshot(now)
            body, cost_s = self._encode(change)
            self._cost_s += cost_s
            name = b"snapshot" if change.whole else b"change"
            head = b"event: %b\nid: %b-%d\ndata: " % (name, self._boot.encode(), at[1])
            shared = self._shared[at] = (head, memoryview(body + b"\n\n"))
        return shared[0] + self._dated(), shared[1], at[1]

    def beat(self) -> bytes:
        """A beat that a page can see, with the clock of its times."""
        return b"event: beat\ndata: " + self._dated()[:-1] + b"}\n\n"

    def _encode(self, change: Delta) -> tuple[bytes, float]:
        """Without its start, which has the time: shared data may have been encoded earlier than it is sent."""
        began = time.perf_counter()
        body = self._encoder.encode(replace(change, now=None))[1:]
        return body, time.perf_counter() - began

    def _dated(self) -> bytes:
        return b'{"now":%.3f,' % self._wall()

    async def wait(self, cursor: int, timeout_s: float) -> bool:
        """Wait for changes after ``cursor``, or for the end; false on a timeout."""
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
