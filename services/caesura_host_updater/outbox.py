"""Facts on their way to the bus: kept in the journal with the state that makes them true, sent though the disk refuses."""

from __future__ import annotations

from collections.abc import Callable

from caesura.bus.port import Bus
from caesura.delivery.message import OutboxMessage
from caesura.delivery.publisher import ReliablePublisher
from caesura.delivery.sqlite_outbox import SqliteOutbox
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation.state import Operation


class Outbox:
    """The facts of one host, in order; each leaves the journal when the broker has it.

    Args:
        published: called with each fact when the broker has it.
    """

    def __init__(
        self,
        bus: Bus,
        journal: JournalThread,
        published: Callable[[OutboxMessage], None],
        *,
        retry_s: float = 2.0,
    ) -> None:
        self._journal = journal
        self._publisher = ReliablePublisher(
            bus, SqliteOutbox(journal.outbox), on_accepted=published, retry_s=retry_s
        )
        self.load = self._publisher.load
        self.run = self._publisher.run
        self.drained = self._publisher.drained
        self.ping = self._publisher.ping

    def __len__(self) -> int:
        return len(self._publisher)

    @property
    def refused(self) -> int:
        """Facts that wait because the broker refuses their topic."""
        return self._publisher.refused

    def put(self, fact: OutboxMessage, state: Operation) -> None:
        """Keep a fact with the state that makes it true, and publish it; does not wait for the disk."""
        self._journal.post(lambda journal: journal.note(state, [fact]))
        self._publisher.put(fact)

    def queue(self, *facts: OutboxMessage) -> None:
        """Publish facts that are in the journal already, or that the disk did not take."""
        self._publisher.put(*facts)
