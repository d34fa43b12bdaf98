"""Which commands a rollout's state asks for: the same ones, again and again, until the hosts answer. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from caesura.contract.messages import AbortOperation, OperationTarget, StartOperation
from caesura_coordinator.inputs import Authority
from caesura_coordinator.records import FINAL, HostOperation, Rollout, Wave


def due_commands(rollout: Rollout, authority: Authority) -> Iterable[StartOperation | AbortOperation]:
    """Commands for every operation of the current wave that has no final answer of its host."""
    wave = rollout.current
    if wave is None:
        return
    for operation in (*wave.done, *wave.operations):
        # A lost host is told to forget the operation for as long as the rollout waits for a decision.
        lost = operation.status == "lost" and rollout.status == "halted"
        # A host repeats its report and its verdicts on the clocks when it gets a command again that it has
        # carried out: the way to a verdict that was lost on its way.
        unheard = wave.status == "verifying" and any(
            vm.vm not in wave.clocks
            for vm in wave.vms
            if vm.host == operation.host and vm.method != "live" and vm.clock != "none"
        )
        open_ = operation.status not in FINAL and wave.status == "started"
        aborting = lost or (open_ and rollout.status == "aborting")
        if aborting:
            yield AbortOperation(
                operation=operation.operation,
                epoch=authority.epoch,
                coordinator=authority.coordinator,
                host=operation.host,
                reason=rollout.reason,
            )
        elif unheard and wave.started_at is not None:
            # Its time has passed: a host that knows the operation says again what became of it, and one that
            # has forgotten it (a lost journal) refuses instead of pausing its VMs a second time.
            yield _freeze(rollout, wave, operation, authority, not_after=wave.started_at)
        elif open_ and wave.fence_epoch == authority.epoch and wave.not_after is not None:
            yield _freeze(rollout, wave, operation, authority, not_after=wave.not_after)


def _freeze(
    rollout: Rollout, wave: Wave, operation: HostOperation, authority: Authority, *, not_after: datetime
) -> StartOperation:
    events = {each.set: each.event_id for each in wave.events}
    vms = [vm for vm in wave.vms if vm.host == operation.host]
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
                vm=vm.vm, set=vm.set, update_domain=vm.update_domain, event_id=events.get(vm.set, "")
            )
            for vm in vms
        ),
        update="" if rollout.hold_s else rollout.update,
        hold_s=rollout.hold_s,
        budget_s=rollout.policy.budget_s,
        clock_bound_s=rollout.policy.clock_bound_s,
        not_after=not_after,
    )
