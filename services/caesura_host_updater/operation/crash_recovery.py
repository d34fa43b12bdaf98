"""At the start: every VM that a previous run left paused runs again, every operation it left open gets its end.

Resume first: what is paused with our marker is resumed before anything else is needed, least of all the journal,
which may be on a full disk or damaged. What is paused without our marker was paused by somebody else and stays paused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import MappingProxyType

from caesura.contract.messages import KernelFigure, OperationReported
from caesura.delivery.message import OutboxMessage
from caesura.runtime.errors import StoreError
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.clocks.verdict import ClockCheck
from caesura_host_updater.drivers.port import (
    AdoptionCapable,
    Driver,
    DriverError,
    NotRunningYet,
    states_within,
)
from caesura_host_updater.guard_client import GuardClient, GuardUnavailable
from caesura_host_updater.inventory.installs import marks_of
from caesura_host_updater.journal import Journal, JournalEntry, JournalThread
from caesura_host_updater.operation.crash_outcome import recovered
from caesura_host_updater.operation.facts import FactFactory
from caesura_host_updater.operation.finalizer import OperationFinalizer
from caesura_host_updater.operation.kernel_change_outcome import (
    arrived,
    figure_of,
    rehearsal_figure,
    undecided,
)
from caesura_host_updater.operation.report import clock_wait, final_report, frozen_fact, resumed_fact
from caesura_host_updater.operation.runner import to_wall_clock
from caesura_host_updater.operation.state import BEFORE_SAVING, Operation, Phase
from caesura_host_updater.operation.vm_actions import started
from caesura_host_updater.pause_markers import PauseMarkers, how_to_resume
from caesura_host_updater.update_process import end_orphans
from caesura_host_updater.vm_view import STATES_S, plan_of
from caesura_vmcontrol.boots import of_another_boot
from caesura_vmcontrol.claims import BadClaim
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.kernel_change import HostClock
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.qemu_plans import ReplacePlan
from caesura_vmcontrol.qemu_replace import give_up

_RESUME_TRY_S = 0.25  # s: one try of a resume
_ORPHANS_S = 10.0  # s: to find what an update left behind; stuck processes take half a second each
_PATIENCE_S = 10.0  # s: VMs found frozen are retried this long before the host joins the bus without them
_NOBODY = "the pause guard has no record of its operation, or says that its memory is lost: nothing shows what became of its memory"
_RUNNING_AGAIN: frozenset[Phase] = frozenset(("resumed", "ended"))
_ASK_S = 1.0  # s: between two questions to the guard about VMs that wait in their files

_log = get_logger("caesura.recovery")


async def resume_until_running(
    driver: Driver, vm: str, is_lost: Callable[[str], Awaitable[bool]] | None = None
) -> str:
    """Try until the VM runs, is gone, or is left to somebody else: ``running``, ``gone`` or ``left``.

    ``is_lost`` is called with its name after each try that was in vain: whether no try of this boot can succeed.
    """
    said = ""
    while True:
        try:
            return await driver.resume(vm, _RESUME_TRY_S)
        except NotRunningYet as error:
            if error.why != said:  # it may wait for days
                _log.error("vm.not_resumed_yet", vm=vm, why=error.why)
                said = error.why
            if is_lost is not None and await is_lost(vm):
                return "gone"
        except Exception as error:  # noqa: BLE001 - whatever it is, the VM must run: log it and continue
            _log.error("vm.resume_failed", vm=vm, why=repr(error))
            await asyncio.sleep(_RESUME_TRY_S)


async def resume_marked(pauses: PauseMarkers) -> Mapping[str, float]:
    """Resume what is paused with our marker, from the markers alone: before anything else is looked at.

    Returns:
        Which VMs run again, and since when in seconds on CLOCK_MONOTONIC. The others are left to the driver.
    """
    found = await pauses.found_paused()
    if found is None:
        return {}
    _log.error("vms.found_paused", vms=[plan.vm for plan in found.plans], operation=found.operation)
    return await pauses.resume(found, _PATIENCE_S)


class CrashRecovery:
    """See the module. ``late`` are resumes that have not succeeded yet.

    Args:
        resumed: what ``resume_marked`` returned.
        has_clock: whether a VM's clock is judged after a pause.
        measured: keeps how long a change of the host's kernel took.
        clock_unsure: called where the host's clock could not be carried over that, with how far it may be off, in seconds.
    """

    def __init__(
        self,
        host: str,
        *,
        driver: Driver,
        guard: GuardClient,
        journal: JournalThread,
        fact_factory: FactFactory,
        finalizer: OperationFinalizer,
        pauses: PauseMarkers,
        resumed: Mapping[str, float],
        has_clock: Callable[[str], bool],
        measured: Callable[[KernelFigure], Awaitable[None]] | None = None,
        clock_unsure: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._clock_unsure = clock_unsure
        self._measured = measured
        self._host = host
        self._driver = driver
        self._guard = guard
        self._journal = journal
        self._fact_factory = fact_factory
        self._finalizer = finalizer
        self._pauses = pauses
        self._has_clock = has_clock
        self._held: Intent | None = None
        self._guard_answered = False
        self._noted_clock: HostClock | None = None
        self._resumed = dict(resumed)
        self._adopted = False
        self._unsaved: list[tuple[OperationReported, Operation, list[OutboxMessage], list[ClockCheck]]] = []
        """Reports that a full disk did not take."""
        self.late: list[asyncio.Task[None]] = []
        self._resuming: set[asyncio.Task[None]] = set()
        self._settled: dict[str, asyncio.Event] = {}
        """VMs found frozen, to the event that is set when they run, or are gone."""
        self._guard_released = asyncio.Event()

    async def resume_paused(self) -> None:
        """Find all VMs and resume what is still paused with our marker. Needs no journal, and no space on a disk."""
        self._adopted = True
        try:
            self._held = await self._guard.start()
            self._guard_answered = True
            self._note_clock(self._held)
        except GuardUnavailable as error:
            _log.error("guard.absent", why=str(error))  # fails closed: nothing will be frozen without it
        await self._driver.open()
        await self._resume_left_paused()

    async def run(self, epoch: int) -> None:
        """Give every operation that was left open its end.

        Raises:
            StoreError: the journal cannot be read: nothing can be promised then.
        """
        if not self._adopted:
            await self.resume_paused()
        held, resumed_now = self._held, self._resumed
        arriving = False
        for entry in await self._journal.do(Journal.unfinished):
            await self._end_orphans(entry)
            if _left_its_kernel(entry) and not (self._guard_answered and _is_decided(held, entry.id)):
                # Its end is published when the guard says what became of every VM, however long that takes: one that waits
                # in its files is not lost.
                arriving = True
                self.late.append(asyncio.create_task(self._end_arrived(entry, epoch)))
            elif entry.state is not None and entry.state.method == "reboot":
                # Its end is published when its VMs are up: that may take as long as a guest takes to shut down and boot.
                self.late.append(asyncio.create_task(self._end_reboot(entry, entry.state, epoch)))
            elif waits := self._unsettled(entry):
                # Its end is published when its VMs run: until then it is unknown how long they were paused.
                self.late.append(asyncio.create_task(self._end_late(entry, waits, held, resumed_now, epoch)))
            else:
                await self._end(entry, held, resumed_now, epoch)
        if held is not None and not arriving:
            await self._keep_rehearsal(held)
            await self._disarm(held.operation)
        done = self._resuming - set(self.late)
        if arriving:
            self.late += done
            return
        # Not before the guard released the operation: what was prepared defines its way out.
        self._guard_released.set()
        if done:
            await asyncio.wait(done)

    async def _disarm(self, operation: str) -> bool:
        try:
            await self._guard.disarm(operation)
        except GuardUnavailable as error:
            _log.error("guard.not_disarmed", operation=operation, why=str(error))
            return False
        return True

    async def _end_arrived(self, entry: JournalEntry, epoch: int) -> None:
        """Ask the guard until it says what became of every VM; then the end is published, and the guard is disarmed."""
        said = ""
        while True:
            try:
                record = await self._guard.held()
            except GuardUnavailable as error:
                why = str(error)
            else:
                self._note_clock(record)
                if _is_decided(record, entry.id):
                    break
                why = "; ".join(undecided(record, boot_id())) if record is not None else ""
            if why != said:
                _log.error("operation.not_arrived", operation=entry.id, why=why)
                said = why
            await asyncio.sleep(_ASK_S)
        ended = await self._ended(entry, record, self._resumed, epoch)
        if ended is not None:
            report, op, facts, waits = ended
            await self._finalizer.finalize(report, op, waits, facts)
        while True:
            if record is None or await self._disarm(record.operation):
                break
            await asyncio.sleep(_ASK_S)
        self._guard_released.set()

    def _note_clock(self, record: Intent | None) -> None:
        """Before a guest is set by this host's clock: whether the boot that arrived could set it."""
        change = record.kernel_change if record is not None else None
        arrival = change.arrival if change is not None else None
        if arrival is None or arrival.boot_id != boot_id() or arrival.clock == self._noted_clock:
            return
        self._noted_clock = arrival.clock
        if arrival.clock.source != "tsc":
            self._clock_unsure(arrival.clock.uncertainty_s)

    async def _keep_rehearsal(self, held: Intent) -> None:
        figure = rehearsal_figure(held, datetime.now(UTC))
        await self._keep_figure(figure)
        change = held.kernel_change
        if figure is None and change is not None and change.rehearsal:
            found = change.arrival.vms.items() if change.arrival is not None else ()
            why = (
                "; ".join(each.why for _, each in found if each.why)
                or "the kernel was not left, or another one runs"
            )
            _log.error("rehearsal.not_measured", kernel=change.expected_release, why=why)

    async def _keep_figure(self, figure: KernelFigure | None) -> None:
        if figure is not None and self._measured is not None:
            await self._measured(figure)

    async def _end_orphans(self, entry: JournalEntry) -> None:
        try:
            async with asyncio.timeout(_ORPHANS_S):
                await in_thread("orphans", lambda: end_orphans(entry.id, self._host, entry.update_processes))
        except TimeoutError:
            _log.error("update.orphans_unknown", operation=entry.id, why="/proc does not answer")

    async def _resume_left_paused(self) -> None:
        """The driver's way for marked VMs that do not run by now; what somebody else paused is left to them."""
        marked = await self._pauses.read()
        adopted: Collection[str] = ()
        if isinstance(self._driver, AdoptionCapable):
            now = boot_id()
            adopted = self._driver.adopt(
                each.plan for each in marked.values() if each is not None and each.boot_id == now
            )
        states = await self._driver.read_states()
        # A marked VM that does not answer may be paused as well: `resume` finds out.
        held = {
            vm: plan_of(self._driver, vm) for vm, state in states.items() if state in ("paused", "unknown")
        }
        ours = [vm for vm, plan in held.items() if vm in marked and self._pauses.is_ours(marked[vm], plan)]
        # An updater or guard decided which process has the guest: that is a mark, too, and nobody else can complete it.
        ours += [vm for vm in await self._pauses.claimed(held) if vm not in ours]
        for vm, state in states.items():
            if state == "paused" and vm not in ours:
                how = how_to_resume(plan_of(self._driver, vm))
                _log.warning("vm.paused_by_somebody_else", vm=vm, hint=how)
        settled = self._settled = {vm: asyncio.Event() for vm in ours}

        async def resume(vm: str) -> None:
            if await resume_until_running(self._driver, vm, self._give_up) == "running":
                self._resumed[vm] = time.monotonic()
            self._pauses.remove([vm])
            settled[vm].set()
            await self._release(vm)

        tasks = {vm: asyncio.create_task(resume(vm)) for vm in ours}
        if tasks:
            _log.error("vms.found_frozen", vms=ours)
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    for each in settled.values():
                        await each.wait()
        self._resuming = set(tasks.values())
        self._resuming |= {asyncio.create_task(self._release(vm)) for vm in adopted if vm not in ours}
        self.late = [task for vm, task in tasks.items() if not settled[vm].is_set()]
        # Those of VMs that run (an updater that died between marker and freeze, or between resume and removal), that
        # ended, that somebody else has paused since, or that are not in the host file any more.
        self._pauses.remove(vm for vm in marked if vm not in ours)

    async def _release(self, vm: str) -> None:
        await self._guard_released.wait()
        try:
            await self._driver.release(vm)
        except DriverError as error:
            _log.error("vm.not_released", vm=vm, why=error.why)

    async def _give_up(self, vm: str) -> bool:
        """A VM of another boot whose operation the guard does not hold, or knows to be lost, waits in its files for nobody.

        The guard's record may have been garbled, or its carve-out have come too late. Where there is no carve-out in this boot, nothing
        can be noted in it: then the guard's word is what there is, and a later boot gives the VM up.

        Returns:
            Whether no try of this boot can resume it.
        """
        plan = plan_of(self._driver, vm)
        if not isinstance(plan, ReplacePlan) or not of_another_boot(plan):
            return False
        try:
            record = await self._guard.held()
        except GuardUnavailable:
            return False  # asked again at the next try
        if _waits_for(record, plan):
            return False
        try:
            await in_thread(f"give up {vm}", lambda: give_up(plan, _NOBODY))
        except (OSError, BadClaim) as error:
            if not _is_lost(record, vm):
                return False
            _log.error("vm.not_given_up", vm=vm, why=str(error))
            return True
        return False  # the next try finds it gone

    @property
    def resuming(self) -> frozenset[str]:
        """The VMs that were found paused with our marker and do not run yet."""
        return frozenset(vm for vm, settled in self._settled.items() if not settled.is_set())

    def _unsettled(self, entry: JournalEntry) -> list[asyncio.Event]:
        """The events that are not set yet for the VMs of an operation."""
        vms = entry.state.vms if entry.state is not None else ()
        events = (self._settled.get(vm.vm) for vm in vms)
        return [each for each in events if each is not None and not each.is_set()]

    async def _end_late(
        self,
        entry: JournalEntry,
        waits_for: list[asyncio.Event],
        held: Intent | None,
        resumed_now: dict[str, float],
        epoch: int,
    ) -> None:
        for each in waits_for:
            await each.wait()
        ended = await self._ended(entry, held, resumed_now, epoch)
        if ended is not None:
            report, op, facts, waits = ended
            await self._finalizer.finalize(report, op, waits, facts)

    async def _end_reboot(self, entry: JournalEntry, op: Operation, epoch: int) -> None:
        """Start what an operation by method reboot had shut down, or was shutting down, then give it its end."""
        # The instants of the journal are another run's: a guest may have been asked just before that one ended.
        down_by = time.monotonic() + op.shutdown_s
        not_started: dict[str, str] = {}

        async def start(vm: str) -> None:
            try:
                await started(self._driver, vm, down_by)
            except DriverError as error:
                not_started[vm] = error.why
                _log.error("vm.not_started", vm=vm, why=error.why)

        await asyncio.gather(*(start(vm.vm) for vm in op.vms))
        ended = await self._ended(entry, self._held, self._resumed, epoch, not_started)
        if ended is not None:
            report, op, facts, waits = ended
            await self._finalizer.finalize(report, op, waits, facts)

    async def _end(
        self, entry: JournalEntry, held: Intent | None, resumed_now: dict[str, float], epoch: int
    ) -> None:
        ended = await self._ended(entry, held, resumed_now, epoch)
        if ended is None:
            return
        report, op, facts, waits = ended
        messages = [*facts, *self._fact_factory.report(report)]
        try:
            marks = marks_of(op, report.at)
            await self._journal.do(lambda journal: journal.finish(report, messages, waits, marks))
        except StoreError as error:
            # A full disk: it is published nevertheless, and recorded when there is space.
            _log.error("report.not_written", operation=report.operation, why=str(error))
            self._unsaved.append((report, op, facts, waits))
        else:
            self._finalizer.count(report, op)

    async def finalize_unsaved(self) -> None:
        """Publish the ends that the disk did not take; call it when the outbox was loaded."""
        for report, op, facts, waits in self._unsaved:
            await self._finalizer.finalize(report, op, waits, facts)
        self._unsaved.clear()

    async def _ended(
        self,
        entry: JournalEntry,
        held: Intent | None,
        resumed_now: dict[str, float],
        epoch: int,
        not_started: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[OperationReported, Operation, list[OutboxMessage], list[ClockCheck]] | None:
        if entry.state is None or entry.command is None:
            # An operation without an end always has both: `accept` writes them in one transaction.
            return None
        command = entry.command
        same_boot = entry.boot_id == boot_id()
        if _left_its_kernel(entry):
            change = held.kernel_change if held is not None and held.operation == entry.id else None
            op = arrived(entry.state, change, wall_s=time.time(), now=time.monotonic())
            await self._keep_figure(figure_of(op, change, datetime.now(UTC)))
        else:
            op = recovered(entry.state, held, resumed_now, same_boot=same_boot, not_started=not_started)
        messages, waits = [], []
        for vm in op.vms:
            if vm.frozen_at is None or vm.resumed_at is None or vm.end in ("gone", "left"):
                continue
            if self._has_clock(vm.vm):
                waits.append(clock_wait(op, vm, command.clock_bound_s))
            # May have been published already: the same fact has the same id.
            messages.append(self._fact_factory.fact(frozen_fact(self._host, op, vm.vm, to_wall_clock)))
            if not vm.resume_published:
                messages.append(self._fact_factory.fact(resumed_fact(self._host, op, vm.vm, to_wall_clock)))
        states = await states_within(self._driver, STATES_S)
        report = final_report(self._host, command, op, epoch, states, datetime.now(UTC))
        return report, op, messages, waits


def _waits_for(record: Intent | None, plan: ReplacePlan) -> bool:
    """Whether the guard holds this very operation, and does not say that the VM is lost."""
    change = record.kernel_change if record is not None else None
    if record is None or change is None:
        return False
    there = change.arrival.vms.get(plan.vm) if change.arrival is not None else None
    held = any(isinstance(each, ReplacePlan) and each.claims == plan.claims for each in record.plans)
    return held and (there is None or there.end != "lost")


def _is_lost(record: Intent | None, vm: str) -> bool:
    """Whether the guard found in this boot that the VM's memory is not what it was."""
    arrival = (
        record.kernel_change.arrival if record is not None and record.kernel_change is not None else None
    )
    there = arrival.vms.get(vm) if arrival is not None and arrival.boot_id == boot_id() else None
    return there is not None and there.end == "lost"


def _left_its_kernel(entry: JournalEntry) -> bool:
    """Whether its VMs were being saved, or were saved, when another kernel followed."""
    state = entry.state
    return (
        state is not None
        and state.method == "kexec"
        and entry.boot_id != boot_id()
        and state.phase not in BEFORE_SAVING
        and state.phase not in _RUNNING_AGAIN
    )


def _is_decided(record: Intent | None, operation: str) -> bool:
    """Whether the guard knows what became of every VM of an operation, or knows nothing of it."""
    return record is None or record.operation != operation or not undecided(record, boot_id())
