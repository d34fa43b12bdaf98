"""Accepted operations, run one at a time: from the journalled intent to the one report that ends each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from caesura.contract.messages import StartOperation, VmFrozen, VmResumed
from caesura.contract.reasons import ReasonCode
from caesura.delivery.message import OutboxMessage
from caesura.runtime.logs import get_logger
from caesura_host_updater.command_admission import STOPPING
from caesura_host_updater.drivers.port import Driver, states_within
from caesura_host_updater.guard_client import GuardClient
from caesura_host_updater.inventory.updates import UpdateFile
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation.crash_recovery import resume_until_running
from caesura_host_updater.operation.finalizer import OperationFinalizer
from caesura_host_updater.operation.report import clock_wait, final_report
from caesura_host_updater.operation.runner import Kernels, OperationRunner
from caesura_host_updater.operation.state import Operation, VmPause
from caesura_host_updater.outbox import Outbox
from caesura_host_updater.pause_markers import PauseMarkers
from caesura_host_updater.vm_view import STATES_S, VmView
from caesura_vmcontrol.procfs import boot_id

_log = get_logger("caesura.host_updater")


class CurrentOperation:
    """See the module.

    Args:
        environ: what updates inherit.
        epoch: the epoch that the host obeys now.
        announce: accepts each fact for the bus, with the state that makes it true; must not wait.
        on_change: called when the state of a VM may have changed.
        on_end: called when an operation has ended and the host is idle again.
        kernels: what method kexec asks of the host.
    """

    def __init__(
        self,
        host: str,
        *,
        driver: Driver,
        guard: GuardClient,
        journal: JournalThread,
        pauses: PauseMarkers,
        outbox: Outbox,
        finalizer: OperationFinalizer,
        view: VmView,
        environ: Mapping[str, str],
        epoch: Callable[[], int],
        announce: Callable[[VmFrozen | VmResumed, Operation], None],
        on_change: Callable[[], None],
        on_end: Callable[[], None],
        kernels: Kernels | None = None,
    ) -> None:
        self._kernels = kernels
        self._host = host
        self._driver = driver
        self._guard = guard
        self._journal = journal
        self._pauses = pauses
        self._outbox = outbox
        self._finalizer = finalizer
        self._view = view
        self._environ = environ
        self._epoch = epoch
        self._announce = announce
        self._on_change = on_change
        self._on_end = on_end
        self._runner: OperationRunner | None = None
        self._accepted: asyncio.Queue[OperationRunner] = asyncio.Queue()
        self._idle = asyncio.Event()
        self._idle.set()
        self.stopping = False
        """The host updater is stopping: nothing new begins."""

    @property
    def operation(self) -> str:
        """The operation under way, empty when idle."""
        return self._runner.state.operation if self._runner is not None else ""

    @property
    def vms(self) -> tuple[VmPause, ...]:
        """The VMs of the operation under way."""
        return self._runner.state.vms if self._runner is not None else ()

    @property
    def busy(self) -> bool:
        """From the moment that a command is accepted: it is persisted before there is an operation."""
        return bool(self.operation) or not self._idle.is_set()

    async def accept(
        self,
        command: StartOperation,
        state: Operation,
        update: UpdateFile | None,
        facts: Sequence[OutboxMessage],
    ) -> None:
        """Persist an operation, then run it. ``facts``: what says that it is accepted. Raises StoreError."""
        # `stop` waits for it from now on, though there is nothing to wait for before it is persisted.
        self._idle.clear()
        try:
            await self._begin(command, state, update, facts)
        except BaseException:
            self._idle.set()
            raise

    async def _begin(
        self,
        command: StartOperation,
        state: Operation,
        update: UpdateFile | None,
        facts: Sequence[OutboxMessage],
    ) -> None:
        # The intent is on disk before anything is done.
        await self._journal.do(lambda journal: journal.accept(command, state, boot_id(), facts))
        self._runner = OperationRunner(
            command,
            state,
            update,
            host=self._host,
            driver=self._driver,
            guard=self._guard,
            pauses=self._pauses,
            journal=self._journal,
            environ=self._environ,
            announce=self._announce,
            on_change=self._on_change,
            kernels=self._kernels,
            published=self._outbox.drained,
        )
        if self.stopping:
            self._runner.abort("host_stopping", STOPPING)
        self._outbox.queue(*facts)
        self._on_change()
        self._accepted.put_nowait(self._runner)
        _log.info("operation.accepted", operation=command.operation, update=state.update, vms=len(state.vms))

    def abort(self, code: ReasonCode, why: str) -> None:
        """Undo the operation under way, if there is one."""
        if self._runner is not None:
            self._runner.abort(code, why)

    async def run(self) -> None:
        """Run what is accepted. Never ends."""
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
                self._host,
                runner.command,
                state,
                self._epoch(),
                await states_within(self._driver, STATES_S),
                datetime.now(UTC),
            )
            waits = [
                clock_wait(state, vm, runner.command.clock_bound_s)
                for vm in state.vms
                if vm.frozen_at is not None and vm.end == "running" and self._view.has_clock(vm.vm)
            ]
            await self._finalizer.finalize(report, state, waits)
            self._runner = None
            self._idle.set()
            self._on_end()

    async def stop(self) -> None:
        """Accept nothing more; complete or undo what is under way."""
        self.stopping = True
        runner = self._runner
        if runner is not None and (runner.state.deadlines is None or not _update_runs(runner.state)):
            runner.abort("host_stopping", STOPPING)
        await self._idle.wait()


def _update_runs(op: Operation) -> bool:
    """Whether an update is at work under paused VMs: it may complete, within the budget."""
    return op.phase in ("updating", "updated", "resuming", "resumed") and bool(op.update)
