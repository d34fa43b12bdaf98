"""What the coordinator publishes from its store: passed on once it is on disk and an epoch is claimed, in the order in which it was stored."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.delivery.message import clearing
from caesura.delivery.policy import EVERY, NEWEST
from caesura.delivery.publisher import ReliablePublisher
from caesura.runtime.commits import DurableCommits
from caesura.runtime.errors import StoreError
from caesura.runtime.identity import new_id
from caesura.runtime.logs import get_logger
from caesura_coordinator.leadership import Leadership
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.retention import Removal
from caesura_coordinator.store import CoordinatorStore

_RETRY_S = 0.2
_log = get_logger("caesura.coordinator")


class OutboxRelay:
    """Passes stored messages to the publisher, and publishes the retained state again when the broker may have lost it.

    Args:
        store: where the messages are stored.
        commits: those of the store.
        repository: source of the retained state.
        publisher: where they are passed.
        leadership: only a leader publishes.
    """

    def __init__(
        self,
        store: CoordinatorStore,
        commits: DurableCommits,
        repository: RolloutRepository,
        publisher: ReliablePublisher,
        leadership: Leadership,
    ) -> None:
        self._store = store
        self._commits = commits
        self._repository = repository
        self._publisher = publisher
        self._leadership = leadership
        self._filled = asyncio.Event()
        self._to_remove: list[Removal] = []
        self._republish_due = False

    def notify(self) -> None:
        """Messages were stored."""
        self._filled.set()

    def remove_later(self, removal: Removal) -> None:
        """Remove this from the bus, after the messages that are stored by now."""
        self._to_remove.append(removal)

    async def run(self) -> None:
        """Pass what is on disk to the publisher, as soon as there is an epoch to publish it under."""
        loaded = False
        while True:
            await self._filled.wait()
            self._filled.clear()
            if not self._leadership.is_leader:
                continue
            removals, self._to_remove = self._to_remove, []
            await self._commits.reached()
            if self._leadership.superseded:
                continue  # only the other coordinator may publish it
            if not loaded:
                try:
                    await self._publisher.load()
                except StoreError as error:
                    _log.error("outbox.not_loaded", why=str(error))
                    self._to_remove = [*removals, *self._to_remove]
                    await asyncio.sleep(_RETRY_S)
                    self._filled.set()
                    continue
                loaded = True
            self._store.left_over = 0
            self.hand_over()
            self._remove(removals)  # after messages of a previous run about the same rollouts

    def hand_over(self) -> None:
        """Pass the messages that are on disk to the publisher."""
        for message in self._store.stored(self._commits.on_disk):
            self._publisher.put(message, policy=NEWEST if message.retain else EVERY)

    def waiting(self) -> int:
        """Stored messages, including those that the broker has just accepted."""
        return self._store.left_over + len(self._publisher) + self._publisher.unremoved + self._store.unread

    def republish(self) -> None:
        """Publish the retained state on the bus again."""
        try:
            self._to_remove += self._repository.republish()
            self._republish_due = False
        except StoreError as error:
            if not self._republish_due:
                _log.error("coordinator.not_republished", why=str(error))
            self._republish_due = True  # retried with the next tick
        self._filled.set()

    def republish_if_due(self) -> None:
        """Try again what ``republish`` could not store."""
        if self._republish_due:
            self.republish()

    def _remove(self, removals: Iterable[Removal]) -> None:
        """Remove from the bus what must no longer be visible."""
        for each in removals:
            for wave in range(each.waves):
                self._clear(m.WaveState, rollout=each.rollout, wave=wave)
            if each.whole:
                self._clear(m.RolloutState, rollout=each.rollout)

    def _clear(self, kind: type[Message], **parameters: str | int) -> None:
        self._publisher.put(clearing(kind, event_id=new_id(), **parameters), policy=NEWEST)
