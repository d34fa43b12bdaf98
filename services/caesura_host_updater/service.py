"""The host updater: receives commands and answers clocks, runs one operation at a time, publishes its result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from types import MappingProxyType

import msgspec
import structlog

from caesura.bus.messaging import MessageClient
from caesura.bus.port import Bus, BusError, Delivery
from caesura.bus.presence import Presence
from caesura.contract.codec import Received
from caesura.contract.envelope import source_of
from caesura.contract.messages import (
    AbortOperation,
    AgentClockSynced,
    AgentPresence,
    ClockSyncAnswered,
    ClockSyncRequested,
    CoordinatorPresence,
    HostPresence,
    InventoryPart,
    StartOperation,
    VmClockSynced,
    VmFrozen,
    VmRecord,
    VmResumed,
    VmStatus,
)
from caesura.delivery.message import OutboxMessage
from caesura.lifecycle.commands import COMMANDS
from caesura.runtime.errors import StoreError
from caesura_host_updater import admission as rules
from caesura_host_updater.admission import (
    AbortRunning,
    Accept,
    Authority,
    Ignore,
    NotObeyed,
    Refuse,
    Repeat,
    Tombstone,
    Underway,
)
from caesura_host_updater.asker import Asker
from caesura_host_updater.clocks.tracker import ClockSyncTracker
from caesura_host_updater.drivers.port import Driver, states_within
from caesura_host_updater.guard_client import GuardClient
from caesura_host_updater.inventory.catalogue_reader import CatalogueReader
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.inventory.installs import installed
from caesura_host_updater.inventory.message import inventory
from caesura_host_updater.inventory.publisher import InventoryPublisher
from caesura_host_updater.inventory.updates import UpdateFile
from caesura_host_updater.journal import Journal, JournalThread
from caesura_host_updater.metrics import HostMetrics
from caesura_host_updater.operation.crash_recovery import Startup, resume_until_running
from caesura_host_updater.operation.finalizer import (
    FactFactory,
    OperationFinalizer,
    cancelled_before_it_began,
)
from caesura_host_updater.operation.report import clock_wait, final_report, status_report
from caesura_host_updater.operation.runner import OperationRunner
from caesura_host_updater.operation.state import Operation, UpdateRun, VmPause
from caesura_host_updater.outbox import Outbox
from caesura_host_updater.pauses import PauseMarkers
from caesura_host_updater.settings import HostUpdaterSettings
from caesura_host_updater.vm_status import VmStatuses
from caesura_host_updater.vm_view import STATES_S, VmView
from caesura_vmcontrol.procfs import boot_id

_CLOCKS_S = 5.0  # s: for the verdicts on clocks at shutdown; an agent answers in a fraction of a second
_FLUSH_S = 3.0  # s: for the last facts at shutdown; what is left is published at the next start
_CLOCK_PUBLISH_S = 0.5  # s: an answer later than this is of no use to the agent

FORGET_ADVICE = "see 'An epoch that nobody claimed' in docs/operate/runbooks/epoch.md"

_log = structlog.get_logger("caesura.host_updater")


def presence(host: str, instance: str, *, online: bool) -> HostPresence:
    """A host updater's presence, also as its last will."""
    return HostPresence(host=host, online=online, instance=instance)


