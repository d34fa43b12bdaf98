"""The coordinator's shell: messages in, decisions stored, commands repeated, facts published from the outbox."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from caesura.bus.messaging import MessageClient
from caesura.bus.port import Bus, Delivery
from caesura.contract import messages as m
from caesura.contract.codec import ContractError, Received
from caesura.contract.envelope import Message, source_of
from caesura.contract.topics import channel_of
from caesura.delivery.publisher import ReliablePublisher
from caesura.delivery.sqlite_outbox import beside
from caesura.fleet.state import FleetState
from caesura.runtime.commits import DurableCommits
from caesura.runtime.errors import SyncFailed
from caesura.runtime.group_commit import GroupCommit
from caesura.runtime.logs import get_logger
from caesura_coordinator.authority import Authority
from caesura_coordinator.dispatcher import RolloutDispatcher
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.fleet_receiver import FleetReceiver, ObservedFleet
from caesura_coordinator.inputs import Approve
from caesura_coordinator.leadership import Leadership, LeadershipLost, WrongFleet
from caesura_coordinator.outbox_relay import OutboxRelay
from caesura_coordinator.owner_records import OwnerRecords
from caesura_coordinator.owners import Owners
from caesura_coordinator.reconciler import Reconciler
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.requests import RequestHandler
from caesura_coordinator.resync import SETTLE_S, FleetResync
from caesura_coordinator.sender import CommandSender
from caesura_coordinator.shared_store import SharedStore
from caesura_coordinator.status import StatusAnnouncer
from caesura_coordinator.store import CoordinatorStore, SyncedOutbox

_ANNOUNCE_S = 20.0
"""s: between two announcements of an unchanged presence. A last will needs a broker: if it stopped together with the
coordinator, the presence stays online indefinitely, so readers must treat silence as offline (as with the hosts' inventories)."""

_ANSWER_S = 5.0
"""s: for the broker to acknowledge a message of the outbox."""
_FLUSH_S = 3.0
"""s: for the last messages on a stop signal; the rest is published at the next start."""
_log = get_logger("caesura.coordinator")


def is_another(bus: str, last: str) -> bool:
    """Whether two buses, each a list of addresses with commas, have no address in common; one that is not known may be the same."""
    return bool(bus and last) and not {*bus.split(",")} & {*last.split(",")}


def subscriptions() -> list[str]:
    """The topic filters that the coordinator needs."""
    kinds = (
        m.HostInventory,
        m.InventoryPart,
        m.HostPresence,
        m.OperationReported,
        m.ReportPart,
        m.VmClockSynced,
        m.AgentPresence,
        m.VmReady,
        m.EventApproved,
        m.SetDocument,
        m.RolloutState,
        m.CoordinatorPresence,
        m.VmOwner,
        m.VmApproved,
        m.RolloutRequested,
        m.FreezeRequested,
        m.AbortRequested,
        m.ResumeRequested,
    )
    return [channel_of(kind).filter() for kind in kinds]


class Coordinator:
    """One coordinator on one bus with one store."""

    def __init__(
        self,
        bus: Bus,
        store: CoordinatorStore,
        *,
        instance: str,
        settle_s: float,
        fleet: str = "default",
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        announce_s: float = _ANNOUNCE_S,
        commits: GroupCommit | None = None,
        shared: SharedStore | None = None,
        ignore_retained: bool = False,
        bus_label: str = "",
    ) -> None:
        self.bus = bus
        self._bus_label = bus_label
        self.store = store
        self.post = MessageClient(
            bus, source_of(fleet, "coordinator", instance), on_refused=self._on_refused, wanted=self._wants
        )
        store.write_as(self.post.source)
        self.shared = shared
        """The store's other part, if coordinators share it; None: this one is the only one with it."""
        self.commits: DurableCommits = shared or commits or GroupCommit(store.database)
        """No effect of a commit leaves the process before this covers it."""
        off_loop = shared.off_loop() if shared is not None else beside(store.database.path)
        self.outbox = SyncedOutbox(off_loop, self.commits)
        self.publisher = ReliablePublisher(bus, self.outbox, answer_s=_ANSWER_S)
        """The publisher of everything that is stored first."""
        self._owner_publisher = ReliablePublisher(bus, answer_s=_ANSWER_S)
        self._broker_answered_s = asyncio.get_running_loop().time()
        """Loop time of the last answer of the broker; only a coordinator that could give way to another asks."""
        self.repository = RolloutRepository(store, now())
        self._now = now
        self._observed = ObservedFleet()
        self._unread = 0
        """Messages that waited when the last plan was ready, and that were not read since: at most so many."""
        self.leadership = Leadership(
            bus,
            self.post,
            store,
            self.commits,
            instance=instance,
            settle_s=settle_s + (SETTLE_S if ignore_retained else 0.0),
            announce_s=announce_s,
            host_epochs=self._host_epochs,
            holds=(lambda: shared.leads) if shared is not None else lambda: True,
            fleet=fleet,
        )
        self._status = (
            StatusAnnouncer(bus, self.post, shared, self.leadership, instance=instance, announce_s=announce_s)
            if shared is not None
            else None
        )
        self.owners = Owners(store, self.state)
        self._owner_records = OwnerRecords(
            self.owners,
            self._owner_publisher,
            self.commits,
            source=self.post.source,
            is_leader=lambda: self.is_leader,
        )
        self.sender = CommandSender(
            self.repository, self.post, self.commits, lambda: self.authority if self.is_leader else None
        )
        self.relay = OutboxRelay(store, self.commits, self.repository, self.publisher, self.leadership)
        self._dispatcher = RolloutDispatcher(
            self.repository,
            self.sender,
            self.relay,
            self.leadership,
            self.commits,
            fleet_now=lambda: self.fleet,
            now=now,
            on_tick=self._on_tick,
            decides=self._decides,
        )
        self._reconciler = Reconciler(
            self.repository,
            self.relay,
            self.leadership,
            source=self.post.source,
            fleet_now=lambda: self.fleet,
            now=now,
        )
        self._fleet_receiver = FleetReceiver(
            self._observed,
            self.owners,
            self._owner_records,
            self._reconciler,
            self._dispatcher,
            self.leadership,
            fleet,
        )
        self.requests = RequestHandler(
            self.repository,
            self.owners,
            self.relay,
            self._dispatcher,
            self.leadership,
            fleet=fleet,
            fleet_now=lambda: self.fleet,
            now=now,
        )
        self.resync = FleetResync(
            self.post,
            self.leadership,
            enabled=ignore_retained,
            vms=lambda: sum(1 for _ in self.fleet.vm_names()),
            publish=self._publish_state,
            now=time.monotonic,
        )
        self.commits.listeners.append(self._dispatcher.on_synced)
        self._subscribe()

    def _subscribe(self) -> None:
        for kind, receiver in self._receivers():
            # Of other coordinators' rollouts only the existence matters, not the content of their waves.
            self.post.subscribe(kind, receiver, whole=kind is not m.RolloutState)
        self.post.listeners.append(self._fleet_receiver.on_any)
        self.post.on_tombstone(m.HostInventory, self._fleet_receiver.on_host_removed)
        self.post.on_tombstone(m.VmOwner, self._fleet_receiver.on_owner_removed)
        self.post.on_tombstone(m.RolloutState, self._reconciler.on_rollout_removed)

    @property
    def authority(self) -> Authority:
        """The coordinator and epoch under which commands are sent."""
        return self.leadership.authority

    @property
    def is_leader(self) -> bool:
        """Whether an epoch is claimed and no coordinator has claimed a higher one."""
        return self.leadership.is_leader

    @property
    def state(self) -> FleetState:
        """The fold of the bus."""
        return self._observed.state

    @property
    def fleet(self) -> FleetLookup:
        """The view of the fleet that decisions read."""
        return self._observed.lookup

    def tasks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Maps a name to an eternal task, for ``serve``."""
        shared: dict[str, Callable[[], Awaitable[None]]] = {}
        if self._status is not None:
            shared = {"status": self._status.run, "broker": self._give_way_without_broker}
        return {
            **shared,
            "bus": lambda: self.bus.run(self._deliver, self._on_connected, self.commits),
            "rollouts": self._dispatcher.run,
            "outbox": self.relay.run,
            "authority": self._lead,
            "presence": lambda: self.leadership.presence.run(
                lambda: self.is_leader and self.bus.stats.connected
            ),
            "owners": self._owner_records.run,
            "publisher": self.publisher.run,
            "owner publisher": self._owner_publisher.run,
            "store": self.commits.run,
            "resync": self.resync.run,
        }

    def known(self, party: str) -> list[str]:
        """The known names of a party: they stay subscribed when an unknown one floods."""
        match party:
            case "vm":
                return list(self.fleet.vm_names())
            case "host":
                return list(self.fleet.inventories)
            case _:
                return []

    def waiting(self) -> int:
        """Stored messages, including those that the broker has just accepted."""
        return self.relay.waiting()

    async def drain(self) -> None:
        """Publish the decisions, then say goodbye. Rollouts keep their state for the next start."""
        # A superseded coordinator publishes nothing more: its documents are older than those of the other.
        if self.is_leader and self.bus.stats.connected:
            try:
                async with asyncio.timeout(_FLUSH_S):
                    await self.commits.reached()
            except (SyncFailed, TimeoutError) as error:
                _log.error(
                    "outbox.not_on_disk",
                    messages=self.store.unread,
                    why=str(error) or "the disk does not answer",
                )
            self.relay.hand_over()
            if not await self.publisher.drained(_FLUSH_S):
                _log.warning("outbox.left", messages=len(self.publisher))
            await self.leadership.presence.goodbye(timeout_s=2.0)
        ends = self.shared is not None and not self.shared.lost and not self.leadership.superseded
        if self._status is not None and ends and self.bus.stats.connected:
            await self._status.goodbye()
        await self.bus.close()

    async def _lead(self) -> None:
        """Claim an epoch above every one received, then stand down when another coordinator claims a higher one.

        Raises:
            LeadershipLost: another coordinator has claimed a higher epoch.
            WrongFleet: one of another fleet leads on this broker, and this store is not shared: a shared one waits for its end.
        """
        while not await self.bus.wait_connected(60):
            _log.warning("coordinator.waiting_for_broker", why=self.bus.stats.last_error)
        await self.leadership.settled()
        if self.shared is not None:
            rollouts = await self.shared.lead(self._obstacle)
            self.store.write_as(self.post.source)
            self.repository.load(self._now(), rollouts)
        elif other := self.leadership.other_fleet():
            raise WrongFleet(f"this broker has {other}")
        await self.leadership.claim()
        self.owners.lead(self.authority.epoch)
        self._owner_records.changed()
        self._reconciler.reconcile_pending_documents()
        self._reconciler.ensure_documents(self.state.sets())
        # Messages received in the meantime are processed before time passes: nothing is awaited until then.
        self._reconciler.reconcile_pending_rollouts()
        self._dispatcher.dispatch_pending()
        # Plans take their time, and no host obeys this epoch before it is announced: beside each other.
        await self.requests.hold()
        pending = asyncio.create_task(self.requests.answer_pending(), name="pending-requests")
        try:
            await self.leadership.announce()
            if self.shared is not None and self._bus_label:
                await self.shared.led_on(self._bus_label)
            await self.commits.writable()
            if self.is_leader:
                # The broker may have lost retained messages while this one was disconnected.
                self.relay.republish()
            await pending
            self._unread = self.bus.stats.unhandled
            self._dispatcher.wake()
        finally:
            pending.cancel()
        await self.leadership.claim_above_equals()

    def _obstacle(self, epoch: int) -> str:
        """What keeps a standby from the lead though the store, which has this epoch, does not; empty: nothing."""
        if not self.bus.stats.connected:
            return "the broker"
        assert self.shared is not None  # noqa: S101 - who asks is the store
        if other := self.leadership.other_fleet():
            return f"the end of {other}"
        if is_another(self._bus_label, self.shared.bus) and not self.leadership.knows_epochs:
            return (
                f"a sign of this fleet on {self._bus_label}: the store was led on {self.shared.bus}. Set the same broker for all coordinators, "
                "or, if it was replaced, see 'Another broker' in docs/operate/high-availability.md"
            )
        rival = self.leadership.rival(epoch)
        return f"the end of coordinator {rival}, which leads this fleet with another store" if rival else ""

    def _decides(self) -> bool:
        """Whether all that arrived by now, or by the end of the last plan, was read: time that passes for rollouts judges others by their silence.

        And whether the shared store answers, and the broker did within half a lease: what is decided in the meantime would be announced late.
        With a store of its own no other coordinator could.
        """
        # First in, first out: what waits now is at least what is left of it.
        self._unread = min(self._unread, self.bus.stats.unhandled)
        if self.requests.deciding or self._unread:
            return False
        if self.shared is None:
            return True
        if self.shared.waiting():
            return False
        silent_s = asyncio.get_running_loop().time() - self._broker_answered_s
        return self.bus.stats.connected and silent_s < self.shared.lease_s / 2

    async def _give_way_without_broker(self) -> None:
        """A leader that has lost the broker may be the only one that has. A connection that is cut off looks alive for a minute, so it is tried.

        Raises:
            LeadershipLost: the broker has not answered for the time of a lease.
        """
        assert self.shared is not None  # noqa: S101 - both run with a shared store only
        assert self._status is not None  # noqa: S101
        lease_s, loop = self.shared.lease_s, asyncio.get_running_loop()
        while True:
            await asyncio.sleep(lease_s / 8)
            if not self.is_leader or await self._status.answered(timeout_s=lease_s / 4):
                self._broker_answered_s = loop.time()
            elif loop.time() - self._broker_answered_s > lease_s:
                raise LeadershipLost(
                    f"no answer of the broker for {lease_s:g} s ({self.bus.stats.last_error or 'the connection hangs'}): a coordinator that has one may lead"
                )

    async def _on_connected(self) -> None:
        if self.bus.stats.connects > 1:
            self._observed.reconnected(self._now())
        self.resync.connected()
        await self._publish_state()

    async def _publish_state(self) -> None:
        """Everything that this coordinator retains: the broker may have lost it, or a reader asks."""
        if self._status is not None:
            await self._status.announce()
        if not self.is_leader:
            return
        self.owners.reconnected()
        self._owner_records.changed()
        await self.leadership.announce()
        await self.commits.writable()
        if self.is_leader:  # another claim may have arrived in the meantime
            self.relay.republish()

    def _receivers(self) -> list[tuple[type, Callable[..., Awaitable[None]]]]:
        fleet = self._fleet_receiver
        return [
            (m.HostInventory, fleet.on_inventory),
            (m.HostPresence, fleet.on_host_presence),
            (m.AgentPresence, fleet.on_agent_presence),
            (m.CoordinatorPresence, self.leadership.on_coordinator),
            (m.SetDocument, self._reconciler.on_document),
            (m.RolloutState, self._reconciler.on_rollout),
            (m.OperationReported, self._on_fact),
            (m.VmClockSynced, self._on_fact),
            (m.VmReady, self._on_fact),
            (m.EventApproved, self._on_approval),
            (m.VmApproved, self._on_approval),
            (m.VmOwner, fleet.on_owner),
            (m.RolloutRequested, self.requests.on_request),
            (m.FreezeRequested, self.requests.on_request),
            (m.AbortRequested, self.requests.on_request),
            (m.ResumeRequested, self.requests.on_request),
        ]

    def _host_epochs(self) -> list[int]:
        return self.fleet.epochs()

    def _on_tick(self, now_s: float) -> None:
        self._fleet_receiver.log_incomplete(now_s)

    def _wants(self, message: Message) -> bool:
        return not isinstance(message, m.ReportPart) or self.repository.commanded(message.operation)

    async def _deliver(self, delivery: Delivery) -> None:
        await self.commits.writable()
        plans = self.requests.plans
        await self.post.deliver(delivery)
        if self.requests.plans != plans:
            self._unread = self.bus.stats.unhandled
        elif self._unread:
            self._unread -= 1
            if not self._unread:
                self._dispatcher.wake()

    async def _on_refused(self, delivery: Delivery, error: ContractError) -> None:
        if self.shared is None or self.is_leader:
            await self.requests.on_refused(delivery, error)

    async def _on_fact(self, fact: m.OperationReported | m.VmClockSynced | m.VmReady, _: Received) -> None:
        self._dispatcher.dispatch(fact)

    async def _on_approval(self, approval: m.EventApproved, _: Received) -> None:
        _log.info("event.approved", event_id=approval.event_id, vm=approval.vm)
        self._dispatcher.dispatch(Approve(event_id=approval.event_id, by=approval.vm))
