"""Who leads: the epoch of this coordinator, how it claims one, and when it stands down for another coordinator.

Coordinators that share a store in PostgreSQL decide it there, and take each other's rollouts over: ``takeover``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from caesura.bus.messaging import MessageClient
from caesura.bus.port import Bus, Will
from caesura.bus.presence import Presence, last_will
from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import fleet_of, source_of
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura.lifecycle.epoch import epoch_floor, leaps
from caesura.runtime.commits import DurableCommits
from caesura.runtime.errors import CaesuraError, ConfigError
from caesura.runtime.identity import new_id
from caesura.runtime.logs import get_logger
from caesura_coordinator.authority import Authority
from caesura_coordinator.store import CoordinatorStore

_ANNOUNCED_KEPT = 10
_SETTLE_AT_MOST_S = 30.0
_BACKLOG_POLL_S = 0.2
_SILENT_S = 70.0
"""s: three announcements of a leader were missed."""
_log = get_logger("caesura.coordinator")


class NoEpochLeft(CaesuraError):
    """There is no epoch above the one in the store or, with an empty store, above those on the bus."""

    def __init__(self, store: str) -> None:
        super().__init__(
            f"there is no epoch above the one that {store} or the bus has: no coordinator claimed it. See 'An epoch that nobody "
            "claimed' in docs/operate/runbooks/epoch.md."
        )


class LeadershipLost(CaesuraError):
    """Another coordinator has claimed a higher epoch; this one no longer has authority."""

    exit_code = 3


class WrongFleet(ConfigError):
    """A coordinator of another fleet leads on this broker."""


def presence(authority: Authority, *, online: bool) -> m.CoordinatorPresence:
    """The coordinator's presence, also as its last will."""
    return m.CoordinatorPresence(
        coordinator=authority.coordinator, epoch=authority.epoch, online=online, commands=COMMANDS
    )


def will(authority: Authority, fleet: str) -> Will:
    """What the broker publishes when the coordinator's connection is lost."""
    source = source_of(fleet, "coordinator", authority.coordinator)
    return last_will(presence(authority, online=False), source)


