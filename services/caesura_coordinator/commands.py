"""Which commands a rollout's state requires: the same ones, repeatedly, until the hosts answer. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

import msgspec

from caesura.contract.messages import AbortOperation, OperationTarget, PlannedVm, StartOperation
from caesura_coordinator.authority import Authority
from caesura_coordinator.members import has_verdict, members_of
from caesura_coordinator.records import FINAL, HostOperation, Rollout, Wave


class Due(msgspec.Struct, frozen=True):
    """A command to send or repeat; ``not_after`` is for a start."""

    operation: HostOperation
    what: Literal["start", "abort"]
    not_after: datetime | None = None


def due_operations(rollout: Rollout, authority: Authority) -> Iterable[Due]:
    """The commands for the operations of the current wave that lack a final answer of their host."""
    wave = rollout.current
    if wave is None:
        return
    for operation in (*wave.completed_operations, *wave.operations):
        # A lost host is commanded to abort the operation for as long as the rollout waits for a decision.
        lost = operation.status == "lost" and rollout.status == "halted"
        open_ = operation.status not in FINAL and wave.status == "started"
        if lost or (open_ and rollout.status == "aborting"):
            yield Due(operation, "abort")
        elif wave.status == "verifying" and wave.started_at is not None and _verdict_missing(wave, operation):
            # Its time has passed: a host that knows the operation repeats its report, and one that
            # has forgotten it (a lost journal) refuses instead of pausing its VMs a second time.
            yield Due(operation, "start", wave.started_at)
        elif open_ and wave.fence_epoch == authority.epoch and wave.not_after is not None:
            yield Due(operation, "start", wave.not_after)


def command_for(rollout: Rollout, due: Due, authority: Authority) -> StartOperation | AbortOperation:
    """The message of the command."""
    wave = rollout.current
    if wave is None:
        raise AssertionError(f"a command for rollout {rollout.id}, which has completed its waves")
    if due.what == "start" and due.not_after is not None:
        return _start_operation(rollout, wave, due.operation, authority, not_after=due.not_after)
    return AbortOperation(
        operation=due.operation.operation,
        epoch=authority.epoch,
        coordinator=authority.coordinator,
        host=due.operation.host,
        reason=rollout.reason,
    )


def _verdict_missing(wave: Wave, operation: HostOperation) -> bool:
    """Whether a verdict on a clock was lost in transit: a host repeats its report and its verdicts when it receives
    a command again that it has carried out."""
    mine = members_of(wave.vms).by_host.get(operation.host, ())
    return any(vm.vm not in wave.clocks for vm in mine if has_verdict(vm))


def _start_operation(
    rollout: Rollout, wave: Wave, operation: HostOperation, authority: Authority, *, not_after: datetime
) -> StartOperation:
    vms = members_of(wave.vms).by_host[operation.host]
    return StartOperation(
        operation=operation.operation,
        epoch=authority.epoch,
        coordinator=authority.coordinator,
        host=operation.host,
        rollout=rollout.id,
        wave=wave.index,
        method=vms[0].method,
        targets=tuple(
            OperationTarget(
                vm=vm.vm,
                set=vm.set,
                update_domain=vm.update_domain,
                event_id=_event_id(wave, vm),
            )
            for vm in vms
        ),
        update="" if rollout.hold_s else rollout.update,
        hold_s=rollout.hold_s,
        budget_s=rollout.policy.budget_s,
        clock_bound_s=rollout.policy.clock_bound_s,
        not_after=not_after,
    )


def _event_id(wave: Wave, vm: PlannedVm) -> str:
    """The id of the event that names the VM; empty if none does."""
    place = wave.event_place(vm.set, vm.host)
    return wave.events[place].event_id if place is not None else ""
