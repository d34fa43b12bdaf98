"""Publishes the owner of each VM until the bus shows it, from records that are on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from caesura.contract.messages import VmOwner
from caesura.delivery.message import OutboxMessage, clearing, prepare
from caesura.delivery.policy import NEWEST
from caesura.delivery.publisher import ReliablePublisher
from caesura.runtime.commits import DurableCommits
from caesura.runtime.identity import new_id
from caesura_coordinator.owners import Owners


class OwnerRecords:
    """Publishes the records of ``Owners``.

    They can be derived from the store, and after a reconnect there are so many that facts must not wait behind them: so they are not in the outbox.

    Args:
        owners: the records to publish.
        publisher: used for these records only.
        commits: those of the store that keeps them.
        source: CloudEvents source of the coordinator.
        is_leader: whether the coordinator may publish.
    """

    def __init__(
        self,
        owners: Owners,
        publisher: ReliablePublisher,
        commits: DurableCommits,
        *,
        source: str,
        is_leader: Callable[[], bool],
    ) -> None:
        self._owners = owners
        self._publisher = publisher
        self._commits = commits
        self._source = source
        self._is_leader = is_leader
        self._sent: dict[str, VmOwner | None] = {}
        """Maps a VM to the record in flight to the broker; None: its removal."""
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Check again what must be published."""
        self._changed.set()

    async def run(self) -> None:
        """Publish until the bus shows the records; runs until cancelled. It waits for the retained records first, so that little is sent twice.

        Raises:
            SyncFailed: the records may not be on disk.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not self._is_leader():
                continue
            due = self._owners.unpublished()
            await self._commits.reached()
            if not self._is_leader():
                self._owners.not_published(vm for vm, _ in due)
                continue
            for vm, owner in due:
                if vm not in self._sent or self._sent[vm] != owner:
                    self._sent[vm] = owner
                    accepted = partial(self._published, vm, owner)
                    self._publisher.put(self._message(vm, owner), policy=NEWEST, accepted=accepted)

    def _message(self, vm: str, owner: VmOwner | None) -> OutboxMessage:
        if owner is None:
            return clearing(VmOwner, event_id=new_id(), vm=vm)
        return prepare(owner, source=self._source, event_id=new_id(), at=datetime.now(UTC), vm=vm)

    def _published(self, vm: str, owner: VmOwner | None) -> None:
        if vm in self._sent and self._sent[vm] == owner:
            del self._sent[vm]
        self._owners.published(vm, owner)
