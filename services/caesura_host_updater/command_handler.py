"""Handles the commands of the coordinator: start and abort an operation. What they may do is decided by ``command_admission``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime

from caesura.contract.messages import AbortOperation, StartOperation, VmRecord
from caesura.lifecycle.budget import SHUTDOWN_S
from caesura.runtime.errors import StoreError
from caesura.runtime.logs import get_logger
from caesura_host_updater import command_admission as rules
from caesura_host_updater.agent_registry import AgentRegistry
from caesura_host_updater.clocks.tracker import ClockSyncTracker
from caesura_host_updater.command_admission import (
    AbortRunning,
    Accept,
    Ignore,
    Refuse,
    Repeat,
    Tombstone,
    Underway,
)
from caesura_host_updater.drivers.port import Driver
from caesura_host_updater.epoch_tracker import EpochTracker
from caesura_host_updater.installed_probe import InstalledProbe
from caesura_host_updater.inventory.catalogue_reader import CatalogueReader
from caesura_host_updater.inventory.updates import UpdateFile
from caesura_host_updater.operation.current_operation import CurrentOperation
from caesura_host_updater.operation.facts import FactFactory
from caesura_host_updater.operation.finalizer import OperationFinalizer, cancelled_before_it_began
from caesura_host_updater.operation.kernel_jump import NO_DIGEST
from caesura_host_updater.operation.report import status_report
from caesura_host_updater.operation.state import Operation, UpdateRun, VmPause
from caesura_host_updater.outbox import Outbox

_log = get_logger("caesura.host_updater")


class CommandHandler:
    """See the module.

    Args:
        records: the VMs of this host by name, as they are now.
    """

    def __init__(
        self,
        host: str,
        *,
        driver: Driver,
        epochs: EpochTracker,
        operations: CurrentOperation,
        finalizer: OperationFinalizer,
        fact_factory: FactFactory,
        outbox: Outbox,
        clocks: ClockSyncTracker,
        updates: CatalogueReader,
        installed_probe: InstalledProbe,
        agents: AgentRegistry,
        records: Callable[[], Awaitable[dict[str, VmRecord]]],
    ) -> None:
        self._host = host
        self._driver = driver
        self._epochs = epochs
        self._operations = operations
        self._finalizer = finalizer
        self._fact_factory = fact_factory
        self._outbox = outbox
        self._clocks = clocks
        self._updates = updates
        self._installed_probe = installed_probe
        self._agents = agents
        self._records = records

    async def _known(self, operation: str) -> Underway | Repeat | None:
        if operation == self._operations.operation:
            return Underway()
        return await self._finalizer.known(operation)

    async def on_start(self, command: StartOperation) -> None:
        """A command to start an operation: accept, refuse, repeat its report, or ignore it."""
        now = datetime.now(UTC)
        try:
            known = await self._known(command.operation)
            observed = await self._epochs.observe(command.epoch, command.coordinator)
            verdict = rules.evaluate_start(
                command,
                host=rules.Host(
                    host=self._host,
                    vms=await self._records(),
                    catalogue=self._updates.catalogue,
                    busy=self._operations.operation,
                    stopping=self._operations.stopping,
                ),
                authority=observed,
                known=known,
                now=now,
            )
            if isinstance(verdict, Accept):
                await self._accept(command, verdict.update)
                return
        except StoreError as error:
            if command.operation == self._operations.operation:
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
                else status_report(self._host, command, self._epoch, "accepted", now)
            )
            self._outbox.queue(*self._fact_factory.report(report))
            await self._finalizer.repeat_verdicts(command.operation)
            _log.debug("command.repeated", operation=command.operation, status=report.status)
            return
        _log.warning("command.refused", operation=command.operation, why=verdict.why)
        await self._refuse(command, verdict, now)

    @property
    def _epoch(self) -> int:
        return self._epochs.authority.epoch

    async def _refuse(self, command: StartOperation, refusal: Refuse, now: datetime) -> None:
        report = status_report(
            self._host,
            command,
            self._epoch,
            "refused",
            now,
            reason=refusal.why,
            codes=(refusal.code,),
        )
        await self._finalizer.finalize(report)

    async def _accept(self, command: StartOperation, update: UpdateFile | None) -> None:
        kernels = await self._clocks.kernel_boot_ids([target.vm for target in command.targets])
        if self._operations.stopping:  # while the guests were asked
            await self._refuse(command, Refuse("host_stopping", rules.STOPPING), datetime.now(UTC))
            return
        state = new_operation(command, update, self._driver, self._agents, kernels)
        accepted = self._fact_factory.report(
            status_report(self._host, command, self._epoch, "accepted", datetime.now(UTC))
        )
        self._installed_probe.interrupt()
        await self._operations.accept(command, state, update, accepted)

    async def on_abort(self, command: AbortOperation) -> None:
        """A command to abort an operation, under way or not begun."""
        try:
            known = await self._known(command.operation)
            observed = await self._epochs.observe(command.epoch, command.coordinator)
        except StoreError as error:
            _log.error("abort.without_journal", operation=command.operation, why=str(error))
            if command.operation == self._operations.operation:
                self._operations.abort("aborted", command.reason)  # resuming VMs needs no disk
            return
        verdict = rules.evaluate_abort(
            command, busy=self._operations.operation, authority=observed, known=known
        )
        if isinstance(verdict, Ignore):
            _log.warning("abort.ignored", operation=command.operation, why=verdict.why)
        elif isinstance(verdict, AbortRunning):
            self._operations.abort("aborted", command.reason)
        elif isinstance(verdict, Repeat):
            self._outbox.queue(*self._fact_factory.report(verdict.report))
        elif isinstance(verdict, Tombstone):
            await self._finalizer.finalize(
                cancelled_before_it_began(self._host, command, self._epoch, datetime.now(UTC))
            )


def new_operation(
    command: StartOperation,
    update: UpdateFile | None,
    driver: Driver,
    agents: AgentRegistry,
    kernels: Mapping[str, str],
) -> Operation:
    """The operation that a command starts.

    ``kernels``: the boot ids of the guests' kernels by VM, as read through the driver.
    """
    scope_vm = update is not None and update.scope == "vm"
    digests = command.method != "kexec"
    can = {target.vm: driver.capabilities(target.vm) for target in command.targets}
    return Operation(
        operation=command.operation,
        method=command.method,
        budget_s=command.budget_s,
        hold_s=command.hold_s,
        update=update.name if update else "",
        update_version=update.version if update else "",
        update_timeout_s=update.timeout_s if update else 0.0,
        shutdown_s=update.shutdown_s if update else SHUTDOWN_S,
        kill_after_timeout=update is not None and update.kill_after_timeout,
        kernel_release=update.kernel_release if update else "",
        vms=tuple(
            VmPause(
                vm=target.vm,
                set=target.set,
                update_domain=target.update_domain,
                event_id=target.event_id,
                boot_id=agent.boot_id if (agent := agents.get(target.vm)) else "",
                kernel_boot_id=kernels[target.vm],
                can_digest=digests and "digest_equal" in can[target.vm].digests,
                can_sample=digests and "sampled_digest_equal" in can[target.vm].digests,
                no_digest=can[target.vm].no_digest if digests else NO_DIGEST,
                canary_writes=agent.canary_writes if agent and agent.canary_bytes else 0,
            )
            for target in command.targets
        ),
        runs=tuple(UpdateRun(key=target.vm) for target in command.targets)
        if scope_vm
        else (UpdateRun(),) * (update is not None),
    )
