"""Messages received and not yet handled: bounded, and it reports when the sender must be held back.

A handler that is too slow may lose messages (QoS 0) or hold the sender back (QoS 1), but must never use up
memory. Most brokers stop at a window of unacknowledged messages, so QoS 1 stays small; where the
broker has no such window (amqtt) the connection stops reading. It cannot do that while a caller waits for
the broker's answer, which arrives behind the flood on the same connection (a handler that publishes would
deadlock): then the size in bytes is the bound.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, Protocol, TypeVar


class Measured(Protocol):
    """What the inbox needs to know about a message."""

    @property
    def qos(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...


T = TypeVar("T", bound=Measured)


class Inbox(Generic[T]):
    """First in, first out, for one reader.

    Args:
        limit: how many messages of each QoS, before QoS 0 is dropped and QoS 1 is held back.
        limit_bytes: how many bytes, before QoS 1 is held back in every case; QoS 0 is dropped at half of it.
    """

    def __init__(self, limit: int, limit_bytes: int) -> None:
        self.limit = limit
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self._items: deque[T] = deque()
        self._at_least_once = 0
        self._closed = False
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def full(self) -> bool:
        """Enough QoS 1 messages wait that the sender should be held back."""
        return self._at_least_once >= self.limit or 2 * self.size_bytes >= self.limit_bytes

    @property
    def overfull(self) -> bool:
        """The sender must be held back, even if an answer is awaited on the same connection."""
        return self.size_bytes >= self.limit_bytes

    @property
    def low(self) -> bool:
        """Half of the room is free again."""
        return 2 * self._at_least_once <= self.limit and 4 * self.size_bytes <= self.limit_bytes

    def put(self, item: T) -> bool:
        """Add a message; false if it was dropped (QoS 0 only)."""
        if item.qos == 0 and (len(self._items) >= self.limit or 2 * self.size_bytes >= self.limit_bytes):
            return False
        self._items.append(item)
        self._at_least_once += item.qos > 0
        self.size_bytes += item.size_bytes
        self._changed.set()
        return True

    async def get(self) -> T | None:
        """The next message; None as soon as the inbox is closed, even if messages are left in it."""
        while not self._closed:
            if self._items:
                item = self._items.popleft()
                self._at_least_once -= item.qos > 0
                self.size_bytes -= item.size_bytes
                return item
            self._changed.clear()
            await self._changed.wait()
        return None

    def close(self) -> None:
        """Make ``get`` return None from now on."""
        self._closed = True
        self._changed.set()