class HostUpdater:
    """See the module.

    Args:
        instance: new with every start.
        environ: what updates inherit.
        resumed: VMs that were resumed by their markers before this object was made, and when (CLOCK_MONOTONIC).
    """

    def __init__(
        self,
        settings: HostUpdaterSettings,
        host: HostFile,
        *,
        bus: Bus,
        driver: Driver,
        guardian: GuardClient,
        journal: JournalThread,
        metrics: HostMetrics,
        pauses: PauseMarkers,
        instance: str,
        environ: Mapping[str, str],
        resumed: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._settings = settings
        self._host = host
        self._vms = {vm.name: vm for vm in host.vm}
        self._driver = driver
        self._guardian = guardian
        self._journal = journal
        self._metrics = metrics
        self._instance = instance
        self._environ = environ
        self.bus = bus
        self.post = MessageClient(bus, source_of(settings.fleet, "host", host.host))
        # It needs no beat: the inventory serves as one.
        self._presence = Presence(
            self.post,
            partial(presence, host.host, instance, online=True),
            partial(presence, host.host, instance, online=False),
            host=host.host,
        )
        self.outbox = Outbox(bus, journal, self._published)
        self.clocks = ClockSyncTracker(
            host.host,
            driver,
            without_agent=frozenset(vm.name for vm in host.vm if not vm.agent),
            timeout_s=settings.clock_timeout_s,
            verdict=self._clock_judged,
            repeat=self.outbox.queue,
        )
        self._letters = FactFactory(host.host, settings.fleet)
        self._statuses = VmStatuses(host.host, self._vms, self.post)
        self._inventories = InventoryPublisher(host.host, self.post)
        self._pauses = pauses
        self._endings = OperationFinalizer(
            self._letters, journal=journal, outbox=self.outbox, clocks=self.clocks, metrics=metrics
        )
        self._view = VmView(host.vm, driver)
        self._startup = Startup(
            host.host,
            driver=driver,
            guardian=guardian,
            journal=journal,
            letters=self._letters,
            endings=self._endings,
            pauses=pauses,
            resumed=resumed,
            has_clock=self._view.has_clock,
        )
        self.authority = Authority()
        self._runner: OperationRunner | None = None
        self._accepted: asyncio.Queue[OperationRunner] = asyncio.Queue()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._changed = asyncio.Event()
        self._updates = CatalogueReader(settings.updates_dir, self._updates_changed)
        self._asker = Asker(
            host.host,
            environ,
            catalogue=lambda: self._updates.catalogue,
            # From the moment that a command is accepted: it is persisted before there is an operation.
            busy=lambda: bool(self.operation) or not self._idle.is_set(),
            changed=self._changed.set,
        )
        self._agents: dict[str, AgentPresence] = {}
        self._received_ns = 0
        self._refused_epoch = ""
        self._outdated = ""
        """The coordinator that is refused because this host would not receive its commands."""
        self._listen()

    def _listen(self) -> None:
        self.post.subscribe(StartOperation, self._on_freeze)
        self.post.subscribe(AbortOperation, self._on_abort)
        self.post.subscribe(CoordinatorPresence, self._on_coordinator)
        self.post.subscribe(ClockSyncRequested, self._on_clock_request)
        self.post.subscribe(AgentClockSynced, self._on_agent_synced)
        self.post.subscribe(AgentPresence, self._on_agent)
        self.post.subscribe(VmStatus, self._on_status)
        self.post.subscribe(InventoryPart, self._on_inventory_part)
        self.post.on_tombstone(InventoryPart, self._on_part_removed)
        self.post.on_tombstone(HostPresence, self._on_presence_removed)

    def tasks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """The eternal tasks, for ``serve``."""
        return {
            "bus": lambda: self.bus.run(self._receive, self._on_connected),
            "guard": self._guardian.run,
            "operations": self._operate,
            "outbox": self.outbox.run,
            "inventory": self._keep_inventory,
            "vm statuses": self._statuses.run,
            "clocks": self.clocks.run,
            "vms": self._watch_vms,
            "journal": self._endings.retry_unsaved,
            "updates": self._updates.run,
            "installed updates": self._asker.run,
            "pause markers": self._pauses.remove_later,
        }

    @property
    def operation(self) -> str:
        """The operation under way, empty when idle."""
        return self._runner.state.operation if self._runner is not None else ""

    # -- start ----------------------------------------------------------------------------------------------

    async def resume_paused(self) -> None:
        """Find all VMs and resume what a previous run left paused. Needs no journal."""
        await self._startup.resume_paused()

    async def recover(self) -> None:
        """Before joining the bus: end what a previous run left open, load what it had left to publish.

        Raises:
            StoreError: as ``Startup.run``.
        """
        self.authority = await self._journal.do(Journal.authority)
        await self._startup.run(self.authority.epoch)
        await self._endings.load()
        await self.outbox.load()
        await self._startup.conclude_unsaved()
        self.clocks.expect(await self._journal.do(Journal.clock_waits), told=True)
        await self._updates.start()

    # -- the bus --------------------------------------------------------------------------------------------

    async def _receive(self, delivery: Delivery) -> None:
        # t2 of a clock-sync exchange: before anything else is done with the message.
        self._received_ns = time.time_ns()
        await self.post.deliver(delivery)

    async def _on_connected(self) -> None:
        self._changed.set()
        self.clocks.connected()
        self._statuses.connected()
        self._inventories.connected()
        await self._presence.announce()

    async def _keep_inventory(self) -> None:
        while True:
            self._changed.clear()
            records = await self._records()
            busy = self._runner.state.vms if self._runner is not None else ()
            self._statuses.observe(records.values(), {vm.vm for vm in busy})
            message = inventory(
                self._host.host,
                self._driver.name,
                self._driver.detail(),
                authority=self._acknowledged(),
                vms=records,
                catalogue=self._updates.catalogue,
                operation=self.operation,
                guard=self._guardian.state,
                refused_epoch=self._refused_epoch,
                installed=installed(
                    self._updates.catalogue, self._endings.marks, self._asker.answers, records.keys()
                ),
            )
            await self._inventories.publish(message)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.inventory_interval_s):
                    await self._changed.wait()

    def _acknowledged(self) -> Authority:
        """What a coordinator's fence gets. One that was obeyed before this host was upgraded must see that it no longer is."""
        if self._outdated and self._outdated == self.authority.coordinator:
            return Authority(self.authority.epoch)
        return self.authority

    async def _records(self) -> dict[str, VmRecord]:
        busy = self._runner.state.vms if self._runner is not None else ()
        canaries = {vm for vm, agent in self._agents.items() if agent.canary_bytes}
        return await self._view.records(self._startup.resuming.union(vm.vm for vm in busy), canaries)

    def reread(self) -> None:
        """Read the updates again; the inventory follows when they are read."""
        self._updates.reread()
        self._updates_changed()

    def _updates_changed(self) -> None:
        self._asker.ask()
        self._changed.set()

    async def _watch_vms(self) -> None:
        while True:
            await self._driver.changed()
            self._changed.set()

    # -- commands -------------------------------------------------------------------------------------------

    async def _observe_epoch(
        self, epoch: int, coordinator: str, commands: Collection[str] = COMMANDS
    ) -> Authority | NotObeyed:
        """Obey a newer epoch, durably, before anything else."""
        heard = rules.observe_epoch(self.authority, epoch, coordinator, commands)
        outdated = isinstance(heard, NotObeyed) and heard.outdated
        refused = (
            heard.why if isinstance(heard, NotObeyed) and (outdated or epoch > self.authority.epoch) else ""
        )
        if refused != self._refused_epoch and (refused or isinstance(heard, Authority)):
            self._refused_epoch = refused
            self._outdated = coordinator if outdated else ""
            self._changed.set()
            if outdated:
                _log.error("coordinator.outdated", why=refused)
            elif refused:
                _log.error("epoch.refused", why=refused, advice=FORGET_ADVICE)
        if isinstance(heard, Authority) and heard != self.authority:
            await self._journal.do(lambda journal: journal.obey(heard))
            self.authority = heard
            self._changed.set()
            _log.info("epoch.adopted", epoch=epoch, coordinator=coordinator)
        return heard

    async def _on_coordinator(self, message: CoordinatorPresence, _: Received) -> None:
        if not message.online:
            return
        try:
            await self._observe_epoch(message.epoch, message.coordinator, message.commands)
        except StoreError as error:
            _log.error("epoch.not_adopted", epoch=message.epoch, why=str(error))

    async def _known(self, operation: str) -> Underway | Repeat | None:
        return Underway() if operation == self.operation else await self._endings.known(operation)

    async def _on_freeze(self, command: StartOperation, _: Received) -> None:
        now = datetime.now(UTC)
        try:
            known = await self._known(command.operation)
            heard = await self._observe_epoch(command.epoch, command.coordinator)
            verdict = rules.evaluate_start(
                command,
                host=rules.Host(
                    host=self._host.host,
                    vms=await self._records(),
                    catalogue=self._updates.catalogue,
                    busy=self.operation,
                    stopping=self._stopping,
                ),
                authority=heard,
                known=known,
                now=now,
            )
            if isinstance(verdict, Accept):
                await self._accept(command, verdict.update)
                return
        except StoreError as error:
            if command.operation == self.operation:
                # It is under way, and its own report is its one end; the coordinator asks again.
                _log.error("command.without_journal", operation=command.operation, why=str(error))
                return
            # What cannot be persisted cannot be promised, so nothing is touched.
            verdict = Refuse("store_failed", f"nothing was touched: {error}")
        if isinstance(verdict, Ignore):
            _log.warning("command.ignored", operation=command.operation, why=verdict.why)
            return
        if isinstance(verdict, Underway | Repeat):
            report = (
                verdict.report
                if isinstance(verdict, Repeat)
                else status_report(self._host.host, command, self.authority.epoch, "accepted", now)
            )
            self.outbox.queue(*self._letters.report(report))
            await self._endings.repeat_verdicts(command.operation)
            _log.debug("command.repeated", operation=command.operation, status=report.status)
            return
        _log.warning("command.refused", operation=command.operation, why=verdict.why)
        refused = status_report(
            self._host.host,
            command,
            self.authority.epoch,
            "refused",
            now,
            reason=verdict.why,
            codes=(verdict.code,),
        )
        await self._endings.conclude(refused)

    async def _accept(self, command: StartOperation, update: UpdateFile | None) -> None:
        kernels = await self.clocks.kernel_boot_ids([target.vm for target in command.targets])
        if self._stopping:  # while the guests were asked
            now = datetime.now(UTC)
            await self._endings.conclude(
                status_report(
                    self._host.host,
                    command,
                    self.authority.epoch,
                    "refused",
                    now,
                    reason=rules.STOPPING,
                    codes=("host_stopping",),
                )
            )
            return
        # `drain` waits for it from now on, though there is nothing to wait for before it is persisted.
        self._idle.clear()
        try:
            await self._begin(command, update, kernels)
        except BaseException:
            self._idle.set()
            raise

    async def _begin(
        self, command: StartOperation, update: UpdateFile | None, kernels: Mapping[str, str]
    ) -> None:
        scope_vm = update is not None and update.scope == "vm"
        can = {target.vm: self._driver.capabilities(target.vm) for target in command.targets}
        state = Operation(
            operation=command.operation,
            method=command.method,
            budget_s=command.budget_s,
            hold_s=command.hold_s,
            update=update.name if update else "",
            update_version=update.version if update else "",
            update_timeout_s=update.timeout_s if update else 0.0,
            vms=tuple(
                VmPause(
                    vm=target.vm,
                    set=target.set,
                    update_domain=target.update_domain,
                    event_id=target.event_id,
                    boot_id=agent.boot_id if (agent := self._agents.get(target.vm)) else "",
                    kernel_boot_id=kernels[target.vm],
                    digestible="digest_equal" in can[target.vm].digests,
                    sampleable="sampled_digest_equal" in can[target.vm].digests,
                    no_digest=can[target.vm].no_digest,
                    canary_writes=agent.canary_writes if agent and agent.canary_bytes else 0,
                )
                for target in command.targets
            ),
            runs=tuple(UpdateRun(key=target.vm) for target in command.targets)
            if scope_vm
            else (UpdateRun(),) * (update is not None),
        )
        accepted = self._letters.report(
            status_report(self._host.host, command, self.authority.epoch, "accepted", datetime.now(UTC))
        )
        self._asker.interrupt()
        # The intent is on disk before anything is done; `arming` because the next thing is the guard.
        await self._journal.do(lambda journal: journal.accept(command, state, boot_id(), accepted))
        self._runner = OperationRunner(
            command,
            state,
            update,
            host=self._host.host,
            driver=self._driver,
            guard=self._guardian,
            pauses=self._pauses,
            journal=self._journal,
            environ=self._environ,
            announce=self._announce,
            on_change=self._changed.set,
        )
        if self._stopping:
            self._runner.abort("host_stopping", rules.STOPPING)
        self.outbox.queue(*accepted)
        self._changed.set()
        self._accepted.put_nowait(self._runner)
        _log.info("operation.accepted", operation=command.operation, update=state.update, vms=len(state.vms))

    async def _on_abort(self, command: AbortOperation, _: Received) -> None:
        try:
            known = await self._known(command.operation)
            heard = await self._observe_epoch(command.epoch, command.coordinator)
        except StoreError as error:
            _log.error("abort.without_journal", operation=command.operation, why=str(error))
            if self._runner is not None and command.operation == self.operation:
                self._runner.abort("aborted", command.reason)  # resuming VMs needs no disk
            return
        verdict = rules.judge_abort(command, busy=self.operation, authority=heard, known=known)
        if isinstance(verdict, Ignore):
            _log.warning("abort.ignored", operation=command.operation, why=verdict.why)
        elif isinstance(verdict, AbortRunning):
            if self._runner is not None:
                self._runner.abort("aborted", command.reason)
        elif isinstance(verdict, Repeat):
            self.outbox.queue(*self._letters.report(verdict.report))
        elif isinstance(verdict, Tombstone):
            await self._endings.conclude(
                cancelled_before_it_began(self._host.host, command, self.authority.epoch, datetime.now(UTC))
            )

    # -- operations -----------------------------------------------------------------------------------------

    async def _operate(self) -> None:
        while True:
            runner = await self._accepted.get()
            try:
                state = await runner.run()
            except BaseException:
                # A bug, or we are being torn down: whatever it is, no VM stays frozen for it. The journal
                # holds the operation as unfinished, so the next start reports it.
                _log.exception("operation.broken", operation=runner.state.operation)
                await asyncio.gather(*(resume_until_running(self._driver, vm.vm) for vm in runner.state.vms))
                self._idle.set()
                raise
            report = final_report(
                self._host.host,
                runner.command,
                state,
                self.authority.epoch,
                await states_within(self._driver, STATES_S),
                datetime.now(UTC),
            )
            waits = [
                clock_wait(state, vm, runner.command.clock_bound_s)
                for vm in state.vms
                if vm.frozen_at is not None and vm.end == "running" and self._view.has_clock(vm.vm)
            ]
            await self._endings.conclude(report, state, waits)
            self._runner = None
            self._idle.set()
            self._asker.ask()
            self._changed.set()

    def _announce(self, fact: VmFrozen | VmResumed, state: Operation) -> None:
        self.outbox.put(self._letters.fact(fact), state)
        if isinstance(fact, VmFrozen):
            self._statuses.frozen(fact)
        else:
            self._statuses.resumed(fact)

    def _published(self, fact: OutboxMessage) -> None:
        if fact.type != VmResumed.TYPE:
            return
        message = fact.read()
        if isinstance(message, VmResumed):
            self.clocks.on_resume_published(fact, message)
            self._statuses.resumed(message)  # one that a previous run of this service left to be published

    # -- clocks and agents ----------------------------------------------------------------------------------

    async def _on_clock_request(self, message: ClockSyncRequested, _: Received) -> None:
        if message.vm not in self._vms:
            return
        t2_ns = self._received_ns
        answer = ClockSyncAnswered(
            vm=message.vm,
            host=self._host.host,
            exchange=message.exchange,
            t1_ns=message.t1_ns,
            t2_ns=t2_ns,
            t3_ns=time.time_ns(),
        )
        with suppress(BusError):  # the agent asks again
            await self.post.send(answer, timeout_s=_CLOCK_PUBLISH_S, host=self._host.host, vm=message.vm)

    async def _on_status(self, message: VmStatus, _: Received) -> None:
        self._statuses.published_earlier(message)

    async def _on_inventory_part(self, message: InventoryPart, _: Received) -> None:
        if self._inventories.retained(message):
            self._changed.set()

    async def _on_part_removed(self, parameters: Mapping[str, str]) -> None:
        """An operator made the fleet forget this host, which is on the bus after all."""
        if parameters["part"].isdigit() and self._inventories.removed(int(parameters["part"])):
            self._changed.set()

    async def _on_presence_removed(self, _: Mapping[str, str]) -> None:
        await self._presence.announce()

    async def _on_agent_synced(self, message: AgentClockSynced, _: Received) -> None:
        self.clocks.answered(message)

    async def _on_agent(self, message: AgentPresence, _: Received) -> None:
        known = self._agents.get(message.vm)
        if known is not None and known.boot_id == message.boot_id:
            # Its last will, written when it connected, knows nothing of the pages that were written since.
            writes = max(known.canary_writes, message.canary_writes)
            message = msgspec.structs.replace(message, canary_writes=writes)
        self._agents[message.vm] = message
        if message.vm in self._vms and bool(message.canary_bytes) != bool(known and known.canary_bytes):
            self._changed.set()  # the inventory says what can be shown of its memory

    def _clock_judged(self, verdict: VmClockSynced) -> None:
        letter = self._letters.fact(verdict)
        self._journal.post(lambda journal: journal.judged(verdict.vm, verdict.operation, [letter]))
        self.outbox.queue(letter)

    # -- stop -----------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Complete or undo what is under way, publish the last facts, announce offline, leave the bus."""
        self._stopping = True
        runner = self._runner
        if runner is not None and (runner.state.schedule is None or not _update_runs(runner.state)):
            runner.abort("host_stopping", rules.STOPPING)
        await self._idle.wait()
        if self.bus.stats.connected:
            # Without a verdict the rollout would halt, although nothing is wrong with the clocks.
            if not await self.clocks.settled(_CLOCKS_S):
                _log.warning("clocks.left", vms=len(self.clocks))
            if not await self.outbox.drained(_FLUSH_S):
                _log.warning("outbox.left", letters=len(self.outbox))
            if not await self._statuses.drained(_FLUSH_S):
                _log.warning("vm_statuses.left")
            await self._presence.goodbye(timeout_s=2.0)
        self._updates.close()
        await self._pauses.close()
        await self.bus.close()

    def pings(self) -> dict[str, Callable[[], str]]:
        """For the health probe."""
        stats = self.bus.stats
        return {
            "broker": lambda: (
                "" if stats.connected else f"not connected: {stats.last_error or 'still trying'}"
            ),
            "journal": lambda: self._journal.trouble,
            "driver": self._driver.ping,
            "inventory": self._inventories.ping,
            "updates": self._updates.complaint,
            "pauses": self._view.complaint,
            "outbox": lambda: self.outbox.ping() or self._statuses.ping(),
            "guard": lambda: "there is no pause guard" if self._guardian.state == "absent" else "",
        }

    def show_gauges(self) -> None:
        """Have the metrics read our numbers."""
        self._metrics.observe_bus(self.bus.stats, self.post.decode_errors)
        self._metrics.observe_gauges(
            outbox=lambda: len(self.outbox),
            refused=lambda: self.outbox.refused + self._statuses.refused,
            clocks=lambda: len(self.clocks),
            busy=lambda: bool(self.operation),
        )


def _update_runs(op: Operation) -> bool:
    """Whether an update is at work under paused VMs: it may complete, within the budget."""
    return op.phase in ("updating", "updated", "resuming", "resumed") and bool(op.update)