class Leadership:
    """The authority of one coordinator.

    Args:
        bus: where other coordinators claim epochs.
        post: how the presence is announced.
        store: where a claimed epoch is kept.
        commits: those of the store.
        instance: the coordinator's name; each run has one of its own, derived from it.
        settle_s: how many seconds to wait for the retained messages before the first claim.
        announce_s: seconds between two announcements of an unchanged presence.
        host_epochs: the epochs that hosts obey.
        holds: whether nothing but the bus can show that another coordinator leads.
        fleet: our own.
    """

    def __init__(
        self,
        bus: Bus,
        post: MessageClient,
        store: CoordinatorStore,
        commits: DurableCommits,
        *,
        instance: str,
        settle_s: float,
        announce_s: float,
        host_epochs: Callable[[], list[int]],
        holds: Callable[[], bool] = lambda: True,
        fleet: str = "default",
    ) -> None:
        self.authority = Authority(coordinator=f"{instance}-{new_id()[:8]}", epoch=0)
        self.claimed = False
        """Whether this run has claimed an epoch, be it superseded or not."""
        self.announced: list[int] = []
        """Epochs that coordinators had claimed on the bus before ours was."""
        self._bus = bus
        self._store = store
        self._commits = commits
        self._settle_s = settle_s
        self._host_epochs = host_epochs
        self._holds = holds
        self._contested = asyncio.Event()
        """Another coordinator has claimed this one's epoch."""
        self._fleet = fleet
        self._stranger: tuple[m.CoordinatorPresence, str, float] | None = None
        """The last presence of a coordinator of another fleet, that fleet, and when it arrived by the loop's clock."""
        self._observed: tuple[m.CoordinatorPresence, float] | None = None
        """Another coordinator's last presence, and when it arrived by the loop's clock."""
        self._superseded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.presence = Presence(
            post,
            lambda: presence(self.authority, online=True),
            lambda: presence(self.authority, online=False),
            beat_s=announce_s,
        )

    @property
    def is_leader(self) -> bool:
        """Whether an epoch is claimed and no coordinator has claimed a higher one."""
        return self.claimed and not self._superseded.done() and self._holds()

    @property
    def superseded(self) -> bool:
        """Whether another coordinator has claimed a higher epoch."""
        return self._superseded.done()

    async def settled(self) -> None:
        """Wait for the retained messages: they arrive in any order, and no message marks the end.

        A large fleet's inventories take longer than the configured time: then the wait lasts as long as messages are queued for us.
        """
        await asyncio.sleep(self._settle_s)
        end = asyncio.get_running_loop().time() + _SETTLE_AT_MOST_S
        # The bus counts its backlog but does not signal changes of it.
        while self._bus.stats.backlog and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110
            await asyncio.sleep(_BACKLOG_POLL_S)

    async def claim(self) -> None:
        """Claim an epoch above every known one, stored on disk before it is published. Until then the old authority, if any, remains in force.

        Raises:
            NoEpochLeft: there is none above the known ones.
            StoreError, SyncFailed: it could not be stored.
        """
        stored, claimed = max(self._store.epoch(), self.authority.epoch), 0
        # The same epoch, or a higher one, may arrive during the wait for the disk.
        while (known := epoch_floor(stored, self.announced, self._host_epochs())) >= claimed:
            claimed = known + 1
            if claimed > m.EPOCH_MOST:
                raise NoEpochLeft(self._store.database.path)
            await self._commits.writable()
            self._store.save_epoch(claimed)
            await self._commits.reached()
            if self._superseded.done():
                return
        self.authority = msgspec.structs.replace(self.authority, epoch=claimed)
        self.claimed = True
        _log.info("coordinator.claimed", epoch=claimed, coordinator=self.authority.coordinator)

    def rival(self, stored: int) -> str:
        """A coordinator that leads with an epoch above that of our store, so it does not share it; empty: there is none.

        Two that each claim above the other would take turns. One that is silent is gone.
        """
        if self._observed is None:
            return ""
        presence, arrived_s = self._observed
        silent = asyncio.get_running_loop().time() - arrived_s > _SILENT_S
        return presence.coordinator if presence.online and presence.epoch > stored and not silent else ""

    def other_fleet(self) -> str:
        """The coordinator of another fleet that leads on this broker, and what to do; empty: there is none."""
        if self._stranger is None:
            return ""
        presence, fleet, arrived_s = self._stranger
        silent = asyncio.get_running_loop().time() - arrived_s > _SILENT_S
        if not presence.online or silent:
            return ""
        return (
            f"coordinator {presence.coordinator}, which leads fleet {fleet!r} on this broker, and this one is of fleet {self._fleet!r}: give each fleet a broker "
            "of its own, or set the same CAESURA_COORDINATOR_FLEET for both"
        )

    @property
    def knows_epochs(self) -> bool:
        """Whether anything on the bus has an epoch that a coordinator claimed."""
        return any(self.announced) or any(self._host_epochs())

    async def claim_above_equals(self) -> None:
        """Claim again whenever another has the same epoch; until a higher one is claimed.

        Raises:
            LeadershipLost: a higher one was claimed.
        """
        while True:
            await self._unless_superseded(self._contested.wait())
            await self._unless_superseded(self.claim())
            self._contested.clear()  # conflicts about the previous epoch are settled
            await self.announce()

    async def _unless_superseded(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(work)
        waited: set[asyncio.Future[Any]] = {task, self._superseded}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._superseded.done():
                await self._superseded
            await task
        finally:
            task.cancel()

    async def announce(self) -> None:
        """Publish the presence now."""
        await self.presence.announce(timeout_s=2.0)

    async def on_coordinator(self, observed: m.CoordinatorPresence, received: Received) -> None:
        """A coordinator's presence arrived: another's, or our own."""
        if observed.coordinator != self.authority.coordinator:
            now_s, fleet = asyncio.get_running_loop().time(), fleet_of(received.header.source)
            self._observed = observed, now_s
            self._stranger = (observed, fleet, now_s) if fleet not in {"", self._fleet} else None
        self._on_epoch_observed(observed.epoch, observed.coordinator, alive=observed.online)
        if self.is_leader and observed != presence(self.authority, online=True):
            await self.announce()  # the will of an older coordinator must not stay as the last message

    def _on_epoch_observed(self, epoch: int, coordinator: str, *, alive: bool = False) -> None:
        """Stand down for a higher epoch; at an equal one, one of the two claims a higher one."""
        mine = self.authority
        if coordinator == mine.coordinator:
            return
        if not self.claimed:
            self.announced = sorted({*self.announced, epoch})[-_ANNOUNCED_KEPT:]
        elif self._superseded.done() or epoch < mine.epoch:
            return
        elif leaps(mine.epoch, epoch):
            # Hosts do not obey it either; ours is announced again, so that it does not stay retained.
            _log.error("coordinator.epoch_impossible", coordinator=coordinator, epoch=epoch, ours=mine.epoch)
        elif epoch == mine.epoch and not (alive and coordinator > mine.coordinator):
            # Both claimed it at once, and hosts may obey the other: if both stood down, nobody would lead. Do not claim here: a
            # claim waits for the disk, and a higher epoch may be the next message.
            self._contested.set()
        else:
            self._superseded.set_exception(
                LeadershipLost(
                    f"coordinator {coordinator} has claimed epoch {epoch}, this one had {mine.epoch}: standing down. "
                    + (
                        f"It is {self.other_fleet()}"
                        if self.other_fleet()
                        else "Run one coordinator, or let a standby take over only when the first is stopped."
                    )
                )
            )
