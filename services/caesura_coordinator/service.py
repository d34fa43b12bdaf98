"""The coordinator's shell: messages in, decisions stored, commands repeated, facts drained from the outbox."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import structlog

from caesura.bus.messaging import MessageClient
from caesura.bus.port import Bus, Delivery, Will
from caesura.bus.presence import Presence, last_will
from caesura.contract import messages as m
from caesura.contract.codec import MAX_PAYLOAD_BYTES, ContractError, Received, request_in, size_bytes
from caesura.contract.envelope import Message, source_of
from caesura.contract.names import is_name
from caesura.contract.reasons import ReasonCode
from caesura.contract.topics import PREFIX, channel_of
from caesura.delivery.message import clearing
from caesura.delivery.policy import EVERY, NEWEST
from caesura.delivery.publisher import ReliablePublisher
from caesura.delivery.sqlite import beside
from caesura.fleet.fold import Changes, apply
from caesura.fleet.state import FleetState
from caesura.lifecycle.commands import COMMANDS
from caesura.lifecycle.epoch import epoch_floor, leaps
from caesura.lifecycle.errors import IllegalStatusChange
from caesura.runtime.errors import CaesuraError, StoreError, SyncFailed
from caesura.runtime.group_commit import GroupCommit
from caesura.runtime.identity import new_id
from caesura.runtime.sampler import Sampler
from caesura_coordinator.fleet import FleetFence, why_outdated
from caesura_coordinator.inputs import Abort, Approve, Authority, Fact, Input, RequestRefused, Resume, Tick
from caesura_coordinator.owner_records import OwnerRecords
from caesura_coordinator.owners import Owners
from caesura_coordinator.plan import make_plan, most_targets, nothing_to_do, sets_of
from caesura_coordinator.records import Rollout, largest_states, new_rollout
from caesura_coordinator.repository import Removal, RolloutRepository
from caesura_coordinator.responses import REASON_CHARACTERS, with_plan
from caesura_coordinator.rollout import RESTART_GRACE_S
from caesura_coordinator.sender import CommandSender
from caesura_coordinator.store import Store, SyncedOutbox
from caesura_coordinator.validation import request_expired

TICK_S = 0.2
_ANNOUNCE_S = 20.0
"""s: between two announcements of an unchanged presence. A last will needs a broker: if it stopped together with the
coordinator, the presence stays online indefinitely, so readers must treat silence as offline (as with the hosts' inventories)."""

_REPEAT_PARTS_S = 5.0
"""s: between two sendings of a stored answer with a large plan."""
_LARGE_PLAN_VMS = 300
_INCOMPLETE_S = 10.0
"""s: after which a host whose inventory lacks parts is named."""

_ANNOUNCED_KEPT = 10
ABOVE_OURS = (
    "nothing is paused in its sets. Is another coordinator running? If not, restart this one: it claims a higher epoch. If "
    "that does not help, see 'An epoch that nobody claimed' in docs/operate/runbooks/epoch.md"
)
_SETTLE_AT_MOST_S = 30.0
_ANSWER_S = 5.0
"""s: for the broker to acknowledge a message of the outbox."""
_FLUSH_S = 3.0
"""s: for the last messages on a stop signal; the rest is published at the next start."""
_log = structlog.get_logger("caesura.coordinator")

Request = m.RolloutRequested | m.FreezeRequested | m.AbortRequested | m.ResumeRequested


def _too_large(message: Message, rollout: Rollout) -> str:
    """Why a rollout cannot be announced, derived from the message that would be too large."""
    size = f"{size_bytes(message)} bytes of {MAX_PAYLOAD_BYTES}"
    match message:
        case m.WaveState():
            return (
                f"wave {message.wave + 1} with {len(message.vms)} VMs is too large to be announced ({size}): allow fewer hosts in "
                "a wave (--max-hosts), or select fewer sets at a time"
            )
        case m.EventChanged():
            return (
                f"set {message.set} has {len(message.resources)} VMs in one wave, too many for its scheduled event ({size}): allow "
                "fewer hosts in a wave (--max-hosts), or put its VMs in more sets or domains"
            )
        case _:
            return (
                f"a rollout over {len(rollout.sets)} sets in {len(rollout.waves)} waves is too large to be announced ({size}): select "
                "fewer sets at a time"
            )


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


def presence(authority: Authority, *, online: bool) -> m.CoordinatorPresence:
    """The coordinator's presence, also as its last will."""
    return m.CoordinatorPresence(
        coordinator=authority.coordinator, epoch=authority.epoch, online=online, commands=COMMANDS
    )


def will(authority: Authority, fleet: str) -> Will:
    """What the broker publishes when the coordinator's connection is lost."""
    source = source_of(fleet, "coordinator", authority.coordinator)
    return last_will(presence(authority, online=False), source)


class Coordinator:
    """One coordinator on one bus with one store."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        *,
        instance: str,
        settle_s: float,
        fleet: str = "default",
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        announce_s: float = _ANNOUNCE_S,
        commits: GroupCommit | None = None,
    ) -> None:
        self.bus = bus
        self.store = store
        self.post = MessageClient(
            bus, source_of(fleet, "coordinator", instance), on_refused=self._on_refused, wanted=self._wants
        )
        store.write_as(self.post.source)
        self.commits = commits or GroupCommit(store.database)
        """No effect of a commit leaves the process before this covers it."""
        self.outbox = SyncedOutbox(beside(store.database.path), self.commits)
        self.publisher = ReliablePublisher(bus, self.outbox, answer_s=_ANSWER_S)
        """The publisher of everything that is stored first."""
        self._owner_publisher = ReliablePublisher(bus, answer_s=_ANSWER_S)
        self.book = RolloutRepository(store, now())
        self.state = FleetState()
        """The fold of the bus; only the event loop changes or reads it."""
        self._incomplete: dict[str, m.HostInventory] = {}
        """Maps a host to its newest inventory, of which parts are missing."""
        self._incomplete_since: dict[str, float] = {}
        self.fleet = FleetFence(self.state, incomplete=self._incomplete)
        self.owners = Owners(store, self.state)
        self._owner_records = OwnerRecords(
            self.owners,
            self._owner_publisher,
            self.commits,
            source=self.post.source,
            leads=lambda: self.leads,
        )
        self.sender = CommandSender(
            self.book, self.post, self.commits, lambda: self.authority if self.leads else None
        )
        self.authority = Authority(coordinator=f"{instance}-{new_id()[:8]}", epoch=0)
        self._claimed = False
        self._announced: list[int] = []
        """Epochs that coordinators had claimed on the bus before ours was."""
        self._settle_s = settle_s
        self._presence = Presence(
            self.post,
            lambda: presence(self.authority, online=True),
            lambda: presence(self.authority, online=False),
            beat_s=announce_s,
        )
        self._now = now
        self._to_remove: list[Removal] = []
        self._republish_due = False
        self._repeated: dict[tuple[str, str], float] = {}
        """Maps a client and request to when an answer in parts was last sent."""
        self._pending_requests: list[tuple[str, Request, str]] = []
        self._pending_facts: list[Fact] = []
        self._pending_documents: dict[str, tuple[m.SetDocument, str]] = {}
        self._pending_rollouts: dict[str, m.RolloutState] = {}
        self._last_errors: dict[str, str] = {}
        """Maps a rollout to why its last step failed: logged once, not with every message."""
        self._outbox_filled, self._changed = asyncio.Event(), asyncio.Event()
        self._stirred: set[str] = set()
        """Sets that changed since their rollouts were last evaluated."""
        self._commands_due = False
        self._sampler = Sampler()
        self._contested = asyncio.Event()
        """Another coordinator has claimed this one's epoch."""
        self._superseded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.commits.listeners.append(self._on_synced)
        for kind, receiver in self._receivers():
            # Of other coordinators' rollouts only the existence matters, not the content of their waves.
            self.post.subscribe(kind, receiver, whole=kind is not m.RolloutState)
        self.post.listeners.append(self._on_any)
        self.post.on_tombstone(m.HostInventory, self._on_host_removed)
        self.post.on_tombstone(m.VmOwner, self._on_owner_removed)

    def tasks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Maps a name to an eternal task, for ``serve``."""
        return {
            "bus": lambda: self.bus.run(self._deliver, self._on_connected, self.commits),
            "rollouts": self._rollouts,
            "outbox": self._outbox,
            "authority": self._watch_authority,
            "presence": lambda: self._presence.run(lambda: self.leads and self.bus.stats.connected),
            "owners": self._owner_records.run,
            "publisher": self.publisher.run,
            "owner publisher": self._owner_publisher.run,
            "store": self.commits.run,
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

    async def drain(self) -> None:
        """Publish the decisions, then say goodbye. Rollouts keep their state for the next start."""
        # A superseded coordinator publishes nothing more: its documents are older than those of the other.
        if self.leads and self.bus.stats.connected:
            try:
                async with asyncio.timeout(_FLUSH_S):
                    await self.commits.reached()
            except (SyncFailed, TimeoutError) as error:
                _log.error(
                    "outbox.not_on_disk",
                    messages=self.store.unread,
                    why=str(error) or "the disk does not answer",
                )
            self._hand_over()
            if not await self.publisher.drained(_FLUSH_S):
                _log.warning("outbox.left", messages=len(self.publisher))
            await self._presence.goodbye(timeout_s=2.0)
        await self.bus.close()

    # -- authority --

    @property
    def leads(self) -> bool:
        """Whether an epoch is claimed and no coordinator has claimed a higher one."""
        return self._claimed and not self._superseded.done()

    async def _watch_authority(self) -> None:
        """Claim an epoch above every one received, then stand down when another coordinator claims a higher one."""
        while not await self.bus.wait_connected(60):
            _log.warning("coordinator.waiting_for_broker", why=self.bus.stats.last_error)
        await self._settled()
        await self._claim()
        self.owners.lead(self.authority.epoch)
        self._owner_records.changed()
        documents, self._pending_documents = self._pending_documents, {}
        for document, source in documents.values():
            self._take_document(document, source)
        self._open_sets(self.state.sets())
        # Messages received in the meantime are processed before time passes: nothing is awaited until then.
        rollouts, self._pending_rollouts = self._pending_rollouts, {}
        for rollout in rollouts.values():
            self._take_rollout(rollout)
        facts, self._pending_facts = self._pending_facts, []
        for fact in facts:
            self._give(fact)
        early, self._pending_requests = self._pending_requests, []
        for client, request, late in early:
            self._answer(client, request, late)
        await self._announce()
        await self.commits.writable()
        if self.leads:
            self._republish()  # the broker may have lost retained messages while this one was disconnected
        self._changed.set()
        await self._claim_above_equals()

    async def _claim_above_equals(self) -> None:
        """Claim again whenever another has the same epoch; until a higher one is claimed.

        Raises:
            Superseded: a higher one was claimed.
        """
        while True:
            await self._unless_superseded(self._contested.wait())
            await self._unless_superseded(self._claim())
            self._contested.clear()  # conflicts about the previous epoch are settled
            await self._announce()

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

    async def _settled(self) -> None:
        """Wait for the retained messages: they arrive in any order, and no message marks the end.

        A large fleet's inventories take longer than the configured time: then the wait lasts as long as messages are queued for us.
        """
        await asyncio.sleep(self._settle_s)
        end = asyncio.get_running_loop().time() + _SETTLE_AT_MOST_S
        # The bus counts its backlog but does not signal changes of it.
        while self.bus.stats.backlog and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110
            await asyncio.sleep(TICK_S)

    async def _claim(self) -> None:
        """Claim an epoch above every known one, stored on disk before it is published. Until then the old authority, if any, remains in force."""
        stored, claimed = max(self.store.epoch(), self.authority.epoch), 0
        # The same epoch, or a higher one, may arrive during the wait for the disk.
        while (known := epoch_floor(stored, self._announced, self.fleet.epochs())) >= claimed:
            claimed = known + 1
            if claimed > m.EPOCH_MOST:
                raise NoEpochLeft(self.store.database.path)
            await self.commits.writable()
            self.store.save_epoch(claimed)
            await self.commits.reached()
            if self._superseded.done():
                return
        self.authority = msgspec.structs.replace(self.authority, epoch=claimed)
        self._claimed = True
        _log.info("coordinator.claimed", epoch=claimed, coordinator=self.authority.coordinator)

    async def _announce(self) -> None:
        await self._presence.announce(timeout_s=2.0)

    async def _on_connected(self) -> None:
        if self.bus.stats.connects > 1:
            # The broker's retained presences of agents are outdated; each agent reconnects in its own time.
            self.fleet = self.fleet.with_reconnect_grace(self._now() + timedelta(seconds=RESTART_GRACE_S))
        if not self.leads:
            return
        self.owners.reconnected()
        self._owner_records.changed()
        await self._announce()
        await self.commits.writable()
        if self.leads:  # another claim may have arrived in the meantime
            self._republish()

    def _republish(self) -> None:
        """Publish the retained state on the bus again."""
        try:
            self._to_remove += self.book.republish()
            self._republish_due = False
        except StoreError as error:
            if not self._republish_due:
                _log.error("coordinator.not_republished", why=str(error))
            self._republish_due = True  # retried with the next tick
        self._outbox_filled.set()

    def _remove(self, removals: Iterable[Removal]) -> None:
        """Remove from the bus what must no longer be visible."""
        for each in removals:
            for wave in range(each.waves):
                self._clear(m.WaveState, rollout=each.rollout, wave=wave)
            if each.whole:
                self._clear(m.RolloutState, rollout=each.rollout)

    def _clear(self, kind: type[Message], **parameters: str | int) -> None:
        self.publisher.put(clearing(kind, event_id=new_id(), **parameters), policy=NEWEST)

    def _open_sets(self, sets: Iterable[str]) -> None:
        # Not before the epoch is claimed: a document that is already on the bus must be received first.
        if not self._claimed:
            return
        try:
            if self.book.ensure_documents(sets):
                self._outbox_filled.set()
        except StoreError as error:
            _log.error("coordinator.store_failed", why=str(error))  # retried with the next inventory

    def _on_claim(self, epoch: int, coordinator: str, *, alive: bool = False) -> None:
        """Stand down for a higher epoch; at an equal one, one of the two claims a higher one."""
        mine = self.authority
        if coordinator == mine.coordinator:
            return
        if not self._claimed:
            self._announced = sorted({*self._announced, epoch})[-_ANNOUNCED_KEPT:]
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
                    "Run one coordinator, or let a standby take over only when the first is stopped."
                )
            )

    # -- incoming messages --

    def _receivers(self) -> list[tuple[type, Callable[..., Awaitable[None]]]]:
        return [
            (m.HostInventory, self._on_inventory),
            (m.HostPresence, self._on_host_presence),
            (m.AgentPresence, self._on_agent_presence),
            (m.CoordinatorPresence, self._on_coordinator),
            (m.SetDocument, self._on_document),
            (m.RolloutState, self._on_rollout),
            (m.OperationReported, self._on_report),
            (m.VmClockSynced, self._on_clock),
            (m.VmReady, self._on_ready),
            (m.EventApproved, self._on_approval),
            (m.VmApproved, self._on_approval),
            (m.VmOwner, self._on_owner),
            (m.RolloutRequested, self._on_request),
            (m.FreezeRequested, self._on_request),
            (m.AbortRequested, self._on_request),
            (m.ResumeRequested, self._on_request),
        ]

    def _wants(self, message: Message) -> bool:
        return not isinstance(message, m.ReportPart) or self.book.commanded(message.operation)

    async def _deliver(self, delivery: Delivery) -> None:
        await self.commits.writable()
        await self.post.deliver(delivery)

    async def _on_any(self, received: Received) -> None:
        inventory = received.message
        if isinstance(inventory, m.HostInventory) and inventory.part_etags:
            # Until it is complete, which it may be at once.
            self._incomplete[inventory.host] = inventory
            self._incomplete_since.setdefault(inventory.host, self._loop_s())

    def _complete(self, host: str) -> None:
        self._incomplete.pop(host, None)
        self._incomplete_since.pop(host, None)

    def _say_incomplete(self, now_s: float) -> None:
        """Log the hosts whose inventory stays incomplete."""
        for host, since in self._incomplete_since.items():
            if now_s - since > _INCOMPLETE_S and self._sampler.due(f"incomplete {host}") is not None:
                _log.error(
                    "inventory.incomplete",
                    host=host,
                    seconds=round(now_s - since),
                    advice="nothing is paused in its sets, and if it was not known before in none. Its host updater publishes the parts when it connects: restart it",
                )

    async def _on_inventory(self, inventory: m.HostInventory, _: Received) -> None:
        self._complete(inventory.host)
        # The epoch that a host obeys is not a claim: it counts for our next claim, and blocks this host's sets until then.
        before = self.state.reported(inventory.host)
        if (
            self.leads
            and inventory.epoch > self.authority.epoch
            and (before is None or before.epoch != inventory.epoch)
            and (left_out := self._sampler.due(inventory.host)) is not None
        ):
            _log.error(
                "inventory.epoch_above_ours",
                host=inventory.host,
                left_out=left_out,
                epoch=inventory.epoch,
                coordinator=inventory.coordinator,
                ours=self.authority.epoch,
                advice=ABOVE_OURS,
            )
        if (outdated := why_outdated(inventory)) and (
            before is None or before.commands != inventory.commands
        ):
            _log.error("host.outdated", host=inventory.host, why=outdated)
        self._take_in(self.owners.reported(inventory, self._loop_s()))
        # Storing the document is retried.
        self._open_sets(self.state.sets_of_host(inventory.host))

    def _take_in(self, changes: Changes) -> None:
        """The fleet changed: the sets concerned get their documents, and their rollouts are evaluated again."""
        self._owner_records.changed()
        self._open_sets(name for name in changes.sets if self.state.set_index(name).vms)
        if changes.sets:
            self._stirred |= changes.sets
            self._changed.set()

    @staticmethod
    def _loop_s() -> float:
        return asyncio.get_running_loop().time()

    async def _on_host_removed(self, parameters: Mapping[str, str]) -> None:
        """An operator removed the retained messages of a host: it was taken out of service permanently."""
        host = parameters["host"]
        self._complete(host)
        if self.fleet.is_online(host):
            _log.warning("host.not_forgotten", host=host, why="it is on the bus, and will report again")
            return
        self._take_in(self.owners.forgotten(host, self._loop_s()))
        _log.info("host.forgotten", host=host)

    async def _on_host_presence(self, presence: m.HostPresence, _: Received) -> None:
        self._take_in(self.owners.seen(presence, self._loop_s()))

    async def _on_owner(self, owner: m.VmOwner, _: Received) -> None:
        self.owners.heard(owner.vm, owner)
        self._owner_records.changed()

    async def _on_owner_removed(self, parameters: Mapping[str, str]) -> None:
        self.owners.heard(parameters["vm"], None)
        self._owner_records.changed()

    async def _on_agent_presence(self, presence: m.AgentPresence, _: Received) -> None:
        changes = apply(self.state, presence, self._loop_s())[1]
        self._take_in(changes)

    async def _on_coordinator(self, heard: m.CoordinatorPresence, _: Received) -> None:
        self._on_claim(heard.epoch, heard.coordinator, alive=heard.online)
        if self.leads and heard != presence(self.authority, online=True):
            await self._announce()  # the will of an older coordinator must not stay as the last message

    async def _on_document(self, document: m.SetDocument, received: Received) -> None:
        # A coordinator that does not lead must not end another's event: the other may be alive and end it itself.
        if self.leads:
            self._take_document(document, received.header.source)
        elif not self._claimed:
            self._pending_documents[document.set] = document, received.header.source

    def _take_document(self, document: m.SetDocument, source: str) -> None:
        try:
            self.book.adopt(document, self.fleet, self.authority, self._now())
            # Our own documents are echoed to us, and may be older than a later decision; another's must not stay.
            if source != self.post.source:
                self.book.republish_above(document)
        except StoreError as error:
            _log.error("document.not_taken", set=document.set, why=str(error))
        self._outbox_filled.set()

    async def _on_rollout(self, rollout: m.RolloutState, received: Received) -> None:
        if self.leads:
            self._take_rollout(rollout)
            if received.header.source != self.post.source:
                self._heal(rollout)
        elif not self._claimed:
            self._pending_rollouts[rollout.rollout] = rollout

    def _heal(self, rollout: m.RolloutState) -> None:
        """Another coordinator, perhaps one that was suspended, published one of our rollouts: its version must not stay."""
        try:
            self.book.heal(rollout)
        except StoreError as error:
            _log.error("rollout.not_reasserted", rollout=rollout.rollout, why=str(error))

    def _take_rollout(self, rollout: m.RolloutState) -> None:
        removal = self.book.outlived(rollout)
        try:
            self.book.abort_orphan(rollout, self._now())
        except StoreError as error:
            _log.error("rollout.not_ended", rollout=rollout.rollout, why=str(error))
        if removal is not None:
            self._to_remove.append(removal)
        self._outbox_filled.set()

    async def _on_report(self, report: m.OperationReported, _: Received) -> None:
        self._give(report)

    async def _on_clock(self, verdict: m.VmClockSynced, _: Received) -> None:
        self._give(verdict)

    async def _on_ready(self, answer: m.VmReady, _: Received) -> None:
        self._give(answer)

    async def _on_approval(self, approval: m.EventApproved, _: Received) -> None:
        _log.info("event.approved", event_id=approval.event_id, vm=approval.vm)
        self._give(Approve(event_id=approval.event_id, by=approval.vm))

    async def _on_request(self, request: Request, received: Received) -> None:
        client = received.parameters["client"]
        # An abort is never too late: it only stops operations.
        late = (
            ""
            if isinstance(request, m.AbortRequested)
            else request_expired(received.header.time, self._now())
        )
        if self._claimed:
            self._answer(client, request, late)
        else:
            self._pending_requests.append((client, request, late))

    async def _on_refused(self, delivery: Delivery, error: ContractError) -> None:
        """An operator's request that violates the contract is answered too, if its topic names the client."""
        parts = delivery.topic.removeprefix(PREFIX + "/").split("/")
        if len(parts) == 3 and parts[0] == "ctl" and is_name(parts[1]):
            answer = m.RequestAnswered(
                request=request_in(delivery.payload) or "unreadable",
                accepted=False,
                reason=f"the coordinator cannot read this request; is it of a newer version? {error}"[:1000],
                codes=("message_invalid",),
            )
            try:
                self.book.store_response(parts[1], answer)
            except StoreError as failed:
                _log.error("request.failed", client=parts[1], why=str(failed))
            self._outbox_filled.set()

    # -- decisions --

    def _give(self, fact: Fact) -> None:
        """Pass a fact to the rollout that it is about; a fact about no active rollout is not ours, or late."""
        if not self._claimed:
            self._pending_facts.append(fact)  # a persistent session may deliver before the epoch is claimed
            return
        rollout = self.book.rollout_of(fact)
        if rollout is not None:
            self._step(rollout, fact)

    def _step(self, rollout: Rollout, received: Input) -> None:
        if self._superseded.done():
            return
        try:
            changed = self.book.step(rollout, received, self.fleet, self.authority, self._now())
        except CaesuraError as error:  # its state is unchanged: the others must not wait for it
            if self._last_errors.get(rollout.id) != str(error):
                _log.error("rollout.not_moved", why=str(error), rollout=rollout.id)
            self._last_errors[rollout.id] = str(error)
            return
        self._last_errors.pop(rollout.id, None)
        if changed is not rollout:
            self._outbox_filled.set()
        if changed.stage != rollout.stage:
            self._commands_due = True
            self._changed.set()

    async def _rollouts(self) -> None:
        """Advance the time of every rollout, and repeat unanswered commands.

        Changes of the fleet that arrived together are evaluated once, and only by the rollouts of the sets concerned.
        """
        last = float("-inf")
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            await self.commits.writable()
            if not self.leads:
                continue
            due = self._loop_s() - last >= TICK_S
            if due:
                last = self._loop_s()
                if self._republish_due:
                    self._republish()
                self._say_incomplete(last)
            stirred, self._stirred = self._stirred, set()
            for rollout in self.book.active if due else self.book.holding(stirred):
                self._step(rollout, Tick())
            if due or self._commands_due:
                self._commands_due = False
                if not await self.sender.send():
                    self._commands_due = True
                    self._changed.set()
                elif self.sender.held:
                    self.commits.start()

    def _on_synced(self) -> None:
        """More commits are on disk."""
        if self.sender.held:
            self._commands_due = True
            self._changed.set()

    def _answer(self, client: str, request: Request, late: str) -> None:
        """Answer a request once; a repeated one gets the stored answer again. ``late``: why a new request is too late."""
        try:
            known = self.store.answer(client, request.request)
            if known is not None:
                self._repeat(client, known)
            elif self.leads and late:
                _log.warning("request.outlived", client=client, request=request.request, why=late)
                self._refuse(client, request, "request_late", late)
            elif self.leads:
                self._decide_request(client, request)
        except StoreError as error:
            _log.error("request.failed", request=request.request, why=str(error))
        self._outbox_filled.set()
        self._changed.set()

    def _repeat(self, client: str, answer: m.RequestAnswered) -> None:
        """Send a stored answer again. An answer in parts is not sent with every repetition: it may have megabytes, and delays everything behind it."""
        now_s = self._loop_s()
        self._repeated = {key: at for key, at in self._repeated.items() if now_s - at < _REPEAT_PARTS_S}
        if (client, answer.request) in self._repeated:
            return
        if answer.plan is not None and sum(len(wave.vms) for wave in answer.plan.waves) > _LARGE_PLAN_VMS:
            self._repeated[client, answer.request] = now_s
        self.book.repeat_answer(client, answer)

    def _decide_request(self, client: str, request: Request) -> None:
        try:
            match request:
                case m.RolloutRequested():
                    self._plan_or_start(client, request, request.update, 0.0)
                case m.FreezeRequested():
                    self._plan_or_start(client, request, "", request.hold_s)
                case m.AbortRequested():
                    self._steer(client, request, Abort(reason=request.reason))
                case m.ResumeRequested():
                    self._steer(client, request, Resume())
        except StoreError:
            raise
        except RequestRefused as error:
            self._refuse(client, request, error.code, str(error))
        except IllegalStatusChange as error:
            self._refuse(client, request, "rollout_state", str(error))

    def _refuse(self, client: str, request: Request, code: ReasonCode, why: str) -> None:
        answer = m.RequestAnswered(
            request=request.request, accepted=False, reason=why[:REASON_CHARACTERS], codes=(code,)
        )
        self.book.store_response(client, answer)

    def _plan_or_start(
        self, client: str, request: m.RolloutRequested | m.FreezeRequested, update: str, hold_s: float
    ) -> None:
        fleet = self.fleet.with_contested(self.owners.contested())
        plan = make_plan(
            fleet,
            update=update,
            selection=request.selection,
            policy=request.policy,
            limits=request.limits,
            hold_s=hold_s,
        )
        reason = "; ".join(f"{each.subject}: {each.reason}" for each in plan.refusals)
        codes = tuple(dict.fromkeys(each.code for each in plan.refusals))
        if not reason and (reason := most_targets(plan)):
            codes = ("too_large",)
        held = self.book.holder(sets_of(plan))
        if held and not request.plan_only:
            reason = f"set {held[0]} is held by rollout {held[1]}: wait for its end, resume or abort it"
            codes = ("set_held",)
        if reason or request.plan_only or not plan.waves:
            note = nothing_to_do(plan)
            if note and not reason:
                codes = ("nothing_to_do",)
            answer = with_plan(request.request, plan, reason, codes, note=note)
            self.book.store_response(client, answer)
            return
        now = self._now()
        rollout = new_rollout(
            f"{now:%Y%m%d-%H%M%S}-{new_id()[:4]}",
            plan,
            policy=request.policy,
            set_hosts=tuple(sorted(self.fleet.hosts_of(sets_of(plan)))),
            requested_by=client,
            now=now,
        )
        answer = with_plan(request.request, plan, "", (), rollout=rollout.id)
        largest = max(largest_states(rollout), key=size_bytes)
        if size_bytes(largest) > MAX_PAYLOAD_BYTES:
            raise RequestRefused("too_large", _too_large(largest, rollout))
        self.book.add(rollout, client, answer)
        _log.info("rollout.started", rollout=rollout.id, update=update, waves=len(plan.waves), client=client)
        try:
            self.book.forget()
        except StoreError as error:
            _log.error("rollout.not_forgotten", why=str(error))

    def _steer(self, client: str, request: m.AbortRequested | m.ResumeRequested, received: Input) -> None:
        active = self.book.active
        known = ", ".join(each.id for each in active) or "none"
        if request.rollout:
            rollout = self.book.rollouts.get(request.rollout)
            if rollout is None:
                raise RequestRefused("rollout_unknown", f"no rollout {request.rollout!r}; not ended: {known}")
        elif len(active) == 1:
            rollout = active[0]
        else:
            raise RequestRefused(
                "rollout_unknown",
                f"several rollouts have not ended, name one: {known}"
                if active
                else "no rollout is under way: all have ended",
            )
        answer = m.RequestAnswered(request=request.request, accepted=True, rollout=rollout.id)
        self.book.step(rollout, received, self.fleet, self.authority, self._now(), answer=(client, answer))
        self._commands_due = True

    # -- outgoing messages --

    async def _outbox(self) -> None:
        """Pass what is on disk to the publisher, as soon as there is an epoch to publish it under."""
        loaded = False
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            if not self.leads:
                continue
            removals, self._to_remove = self._to_remove, []
            await self.commits.reached()
            if self._superseded.done():
                continue  # only the other coordinator may publish it
            if not loaded:
                try:
                    await self.publisher.load()
                except StoreError as error:
                    _log.error("outbox.not_loaded", why=str(error))
                    self._to_remove = [*removals, *self._to_remove]
                    await asyncio.sleep(TICK_S)
                    self._outbox_filled.set()
                    continue
                loaded = True
            self.store.left_over = 0
            self._hand_over()
            self._remove(removals)  # after messages of a previous run about the same rollouts

    def _hand_over(self) -> None:
        for message in self.store.stored(self.commits.on_disk):
            self.publisher.put(message, policy=NEWEST if message.retain else EVERY)

    def waiting(self) -> int:
        """Stored messages, including those that the broker has just accepted."""
        return self.store.left_over + len(self.publisher) + self.publisher.unremoved + self.store.unread
