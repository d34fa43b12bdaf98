"""Where messages wait so that they outlive the process: the port, and the store that keeps them in memory.

The SQLite store is in ``caesura.delivery.sqlite_outbox``; one suite (``tests/unit/delivery``) checks both against what is
written here. A message is *added* by its owner, in the transaction that makes it true; ``ReliablePublisher`` only reads
at start and removes what the broker has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from caesura.delivery.message import OutboxMessage


class OutboxStore(Protocol):
    """The storage of an outbox. No method blocks the event loop; every method raises StoreError."""

    async def add(self, messages: Sequence[OutboxMessage]) -> None:
        """Append these, all or none.

        A message whose id is already kept changes nothing. A retained message replaces those that wait on its topic.
        """

    async def load(self) -> list[OutboxMessage]:
        """The kept messages, in the order in which they were added. Unreadable ones are left out and logged."""

    async def remove(self, event_ids: Iterable[str]) -> None:
        """Remove these, in one transaction. An unknown id changes nothing."""


class MemoryOutbox:
    """An outbox that does not outlive the process."""

    def __init__(self) -> None:
        self._kept: dict[str, OutboxMessage] = {}

    async def add(self, messages: Sequence[OutboxMessage]) -> None:
        """See ``OutboxStore.add``."""
        for message in messages:
            if message.event_id in self._kept:
                continue
            if message.retain:
                older = [
                    key for key, each in self._kept.items() if each.retain and each.topic == message.topic
                ]
                for key in older:
                    del self._kept[key]
            self._kept[message.event_id] = message

    async def load(self) -> list[OutboxMessage]:
        """See ``OutboxStore.load``."""
        return list(self._kept.values())

    async def remove(self, event_ids: Iterable[str]) -> None:
        """See ``OutboxStore.remove``."""
        for each in event_ids:
            self._kept.pop(each, None)
