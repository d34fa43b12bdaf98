"""Finalizes an operation: persists, publishes and counts its one end, and tracks the clocks of its VMs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime

from caesura.contract.messages import (
    AbortOperation,
    OperationReported,
)
from caesura.delivery.message import OutboxMessage
from caesura.runtime.errors import StoreError
from caesura.runtime.logs import get_logger
from caesura_host_updater.clocks.tracker import ClockSyncTracker
from caesura_host_updater.clocks.verdict import ClockCheck
from caesura_host_updater.command_admission import Repeat, Underway
from caesura_host_updater.inventory.installs import Mark, marks_of, remembered
from caesura_host_updater.journal import Journal, JournalThread
from caesura_host_updater.metrics import HostMetrics
from caesura_host_updater.operation.facts import FactFactory
from caesura_host_updater.operation.state import Operation
from caesura_host_updater.outbox import Outbox

_SAVE_RETRY_S = 1.0  # s: between two tries to write reports that a full disk did not take

_log = get_logger("caesura.pause")


def cancelled_before_it_began(
    host: str, command: AbortOperation, epoch: int, now: datetime
) -> OperationReported:
    """The end of an operation whose abort overtook its command."""
    why = "cancelled before it began"
    return OperationReported(
        operation=command.operation,
        host=host,
        epoch=epoch,
        status="cancelled",
        reason=f"{why}: {command.reason}" if command.reason else why,
        codes=("aborted",),
        at=now,
    )


class OperationFinalizer:
    """See the module."""

    def __init__(
        self,
        fact_factory: FactFactory,
        *,
        journal: JournalThread,
        outbox: Outbox,
        clocks: ClockSyncTracker,
        metrics: HostMetrics,
    ) -> None:
        self._fact_factory = fact_factory
        self._journal = journal
        self._outbox = outbox
        self._clocks = clocks
        self._metrics = metrics
        self._unsaved: dict[
            str, tuple[OperationReported, tuple[OutboxMessage, ...], tuple[ClockCheck, ...], tuple[Mark, ...]]
        ] = {}
        self.marks: tuple[Mark, ...] = ()
        """The updates that succeeded on this host."""

    async def load(self) -> None:
        """Load which updates succeeded before. Raises StoreError."""
        self.marks = tuple(await self._journal.do(Journal.installed))

    async def known(self, operation: str) -> Underway | Repeat | None:
        """What is known of an operation that is not under way. Raises StoreError."""
        if operation in self._unsaved:
            return Repeat(self._unsaved[operation][0])
        entry = await self._journal.do(lambda journal: journal.find(operation))
        if entry is None:
            return None
        return Underway() if entry.report is None else Repeat(entry.report)

    async def repeat_verdicts(self, operation: str) -> None:
        """Publish the verdicts on the clocks again: a coordinator that repeats a command may have missed them, too."""
        try:
            self._outbox.queue(*await self._journal.do(lambda journal: journal.verdicts(operation)))
        except StoreError as error:
            _log.warning("verdicts.not_repeated", operation=operation, why=str(error))

    async def finalize(
        self,
        report: OperationReported,
        state: Operation | None = None,
        waits: Sequence[ClockCheck] = (),
        facts: Sequence[OutboxMessage] = (),
    ) -> None:
        """Persist the end, publish it, and track the clocks. A full disk delays the writing only.

        Args:
            facts: what is published before the report.
        """
        messages = (*facts, *self._fact_factory.report(report))
        marks = marks_of(state, report.at) if state is not None else ()
        self.marks = remembered(self.marks, marks)
        try:
            await self._journal.do(lambda journal: journal.finish(report, messages, waits, marks))
        except StoreError as error:
            _log.error("report.not_written", operation=report.operation, why=str(error))
            self._unsaved[report.operation] = (report, messages, tuple(waits), marks)
        self._outbox.queue(*messages)
        self._clocks.track(waits)
        self.count(report, state)

    async def retry_unsaved(self) -> None:
        """Write what a full disk did not take. Never ends."""
        while True:
            await asyncio.sleep(_SAVE_RETRY_S)
            for operation, (report, messages, waits, marks) in list(self._unsaved.items()):
                # Judged in the meantime: after a restart nobody would answer for it any more.
                left = [wait for wait in waits if self._clocks.waits_for(wait)]
                with suppress(StoreError):
                    await self._journal.do(
                        lambda j, r=report, e=messages, w=left, m=marks: j.finish(r, e, w, m)  # type: ignore[misc]
                    )
                    del self._unsaved[operation]

    def count(self, report: OperationReported, state: Operation | None) -> None:
        """Metrics, and the canonical log lines: one for each pause, one for the operation."""
        self._metrics.finished(report, state)
        for vm in state.vms if state is not None else ():
            if vm.frozen_at is not None and state is not None:
                _log.info(
                    "pause.finished",
                    vm=vm.vm,
                    set=vm.set,
                    update_domain=vm.update_domain,
                    operation=state.operation,
                    method=state.method,
                    update=state.update,
                    pause_s=round(vm.pause_s, 4),
                    budget_s=state.budget_s,
                    resumed_by=vm.resumed_by,
                    end=vm.end,
                    error=vm.error,
                )
        log = _log.info if report.status in ("completed", "cancelled") else _log.error
        log("operation.finished", operation=report.operation, status=report.status, reason=report.reason)
