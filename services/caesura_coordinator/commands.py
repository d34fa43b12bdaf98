"""Which commands a rollout's state asks for: the same ones, again and again, until the hosts answer. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from caesura.contract.messages import AbortCommanded, FreezeCommanded, FreezeTarget
from caesura_coordinator.records import FINAL, HostOperation, Rollout, Wave
from caesura_coordinator.rollout import Authority


def due_commands(rollout: Rollout, authority: Authority) -> Iterable[FreezeCommanded | AbortCommanded]:
    """Commands for every operation of the current wave that has no final answer of its host."""
    wave = rollout.current
    if wave is None:
        return
    for operation in wave.operations:
        # A lost host is told to forget the operation for as long as the rollout waits for a decision.
        lost = operation.status == "lost" and rollout.status == "halted"
        # A host repeats its report and its verdicts on the clocks when it gets a command again that it has
        # carried out: the way to a verdict that was lost on its way.
        unheard = wave.status == "verifying" and any(
            vm.vm not in wave.clocks for vm in wave.vms if vm.host == operation.host and vm.method != "live"
        )
        open_ = unheard or (operation.status not in FINAL and wave.status == "started")
        if not lost and not open_:
            continue
        if lost or rollout.status == "aborting":
            yield AbortCommanded(
                operation=operation.operation,
                epoch=authority.epoch,
                coordinator=authority.coordinator,
                host=operation.host,
                reason=rollout.reason,
            )
        else:
            yield _freeze(rollout, wave, operation, authority)


def _freeze(rollout: Rollout, wave: Wave, operation: HostOperation, authority: Authority) -> FreezeCommanded:
    events = {each.set: each.event_id for each in wave.events}
    vms = [vm for vm in wave.vms if vm.host == operation.host]
    if (
        wave.not_after is None
    ):  # a started wave always has one; without it the host could not refuse a late command
        raise AssertionError(f"wave {wave.index} of rollout {rollout.id} was started without a deadline")
    return FreezeCommanded(
        operation=operation.operation,
        epoch=authority.epoch,
        coordinator=authority.coordinator,
        host=operation.host,
        rollout=rollout.id,
        wave=wave.index,
        method=vms[0].method,
        targets=tuple(
            FreezeTarget(
                vm=vm.vm, set=vm.set, update_domain=vm.update_domain, event_id=events.get(vm.set, "")
            )
            for vm in vms
        ),
        update="" if rollout.hold_s else rollout.update,
        hold_s=rollout.hold_s,
        budget_s=rollout.policy.budget_s,
        clock_bound_s=rollout.policy.clock_bound_s,
        not_after=wave.not_after,
    )
