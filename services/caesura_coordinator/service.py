"""The coordinator's shell: messages in, decisions stored, commands repeated, facts drained from the outbox."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial

import msgspec
import structlog

from caesura.bus.port import Bus, BusError, PublishRefused, Will
from caesura.bus.post import Post
from caesura.bus.presence import Presence, last_will
from caesura.contract import messages as m
from caesura.contract.codec import MAX_PAYLOAD_BYTES, ContractError, Received, size_bytes
from caesura.contract.envelope import Message, source_of
from caesura.contract.names import is_name
from caesura.contract.reasons import ReasonCode
from caesura.contract.topics import PREFIX, TopicError, channel_of
from caesura.delivery.message import OutboxMessage, clearing, prepare
from caesura.delivery.policy import EVERY, NEWEST
from caesura.delivery.publisher import ReliablePublisher
from caesura.delivery.sqlite import SqliteOutbox, beside
from caesura.lifecycle.epoch import epoch_floor, leaps
from caesura.lifecycle.errors import IllegalTransition
from caesura.runtime.errors import CaesuraError, StoreError
from caesura.runtime.identity import new_id
from caesura.runtime.sampler import Sampler
from caesura_coordinator.admission import outlived
from caesura_coordinator.answers import REASON_CHARACTERS, with_plan
from caesura_coordinator.book import Book
from caesura_coordinator.commands import due_commands
from caesura_coordinator.fleet import Fleet
from caesura_coordinator.inputs import Abort, Approve, Authority, Input, RequestRefused, Resume, Tick
from caesura_coordinator.owners import Owners
from caesura_coordinator.plan import make_plan, most_targets, nothing_to_do, sets_of
from caesura_coordinator.records import largest_state, new_rollout
from caesura_coordinator.rollout import RESTART_GRACE_S
from caesura_coordinator.store import Store

TICK_S = 0.2
_REPEAT_S = 2.0
"""s: between two sendings of a command that its host has not answered."""

_ANNOUNCE_S = 20.0
"""s: between two announcements of an unchanged presence. A last will needs a broker: one that stopped with the
coordinator says it is online for ever, so its silence has to tell (the hosts' inventories do the same)."""

_ANNOUNCED_KEPT = 10
ABOVE_OURS = (
    "nothing is paused in its sets. Is another coordinator at work? If none is, restart this one: it claims an epoch above. If "
    "that changes nothing, see 'An epoch that nobody claimed' in docs/operations.md"
)
_SETTLE_AT_MOST_S = 30.0
_ANSWER_S = 5.0
"""s: for the broker to acknowledge a message of the outbox."""
_FLUSH_S = 3.0
"""s: for the last messages when told to stop; what is left is published at the next start."""
_log = structlog.get_logger("caesura.coordinator")

Request = m.RolloutRequested | m.FreezeRequested | m.AbortRequested | m.ResumeRequested


class NoEpochLeft(CaesuraError):
    """There is no epoch above the one in the store, or above what the bus shows to an empty store."""

    def __init__(self, store: str) -> None:
        super().__init__(
            f"there is no epoch above the one that {store} or the bus has: it was claimed by nobody. See 'An epoch that nobody "
            "claimed' in docs/operations.md."
        )


class Superseded(CaesuraError):
    """Another coordinator has claimed a higher epoch; this one has no authority any more."""

    exit_code = 3


def subscriptions() -> list[str]:
    """The filters that the coordinator needs."""
    kinds = (
        m.HostInventory,
        m.HostPresence,
        m.OperationReported,
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
    return m.CoordinatorPresence(coordinator=authority.coordinator, epoch=authority.epoch, online=online)


def will(authority: Authority, fleet: str) -> Will:
    """What the broker publishes when the coordinator is gone."""
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
    ) -> None:
        self.bus = bus
        self.store = store
        self.post = Post(bus, source_of(fleet, "coordinator", instance), on_refused=self._on_refused)
        store.write_as(self.post.source)
        self.publisher = ReliablePublisher(bus, SqliteOutbox(beside(store.database.path)), answer_s=_ANSWER_S)
        """Of what is stored first."""
        self._owner_publisher = ReliablePublisher(bus, answer_s=_ANSWER_S)
        """Of whose VM it is: it follows from the store, and is so much after a reconnect that facts must not wait behind it."""
        self._owners_sent: dict[str, m.VmOwner | None] = {}
        """VM to what is on its way to the broker; None: its record's removal."""
        self.book = Book(store, now())
        self.fleet = Fleet()
        self.owners = Owners(store)
        self.authority = Authority(coordinator=f"{instance}-{new_id()[:8]}", epoch=0)
        self._claimed = False
        self._announced: list[int] = []
        """Epochs that coordinators had claimed on the bus before ours."""
        self._settle_s = settle_s
        self._presence = Presence(
            self.post,
            lambda: presence(self.authority, online=True),
            lambda: presence(self.authority, online=False),
            beat_s=announce_s,
        )
        self._now = now
        self._to_clear: list[str] = []
        self._early: list[tuple[str, Request, str]] = []
        self._early_facts: list[Input] = []
        self._early_documents: dict[str, tuple[m.SetDocument, str]] = {}
        self._early_rollouts: dict[str, m.RolloutState] = {}
        self._not_moved: dict[str, str] = {}
        """Rollout to why its last step failed: said once, not with every message."""
        self._outbox_filled = asyncio.Event()
        self._changed = asyncio.Event()
        self._owners_changed = asyncio.Event()
        self._sampler = Sampler()
        self._superseded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last_sent: dict[tuple[str, str], float] = {}
        for kind, receiver in self._receivers():
            self.post.on(kind, receiver)
        self.post.on_cleared(m.HostInventory, self._on_host_removed)
        self.post.on_cleared(m.VmOwner, self._on_owner_removed)

    def tasks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Name to eternal task, for ``serve``."""
        return {
            "bus": lambda: self.bus.run(self.post.deliver, self._on_connected),
            "rollouts": self._rollouts,
            "outbox": self._outbox,
            "authority": self._watch_authority,
            "presence": lambda: self._presence.run(lambda: self.leads and self.bus.stats.connected),
            "owners": self._publish_owners,
            "publisher": self.publisher.run,
            "owner publisher": self._owner_publisher.run,
        }

    def known(self, party: str) -> list[str]:
        """The names that are known of a party: they are still listened to when one that nobody knows floods."""
        match party:
            case "vm":
                return [vm.vm for _, vm in self.fleet.vms()]
            case "host":
                return list(self.fleet.inventories)
            case _:
                return []

    async def drain(self) -> None:
        """Say what is decided, say goodbye. Rollouts stay where they are, for the next start."""
        # One that was superseded says nothing more: its documents are older than what the other has published.
        if self.leads and self.bus.stats.connected:
            self._hand_over()
            if not await self.publisher.drained(_FLUSH_S):
                _log.warning("outbox.left", messages=len(self.publisher))
            await self._presence.goodbye(timeout_s=2.0)
        await self.bus.close()

    # -- authority --

    @property
    def leads(self) -> bool:
        """Whether an epoch is claimed and nobody has claimed a higher one."""
        return self._claimed and not self._superseded.done()

    async def _watch_authority(self) -> None:
        """Claim an epoch above every one heard, then stand down when somebody claims a higher one."""
        while not await self.bus.wait_connected(60):
            _log.warning("coordinator.waiting_for_broker", why=self.bus.stats.last_error)
        await self._settled()
        self._claim()
        self.fleet = self.fleet.with_inventories(self.owners.lead(self.authority.epoch))
        self._owners_changed.set()
        documents, self._early_documents = self._early_documents, {}
        for document, source in documents.values():
            self._take_document(document, source)
        self._open_sets(vm.set for _, vm in self.fleet.vms())
        # What was heard meanwhile counts before time does: nothing is awaited until it is taken in.
        rollouts, self._early_rollouts = self._early_rollouts, {}
        for rollout in rollouts.values():
            self._end_unknown(rollout)
        facts, self._early_facts = self._early_facts, []
        for fact in facts:
            self._step_all(fact)
        early, self._early = self._early, []
        for client, request, late in early:
            self._answer(client, request, late)
        await self._announce()
        await self._republish()  # the broker may have lost what is retained while this one was away
        self._changed.set()
        await self._superseded

    async def _settled(self) -> None:
        """Wait for what is retained: it arrives in any order, and there is no last one to await.

        A large fleet's inventories take longer than the time set: then as long as messages still wait for us.
        """
        await asyncio.sleep(self._settle_s)
        end = asyncio.get_running_loop().time() + _SETTLE_AT_MOST_S
        # The bus keeps count of its backlog but announces nothing about it.
        while self.bus.stats.backlog and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110
            await asyncio.sleep(TICK_S)

    def _claim(self) -> None:
        stored = max(self.store.epoch(), self.authority.epoch)
        epoch = epoch_floor(stored, self._announced, self.fleet.epochs()) + 1
        if epoch > m.EPOCH_MOST:
            raise NoEpochLeft(self.store.database.path)
        self.store.save_epoch(epoch)
        self.authority = msgspec.structs.replace(self.authority, epoch=epoch)
        self._claimed = True
        _log.info("coordinator.claimed", epoch=epoch, coordinator=self.authority.coordinator)

    async def _announce(self) -> None:
        await self._presence.announce(timeout_s=2.0)

    async def _on_connected(self) -> None:
        if self.bus.stats.connects > 1:
            # The broker says of agents that they are there, as it last heard; each comes back in its own time.
            self.fleet = self.fleet.with_return(self._now() + timedelta(seconds=RESTART_GRACE_S))
        if not self.leads:
            return
        self.owners.reconnected()
        self._owners_changed.set()
        await self._announce()
        await self._republish()

    async def _republish(self) -> None:
        """Put what is retained on the bus again."""
        try:
            hidden = self.book.republish()
        except StoreError as error:
            _log.error("coordinator.not_republished", why=str(error))
            return
        self._to_clear += hidden
        self._outbox_filled.set()

    def _open_sets(self, sets: Iterable[str]) -> None:
        # Not before the epoch is claimed: a document that is already on the bus must be heard first.
        if not self._claimed:
            return
        try:
            if self.book.open_sets(sets):
                self._outbox_filled.set()
        except StoreError as error:
            _log.error("coordinator.store_failed", why=str(error))  # the next inventory brings it here again

    async def _on_claim(self, epoch: int, coordinator: str, *, alive: bool = False) -> None:
        """Stand down for a higher epoch; at an equal one, one of the two claims again above it."""
        mine = self.authority
        if coordinator == mine.coordinator:
            return
        if not self._claimed:
            self._announced = sorted({*self._announced, epoch})[-_ANNOUNCED_KEPT:]
        elif self._superseded.done() or epoch < mine.epoch:
            return
        elif leaps(mine.epoch, epoch):
            # No host obeys it either; ours is announced again, so that it does not stay retained.
            _log.error("coordinator.epoch_impossible", coordinator=coordinator, epoch=epoch, ours=mine.epoch)
        elif epoch == mine.epoch and not (alive and coordinator > mine.coordinator):
            # Both claimed it at once, and hosts may obey the other: were both to stand down, nobody would lead.
            self._claim()
            await self._announce()
        else:
            self._superseded.set_exception(
                Superseded(
                    f"coordinator {coordinator} has claimed epoch {epoch}, this one had {mine.epoch}: standing down. "
                    "Run one coordinator, or let a standby take over only when the first is stopped."
                )
            )

    # -- messages in --

    def _receivers(self) -> list[tuple[type, Callable[..., Awaitable[None]]]]:
        return [
            (m.HostInventory, self._on_inventory),
            (m.HostPresence, self._on_host_presence),
            (m.AgentPresence, self._on_agent_presence),
            (m.CoordinatorPresence, self._on_coordinator),
            (m.SetDocument, self._on_document),
            (m.RolloutState, self._on_rollout),
            (m.OperationReported, self._on_fact),
            (m.VmClockSynced, self._on_fact),
            (m.VmReady, self._on_fact),
            (m.EventApproved, self._on_approval),
            (m.VmApproved, self._on_approval),
            (m.VmOwner, self._on_owner),
            (m.RolloutRequested, self._on_request),
            (m.FreezeRequested, self._on_request),
            (m.AbortRequested, self._on_request),
            (m.ResumeRequested, self._on_request),
        ]

    async def _on_inventory(self, inventory: m.HostInventory, _: Received) -> None:
        # What a host obeys is no claim: it counts for the next claim of ours, and blocks this host's sets until then.
        before = self.fleet.inventories.get(inventory.host)
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
        counting = self.owners.reported(inventory)
        self.fleet = self.fleet.with_inventories(counting)
        self._owners_changed.set()
        self._open_sets(vm.set for each in counting for vm in each.vms)
        self._changed.set()

    async def _on_host_removed(self, parameters: Mapping[str, str]) -> None:
        """An operator removed what the broker retained of a host: it was taken out of service for good."""
        host = parameters["host"]
        if self.fleet.is_online(host):
            _log.warning("host.not_forgotten", host=host, why="it is on the bus, and reports again")
            return
        self.fleet = self.fleet.without_host(host).with_inventories(self.owners.forgotten(host))
        self._owners_changed.set()
        _log.info("host.forgotten", host=host)
        self._changed.set()

    async def _on_host_presence(self, presence: m.HostPresence, _: Received) -> None:
        released = self.owners.seen(presence.host, online=presence.online)
        self.fleet = self.fleet.with_host(presence.host, online=presence.online).with_inventories(released)
        self._owners_changed.set()
        self._changed.set()

    async def _on_owner(self, owner: m.VmOwner, _: Received) -> None:
        self.owners.heard(owner.vm, owner)
        self._owners_changed.set()

    async def _on_owner_removed(self, parameters: Mapping[str, str]) -> None:
        self.owners.heard(parameters["vm"], None)
        self._owners_changed.set()

    async def _on_agent_presence(self, presence: m.AgentPresence, _: Received) -> None:
        self.fleet = self.fleet.with_agent(presence.vm, online=presence.online)
        self._changed.set()

    async def _on_coordinator(self, heard: m.CoordinatorPresence, _: Received) -> None:
        await self._on_claim(heard.epoch, heard.coordinator, alive=heard.online)
        if self.leads and heard != presence(self.authority, online=True):
            await self._announce()  # an older one's will must not stay as the last word

    async def _on_document(self, document: m.SetDocument, received: Received) -> None:
        # Who does not lead ends no event of another: that one may be alive, and tell its end itself.
        if self.leads:
            self._take_document(document, received.header.source)
        elif not self._claimed:
            self._early_documents[document.set] = document, received.header.source

    def _take_document(self, document: m.SetDocument, source: str) -> None:
        try:
            self.book.adopt(document, self.fleet, self.authority, self._now())
            # Our own come back to us, and may be older than what was decided meanwhile; another's must not stay.
            if source != self.post.source:
                self.book.reassert(document)
        except StoreError as error:
            _log.error("document.not_taken", set=document.set, why=str(error))
        self._outbox_filled.set()

    async def _on_rollout(self, rollout: m.RolloutState, _: Received) -> None:
        if self.leads:
            self._end_unknown(rollout)
        elif not self._claimed:
            self._early_rollouts[rollout.rollout] = rollout

    def _end_unknown(self, rollout: m.RolloutState) -> None:
        try:
            self.book.end_unknown(rollout, self._now())
        except StoreError as error:
            _log.error("rollout.not_ended", rollout=rollout.rollout, why=str(error))
        self._outbox_filled.set()

    async def _on_fact(self, fact: m.OperationReported | m.VmClockSynced | m.VmReady, _: Received) -> None:
        self._step_all(fact)

    async def _on_approval(self, approval: m.EventApproved, _: Received) -> None:
        _log.info("event.approved", event_id=approval.event_id, vm=approval.vm)
        self._step_all(Approve(event_id=approval.event_id, by=approval.vm))

    async def _on_request(self, request: Request, received: Received) -> None:
        client = received.parameters["client"]
        # An abort is never too late: it only makes things stop.
        late = "" if isinstance(request, m.AbortRequested) else outlived(received.header.time, self._now())
        if self._claimed:
            self._answer(client, request, late)
        else:
            self._early.append((client, request, late))

    async def _on_refused(self, topic: str, error: ContractError) -> None:
        """An operator's request that breaks the contract is answered too, as far as its topic tells who asked."""
        parts = topic.removeprefix(PREFIX + "/").split("/")
        if len(parts) == 3 and parts[0] == "ctl" and is_name(parts[1]):
            answer = m.RequestAnswered(
                request="unreadable", accepted=False, reason=str(error)[:1000], codes=("message_invalid",)
            )
            try:
                self.book.remember_answer(parts[1], answer)
            except StoreError as failed:
                _log.error("request.failed", client=parts[1], why=str(failed))
            self._outbox_filled.set()

    # -- decisions --

    def _step_all(self, received: Input) -> None:
        """Give an input to every active rollout, which ignores what is not its own."""
        if not self._claimed:
            self._early_facts.append(received)  # a persistent session may deliver before the epoch is claimed
            return
        if self._superseded.done():
            return
        for rollout in self.book.active:
            try:
                self.book.step(rollout, received, self.fleet, self.authority, self._now())
            except CaesuraError as error:  # it stays where it is: the others must not stand still for it
                if self._not_moved.get(rollout.id) != str(error):
                    _log.error("rollout.not_moved", why=str(error), rollout=rollout.id)
                self._not_moved[rollout.id] = str(error)
            else:
                self._not_moved.pop(rollout.id, None)
        self._outbox_filled.set()
        self._changed.set()

    async def _rollouts(self) -> None:
        """Time passes for every rollout, and unanswered commands are repeated."""
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            if self.leads:
                active = self.book.active
                if active:
                    self._step_all(Tick())
                    self._changed.clear()
                await self._send_commands()

    async def _send_commands(self) -> None:
        loop = asyncio.get_running_loop()
        open_keys = set()
        for rollout in self.book.active:
            for command in due_commands(rollout, self.authority):
                if self.book.rollouts.get(rollout.id) is not rollout or not self.leads:
                    # Sending takes time, and meanwhile an answer or an abort came: what is due now is another matter.
                    self._changed.set()
                    return
                key = (command.operation, type(command).TYPE)
                open_keys.add(key)
                if loop.time() - self._last_sent.get(key, -_REPEAT_S) < _REPEAT_S:
                    continue
                if not await self._try_send(command, host=command.host):
                    return  # no broker to send the others to either: time must not stand still for that
                self._last_sent[key] = loop.time()
        self._last_sent = {key: at for key, at in self._last_sent.items() if key in open_keys}

    def _answer(self, client: str, request: Request, late: str) -> None:
        """Answer a request once; a repeated one gets the stored answer again. ``late``: why it is too late for a new one."""
        try:
            known = self.store.answer(client, request.request)
            if known is not None:
                self.store.enqueue(known, client=client)
            elif self.leads and late:
                _log.warning("request.outlived", client=client, request=request.request, why=late)
                self._refuse(client, request, "request_late", late)
            elif self.leads:
                self._decide_request(client, request)
        except StoreError as error:
            _log.error("request.failed", request=request.request, why=str(error))
        self._outbox_filled.set()
        self._changed.set()

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
        except IllegalTransition as error:
            self._refuse(client, request, "rollout_state", str(error))

    def _refuse(self, client: str, request: Request, code: ReasonCode, why: str) -> None:
        answer = m.RequestAnswered(
            request=request.request, accepted=False, reason=why[:REASON_CHARACTERS], codes=(code,)
        )
        self.book.remember_answer(client, answer)

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
            self.book.remember_answer(client, answer)
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
        largest = size_bytes(largest_state(rollout))
        if largest > MAX_PAYLOAD_BYTES:
            raise RequestRefused(
                "too_large",
                f"a rollout over {sum(len(wave.vms) for wave in plan.waves)} VMs is too large to be announced "
                f"({largest} bytes of {MAX_PAYLOAD_BYTES}): select fewer sets or hosts at a time",
            )
        self.book.add(rollout, client, answer)
        _log.info("rollout.started", rollout=rollout.id, update=update, waves=len(plan.waves), client=client)
        try:
            self._to_clear += self.book.forget()
        except StoreError as error:
            _log.error("rollout.not_forgotten", why=str(error))

    def _steer(self, client: str, request: m.AbortRequested | m.ResumeRequested, received: Input) -> None:
        active = self.book.active
        known = ", ".join(each.id for each in active) or "none"
        if request.rollout:
            rollout = self.book.rollouts.get(request.rollout)
            if rollout is None:
                raise RequestRefused(
                    "rollout_unknown", f"no rollout {request.rollout!r}; not at their end: {known}"
                )
        elif len(active) == 1:
            rollout = active[0]
        else:
            raise RequestRefused(
                "rollout_unknown",
                f"several rollouts are not at their end, say which: {known}"
                if active
                else "no rollout is under way: all are at their end",
            )
        answer = m.RequestAnswered(request=request.request, accepted=True, rollout=rollout.id)
        self.book.step(rollout, received, self.fleet, self.authority, self._now(), answer=(client, answer))

    # -- messages out --

    async def _try_send(self, message: Message, **parameters: str) -> bool:
        """Whether the bus took it, or never will: either way the next one is tried."""
        try:
            await self.post.send(message, timeout_s=2.0, **parameters)
        except PublishRefused as error:
            if self._sampler.due(error.topic) is not None:
                _log.error("coordinator.refused", topic=error.topic, why=str(error))
        except BusError as error:
            _log.debug("coordinator.not_sent", type=type(message).TYPE, why=str(error))
            return False
        except (ContractError, TopicError) as error:
            _log.error("coordinator.unsendable", type=type(message).TYPE, why=str(error), **parameters)
        return True

    async def _publish_owners(self) -> None:
        """Publish whose VM it is until the bus shows it. What was retained comes back first, so that little is sent twice."""
        while True:
            await self._owners_changed.wait()
            self._owners_changed.clear()
            if not self.leads:
                continue
            for vm, owner in self.owners.unpublished():
                if vm not in self._owners_sent or self._owners_sent[vm] != owner:
                    self._owners_sent[vm] = owner
                    accepted = partial(self._owner_published, vm, owner)
                    self._owner_publisher.put(
                        self._owner_message(vm, owner), policy=NEWEST, accepted=accepted
                    )

    def _owner_message(self, vm: str, owner: m.VmOwner | None) -> OutboxMessage:
        if owner is None:
            return clearing(m.VmOwner, event_id=new_id(), vm=vm)
        return prepare(owner, source=self.post.source, event_id=new_id(), at=datetime.now(UTC), vm=vm)

    def _owner_published(self, vm: str, owner: m.VmOwner | None) -> None:
        if vm in self._owners_sent and self._owners_sent[vm] == owner:
            del self._owners_sent[vm]
        self.owners.published(vm, owner)

    async def _outbox(self) -> None:
        """Give what is stored to the publisher, as soon as there is an epoch to publish it under."""
        loaded = False
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            if not self.leads:
                continue
            if not loaded:
                try:
                    await self.publisher.load()
                except StoreError as error:
                    _log.error("outbox.not_loaded", why=str(error))
                    await asyncio.sleep(TICK_S)
                    self._outbox_filled.set()
                    continue
                loaded = True
            self.store.left_over = 0
            self._hand_over()
            # Behind what a previous run left of the same rollouts.
            for name in self._to_clear:
                self.publisher.put(clearing(m.RolloutState, event_id=new_id(), rollout=name), policy=NEWEST)
            self._to_clear.clear()

    def _hand_over(self) -> None:
        for message in self.store.stored():
            self.publisher.put(message, policy=NEWEST if message.retain else EVERY)

    def waiting(self) -> int:
        """Messages that are stored, those included that the broker has just taken."""
        return self.store.left_over + len(self.publisher) + self.publisher.unremoved + self.store.unread
