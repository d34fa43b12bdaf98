"""Whether a wave came out well: what is wrong for good, and what is not known yet. Pure."""

from __future__ import annotations

from caesura.contract.messages import Policy
from caesura_coordinator.records import Wave


def verify(wave: Wave, policy: Policy) -> tuple[list[str], list[str]]:
    """What is wrong with the wave for good, and what is not known yet."""
    wrong: list[str] = []
    missing: list[str] = []
    for operation in (*wave.done, *wave.operations):
        told = {result.vm for result in operation.vms}
        wrong += [
            f"{vm.vm}: {operation.host} reported nothing about it"
            for vm in wave.vms
            if vm.host == operation.host and vm.vm not in told
        ]
        for result in operation.vms:
            if result.state != "running":
                wrong.append(f"{result.vm} is {result.state} after the resume")
            if result.pause_s > policy.budget_s:
                wrong.append(f"{result.vm} was paused {result.pause_s:.3f} s, budget {policy.budget_s:g} s")
            if result.memory is not None and not result.memory.ok:
                wrong.append(f"{result.vm} changed in memory during the pause: {result.memory.detail}")
    for vm in wave.vms:
        if vm.method == "live":
            continue
        clock = wave.clocks.get(vm.vm)
        if clock is None:
            missing.append(f"{vm.vm}: no verdict on its clock")
            continue
        if clock.memory_ok is False:
            wrong.append(f"{vm.vm} is not the guest it was before the pause (heartbeat)")
        if policy.on_unsynced == "halt" and not clock.synced:
            wrong.append(f"{vm.vm} is unsynced: {clock.reason or 'its clock could not be put right'}")
        elif (
            policy.on_unsynced == "halt"
            and clock.error_after_s is not None
            and abs(clock.error_after_s) > policy.clock_bound_s
        ):
            wrong.append(
                f"{vm.vm} is {clock.error_after_s:+.3f} s off after its sync (bound {policy.clock_bound_s:g} s)"
            )
    return wrong, missing
