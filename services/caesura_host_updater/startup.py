"""At the start: everything that an earlier life left frozen runs again, every operation it left open has its end."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from datetime import UTC, datetime

import structlog

from caesura.contract.messages import OperationReported
from caesura_host_updater.applying import end_orphans
from caesura_host_updater.clock import ClockWait
from caesura_host_updater.drivers.port import Driver, DriverError, NotRunningYet, states_within
from caesura_host_updater.endings import Endings, Letters
from caesura_host_updater.guard.intent import Intent
from caesura_host_updater.guard.procfs import boot_id
from caesura_host_updater.guardian import Guardian, GuardUnavailable
from caesura_host_updater.journal import Entry, Journal, JournalThread, Letter
from caesura_host_updater.operation import wall
from caesura_host_updater.operation_state import Operation
from caesura_host_updater.recovery import recovered
from caesura_host_updater.report import clock_wait, final_report, frozen_fact, resumed_fact
from caesura_host_updater.threads import in_thread

_RESUME_TRY_S = 0.25  # s: one try of a resume
_STATES_S = 2.0  # s: to read the states of all VMs, which takes milliseconds
_ORPHANS_S = 10.0  # s: to find what an update left behind; stuck processes take half a second each
_PATIENCE_S = 10.0  # s: VMs found frozen are tried this long before the host goes on the bus without them

_log = structlog.get_logger("caesura.recovery")


async def resume_until_running(driver: Driver, vm: str) -> str:
    """Try until the VM runs, is gone, or is left to somebody else: ``running``, ``gone`` or ``left``."""
    while True:
        try:
            return await driver.resume(vm, _RESUME_TRY_S)
        except NotRunningYet as error:
            _log.error("vm.not_resumed_yet", vm=vm, why=error.why)
        except Exception as error:  # noqa: BLE001 - whatever it is, the VM must run: log it and go on
            _log.error("vm.resume_failed", vm=vm, why=repr(error))
            await asyncio.sleep(_RESUME_TRY_S)


class Startup:
    """See the module. ``late`` are resumes that still go on."""

    def __init__(
        self,
        host: str,
        *,
        driver: Driver,
        guardian: Guardian,
        journal: JournalThread,
        letters: Letters,
        endings: Endings,
    ) -> None:
        self._host = host
        self._driver = driver
        self._guardian = guardian
        self._journal = journal
        self._letters = letters
        self._endings = endings
        self.late: list[asyncio.Task[None]] = []
        self._resuming: set[asyncio.Task[None]] = set()
        self._settled: dict[str, asyncio.Event] = {}
        """VMs found frozen to what is set when they run, or are gone."""
        self._let_go = asyncio.Event()

    async def run(self, epoch: int) -> None:
        """Put everything right.

        Raises:
            StoreError: the journal cannot be read or written: nothing can be promised then.
        """
        held: Intent | None = None
        try:
            held = await self._guardian.start()
        except GuardUnavailable as error:
            _log.error("guard.absent", why=str(error))  # fails closed: nothing will be frozen without it
        await self._driver.open()
        resumed_now = await self._resume_left_frozen()
        for entry in await self._journal.do(Journal.unfinished):
            await self._end_orphans(entry)
            if waits := self._unsettled(entry):
                # Its end is told when its VMs run: until then nobody knows how long they were paused.
                self.late.append(asyncio.create_task(self._end_late(entry, waits, held, resumed_now, epoch)))
            else:
                await self._end(entry, held, resumed_now, epoch)
        if held is not None:
            try:
                await self._guardian.disarm(held.operation)
            except GuardUnavailable as error:
                _log.error("guard.not_disarmed", operation=held.operation, why=str(error))
        # Not before the guard let go: what was prepared tells it the way out.
        self._let_go.set()
        done = self._resuming - set(self.late)
        if done:
            await asyncio.wait(done)

    async def _end_orphans(self, entry: Entry) -> None:
        try:
            async with asyncio.timeout(_ORPHANS_S):
                await in_thread("orphans", lambda: end_orphans(entry.id, self._host, entry.update_processes))
        except TimeoutError:
            _log.error("update.orphans_unknown", operation=entry.id, why="/proc does not answer")

    async def _resume_left_frozen(self) -> dict[str, float]:
        frozen = [vm for vm, state in (await self._driver.read_states()).items() if state == "paused"]
        resumed: dict[str, float] = {}
        settled = self._settled = {vm: asyncio.Event() for vm in frozen}

        async def resume(vm: str) -> None:
            if await resume_until_running(self._driver, vm) == "running":
                resumed[vm] = time.monotonic()
            settled[vm].set()
            await self._let_go.wait()
            try:
                await self._driver.release(vm)
            except DriverError as error:
                _log.error("vm.not_released", vm=vm, why=error.why)

        tasks = {vm: asyncio.create_task(resume(vm)) for vm in frozen}
        if tasks:
            _log.error("vms.found_frozen", vms=frozen)
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    for each in settled.values():
                        await each.wait()
        self._resuming = set(tasks.values())
        self.late = [task for vm, task in tasks.items() if not settled[vm].is_set()]
        return resumed

    def _unsettled(self, entry: Entry) -> list[asyncio.Event]:
        """What is yet to be set for the VMs of an operation."""
        vms = entry.state.vms if entry.state is not None else ()
        events = (self._settled.get(vm.vm) for vm in vms)
        return [each for each in events if each is not None and not each.is_set()]

    async def _end_late(
        self,
        entry: Entry,
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
            await self._endings.conclude(report, op, waits, facts)

    async def _end(
        self, entry: Entry, held: Intent | None, resumed_now: dict[str, float], epoch: int
    ) -> None:
        ended = await self._ended(entry, held, resumed_now, epoch)
        if ended is None:
            return
        report, op, facts, waits = ended
        letters = [*facts, self._letters.report(report)]
        await self._journal.do(lambda journal: journal.finish(report, letters, waits))
        self._endings.count(report, op)

    async def _ended(
        self, entry: Entry, held: Intent | None, resumed_now: dict[str, float], epoch: int
    ) -> tuple[OperationReported, Operation, list[Letter], list[ClockWait]] | None:
        if entry.state is None or entry.command is None:
            # An operation without an end always has both: `accept` writes them in one transaction.
            return None
        command = entry.command
        op = recovered(entry.state, held, resumed_now, same_boot=entry.boot_id == boot_id())
        letters, waits = [], []
        for vm in op.vms:
            if vm.frozen_at is None or vm.resumed_at is None or vm.end in ("gone", "left"):
                continue
            waits.append(clock_wait(op, vm, command.clock_bound_s))
            # May have been told already: the same fact has the same id.
            letters.append(self._letters.fact(frozen_fact(self._host, op, vm.vm, wall)))
            if not vm.told:
                letters.append(self._letters.fact(resumed_fact(self._host, op, vm.vm, wall)))
        states = await states_within(self._driver, _STATES_S)
        report = final_report(self._host, command, op, epoch, states, datetime.now(UTC))
        return report, op, letters, waits
