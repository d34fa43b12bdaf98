"""The host updater: receives commands and answers clocks, runs one operation at a time, publishes its result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType

from caesura.bus.messaging import MessageClient
from caesura.bus.options import parse_addresses
from caesura.bus.port import Bus, BusError, Delivery
from caesura.bus.presence import Presence
from caesura.bus.resync import Resync
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
    VmDetails,
    VmFrozen,
    VmRecord,
    VmResumed,
    VmStatus,
)
from caesura.delivery.message import OutboxMessage
from caesura.runtime.logs import get_logger
from caesura_host_updater.agent_registry import AgentRegistry
from caesura_host_updater.clocks.reference_clock import ReferenceClock
from caesura_host_updater.clocks.tracker import ClockSyncTracker
from caesura_host_updater.command_handler import CommandHandler
from caesura_host_updater.drivers.port import Driver, MembershipCapable
from caesura_host_updater.epoch_tracker import EpochTracker
from caesura_host_updater.guard_client import GuardClient
from caesura_host_updater.guard_inspection import GuardInspection
from caesura_host_updater.host_vms import HostVms
from caesura_host_updater.installed_probe import InstalledProbe
from caesura_host_updater.inventory.builder import inventory
from caesura_host_updater.inventory.catalogue_reader import CatalogueReader
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.inventory.installs import installed
from caesura_host_updater.inventory.publisher import InventoryPublisher
from caesura_host_updater.journal import Journal, JournalThread
from caesura_host_updater.kernel.inspector import KernelInspector
from caesura_host_updater.metrics import HostMetrics
from caesura_host_updater.operation.crash_recovery import CrashRecovery
from caesura_host_updater.operation.current_operation import CurrentOperation
from caesura_host_updater.operation.facts import FactFactory
from caesura_host_updater.operation.finalizer import OperationFinalizer
from caesura_host_updater.operation.state import Operation
from caesura_host_updater.outbox import Outbox
from caesura_host_updater.pause_markers import PauseMarkers
from caesura_host_updater.settings import HostUpdaterSettings
from caesura_host_updater.subscriptions import agent_filters
from caesura_host_updater.vm_details import VmDetailsPublisher
from caesura_host_updater.vm_status import VmStatuses
from caesura_host_updater.vm_view import VmView

_CLOCKS_S = 5.0  # s: for the verdicts on clocks at shutdown; an agent answers in a fraction of a second
_FLUSH_S = 3.0  # s: for the last facts at shutdown; what is left is published at the next start
_CLOCK_PUBLISH_S = 0.5  # s: an answer later than this is of no use to the agent

_log = get_logger("caesura.host_updater")


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
        guard: GuardClient,
        journal: JournalThread,
        metrics: HostMetrics,
        pauses: PauseMarkers,
        instance: str,
        environ: Mapping[str, str],
        resumed: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._settings = settings
        self._host = host
        self._vms = HostVms(host.vm)
        self._driver = driver
        self._guard = guard
        self._journal = journal
        self._metrics = metrics
        self._instance = instance
        self._changed = asyncio.Event()
        self.epochs = EpochTracker(journal, self._changed.set)
        self._agents = AgentRegistry()
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
        self._host_clock = ReferenceClock(Path(settings.state_dir))
        self.clocks = ClockSyncTracker(
            host.host,
            driver,
            has_agent=self._vms.has_agent,
            timeout_s=settings.clock_timeout_s,
            verdict=self._clock_judged,
            repeat=self.outbox.queue,
            host_clock_error=self._host_clock.error,
        )
        self._fact_factory = FactFactory(host.host, settings.fleet)
        self._statuses = VmStatuses(host.host, self._vms, self.post)
        self._details = VmDetailsPublisher(host.host, host.vm, self.post)
        self._inventories = InventoryPublisher(host.host, self.post)
        self._pauses = pauses
        self._finalizer = OperationFinalizer(
            self._fact_factory, journal=journal, outbox=self.outbox, clocks=self.clocks, metrics=metrics
        )
        self._view = VmView(self._vms, driver, guard.pause_risk)
        self._kernel = KernelInspector(
            host.kernel,
            state_dir=Path(settings.state_dir),
            guard_pid=lambda: guard.pid,
            broker_hosts=[each.host for each in parse_addresses(settings.broker_url)],
            changed=self._changed.set,
        )
        self._recovery = CrashRecovery(
            host.host,
            driver=driver,
            guard=guard,
            journal=journal,
            fact_factory=self._fact_factory,
            finalizer=self._finalizer,
            pauses=pauses,
            resumed=resumed,
            has_clock=self._view.has_clock,
            measured=self._kernel.measured,
            clock_unsure=self._host_clock.distrust,
        )
        self.operations = CurrentOperation(
            host.host,
            driver=driver,
            guard=guard,
            journal=journal,
            pauses=pauses,
            outbox=self.outbox,
            finalizer=self._finalizer,
            view=self._view,
            environ=environ,
            epoch=lambda: self.epochs.authority.epoch,
            announce=self._announce,
            on_change=self._changed.set,
            on_end=self._operation_ended,
            kernels=self._kernel,
        )
        self._inspection = GuardInspection(
            driver,
            guard,
            vms=lambda: [vm.name for vm in self._vms],
            is_busy=lambda: self.operations.busy,
            on_change=self._changed.set,
        )
        guard.on_connected = self._inspection.ask
        self._updates = CatalogueReader(settings.updates_dir, self._updates_changed)
        self._installed_probe = InstalledProbe(
            host.host,
            environ,
            catalogue=lambda: self._updates.catalogue,
            busy=lambda: self.operations.busy,
            changed=self._changed.set,
        )
        self._commands = CommandHandler(
            host.host,
            driver=driver,
            epochs=self.epochs,
            operations=self.operations,
            finalizer=self._finalizer,
            fact_factory=self._fact_factory,
            outbox=self.outbox,
            clocks=self.clocks,
            updates=self._updates,
            installed_probe=self._installed_probe,
            agents=self._agents,
            records=self._records,
        )
        self._resync = Resync(
            self.post, enabled=settings.broker_retained == "ignored", publish=self._publish_state
        )
        self._received_ns = 0
        self._listen()

    def _listen(self) -> None:
        self.post.subscribe(StartOperation, self._on_start)
        self.post.subscribe(AbortOperation, self._on_abort)
        self.post.subscribe(CoordinatorPresence, self._on_coordinator)
        self.post.subscribe(ClockSyncRequested, self._on_clock_request)
        self.post.subscribe(AgentClockSynced, self._on_agent_synced)
        self.post.subscribe(AgentPresence, self._on_agent)
        self.post.subscribe(VmStatus, self._on_status)
        self.post.subscribe(VmDetails, self._on_details)
        self.post.subscribe(InventoryPart, self._on_inventory_part)
        self.post.on_tombstone(InventoryPart, self._on_part_removed)
        self.post.on_tombstone(HostPresence, self._on_presence_removed)

    def tasks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """The eternal tasks, for ``serve``."""
        return {
            "bus": lambda: self.bus.run(self._receive, self._on_connected),
            "guard": self._guard.run,
            "guard inspection": self._inspection.run,
            "operations": self.operations.run,
            "outbox": self.outbox.run,
            "inventory": self._keep_inventory,
            "vm statuses": self._statuses.run,
            "vm details": self._details.run,
            "clocks": self.clocks.run,
            "vms": self._watch_vms,
            "journal": self._finalizer.retry_unsaved,
            "updates": self._updates.run,
            "installed updates": self._installed_probe.run,
            "pause markers": self._pauses.remove_later,
            "kernel": self._kernel.run,
            "resync": self._resync.run,
        }

    # -- start ----------------------------------------------------------------------------------------------

    async def resume_paused(self) -> None:
        """Find all VMs and resume what a previous run left paused. Needs no journal."""
        await self._recovery.resume_paused()

    async def recover(self) -> None:
        """Before joining the bus: end what a previous run left open, load what it had left to publish.

        Raises:
            StoreError: as ``CrashRecovery.run``.
        """
        await self.epochs.load()
        await self._host_clock.load()
        await self._recovery.run(self.epochs.authority.epoch)
        await self._finalizer.load()
        await self.outbox.load()
        await self._recovery.finalize_unsaved()
        self.clocks.track(await self._journal.do(Journal.clock_waits), already_published=True)
        await self._updates.start()

    # -- the bus --------------------------------------------------------------------------------------------

    async def _receive(self, delivery: Delivery) -> None:
        # t2 of a clock-sync exchange: before anything else is done with the message.
        self._received_ns = time.time_ns()
        await self.post.deliver(delivery)

    async def _on_connected(self) -> None:
        self.clocks.connected()
        await self._publish_state()

    async def _publish_state(self) -> None:
        """Everything that is retained: the broker may have lost it, or a reader asks."""
        self._changed.set()
        self._statuses.connected()
        self._details.connected()
        self._inventories.connected()
        await self._presence.announce()

    async def _keep_inventory(self) -> None:
        while True:
            self._changed.clear()
            records = await self._records()
            self._statuses.observe(records.values(), {vm.vm for vm in self.operations.vms})
            message = inventory(
                self._host.host,
                self._driver.name,
                self._driver.detail(),
                authority=self.epochs.acknowledged,
                vms=records,
                catalogue=self._updates.catalogue,
                operation=self.operations.operation,
                guard=self._guard.state,
                refused_epoch=self.epochs.refused,
                installed=installed(
                    self._updates.catalogue,
                    self._finalizer.marks,
                    self._installed_probe.answers,
                    records.keys(),
                ),
                kernel=self._kernel.record,
            )
            await self._inventories.publish(message)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.inventory_interval_s):
                    await self._changed.wait()

    async def _records(self) -> dict[str, VmRecord]:
        ours = self._recovery.resuming.union(vm.vm for vm in self.operations.vms)
        return await self._view.records(ours, self._agents.with_canary)

    def reread(self) -> None:
        """Read the updates again; the inventory follows when they are read."""
        self._updates.reread()
        self._updates_changed()

    def _updates_changed(self) -> None:
        self._installed_probe.ask()
        self._changed.set()

    async def _watch_vms(self) -> None:
        self._take_members()
        while True:
            self._inspection.ask()
            await self._driver.changed()
            self._take_members()
            self._changed.set()

    def _take_members(self) -> None:
        """The VMs that a driver has found or lost."""
        if not isinstance(self._driver, MembershipCapable):
            return
        members = self._driver.members()
        left = self._vms.replace(members)
        self._statuses.left(left)
        self.bus.subscribe_also([each for vm in members for each in agent_filters(vm)])

    # -- commands and operations ----------------------------------------------------------------------------

    async def _on_coordinator(self, message: CoordinatorPresence, _: Received) -> None:
        await self.epochs.on_coordinator(message)

    async def _on_start(self, command: StartOperation, _: Received) -> None:
        await self._commands.on_start(command)

    async def _on_abort(self, command: AbortOperation, _: Received) -> None:
        await self._commands.on_abort(command)

    def _operation_ended(self) -> None:
        self._inspection.ask()
        self._installed_probe.ask()
        self._changed.set()

    def _announce(self, fact: VmFrozen | VmResumed, state: Operation) -> None:
        self.outbox.put(self._fact_factory.fact(fact), state)
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
        if message.vm not in self._vms or self._host_clock.error():
            return  # a wrong time is worse than none: the agent asks again
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

    async def _on_details(self, message: VmDetails, _: Received) -> None:
        self._details.published_earlier(message)

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
        if self._agents.record(message) and message.vm in self._vms:
            self._changed.set()  # the inventory says what can be shown of its memory

    def _clock_judged(self, verdict: VmClockSynced) -> None:
        fact = self._fact_factory.fact(verdict)
        self._journal.post(lambda journal: journal.judged(verdict.vm, verdict.operation, [fact]))
        self.outbox.queue(fact)

    # -- stop -----------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Complete or undo what is under way, publish the last facts, announce offline, leave the bus."""
        await self.operations.stop()
        if self.bus.stats.connected:
            # Without a verdict the rollout would halt, although nothing is wrong with the clocks.
            if not await self.clocks.wait_all_judged(_CLOCKS_S):
                _log.warning("clocks.left", vms=len(self.clocks))
            if not await self.outbox.drained(_FLUSH_S):
                _log.warning("outbox.left", letters=len(self.outbox))
            if not await self._statuses.drained(_FLUSH_S):
                _log.warning("vm_statuses.left")
            await self._presence.goodbye(timeout_s=2.0)
        self._updates.close()
        await self._pauses.close()
        await self._host_clock.close()
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
            "host clock": self._host_clock.error,
            "inventory": self._inventories.ping,
            "updates": self._updates.health_error,
            "pauses": self._view.health_error,
            "outbox": lambda: self.outbox.ping() or self._statuses.ping() or self._details.ping(),
            "guard": lambda: "there is no pause guard" if self._guard.state == "absent" else "",
        }

    def show_gauges(self) -> None:
        """Have the metrics read our numbers."""
        self._metrics.observe_bus(self.bus.stats, self.post.decode_errors)
        self._metrics.observe_gauges(
            outbox=lambda: len(self.outbox),
            refused=lambda: self.outbox.refused + self._statuses.refused + self._details.refused,
            clocks=lambda: len(self.clocks),
            busy=lambda: bool(self.operations.operation),
        )
