"""Which coordinators share a store, which of them leads, and what each one waits for: announced retained, each by itself."""

from __future__ import annotations

import asyncio

from caesura.bus.messaging import MessageClient
from caesura.bus.port import Bus
from caesura.bus.presence import Presence
from caesura.contract.messages import CoordinatorStatus
from caesura_coordinator.leadership import Leadership
from caesura_coordinator.shared_store import SharedStore

_LOOK_S = 0.5
"""s: between two looks at what it waits for; a database that hangs does not call."""
_MOST_CHARACTERS = 500


class StatusAnnouncer:
    """See the module.

    Args:
        bus: whether there is a broker.
        post: where it is announced.
        shared: the store that coordinators share.
        leadership: whether this one leads.
        instance: the name of this coordinator.
        announce_s: seconds between two announcements of an unchanged status.
    """

    def __init__(
        self,
        bus: Bus,
        post: MessageClient,
        shared: SharedStore,
        leadership: Leadership,
        *,
        instance: str,
        announce_s: float,
    ) -> None:
        self._bus = bus
        self._shared = shared
        self._leadership = leadership
        self._instance = instance
        self._presence = Presence(
            post,
            lambda: self._now(online=True),
            lambda: self._now(online=False),
            beat_s=announce_s,
            coordinator=instance,
        )

    async def run(self) -> None:
        """Announce it when it changes, and from time to time; until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._presence.run(lambda: self._bus.stats.connected), name="status-announce")
            known = None
            while True:
                now = self._leadership.is_leader, self._kind()
                if now != known:
                    known = now
                    self._presence.changed()
                await asyncio.sleep(_LOOK_S)

    async def announce(self, timeout_s: float = 2.0) -> bool:
        """Announce it now; whether the broker accepted it."""
        return await self._presence.announce(timeout_s=timeout_s)

    async def answered(self, timeout_s: float) -> bool:
        """Announce it now; whether the broker answered. One that refuses it, by its access rules, is there."""
        return await self._presence.answered(timeout_s=timeout_s)

    async def goodbye(self) -> None:
        """Announce that this coordinator is gone."""
        await self._presence.goodbye(timeout_s=2.0)

    def _kind(self) -> str:
        """What it waits for without the seconds, which change all the time."""
        return self._shared.waiting().split(" for ", maxsplit=1)[0]

    def _now(self, *, online: bool) -> CoordinatorStatus:
        return CoordinatorStatus(
            coordinator=self._instance,
            online=online,
            leads=online and self._leadership.is_leader,
            epoch=self._leadership.authority.epoch,
            waits_for=self._shared.waiting()[:_MOST_CHARACTERS] if online else "",
        )
