"""Whether a wave succeeded: its definite failures, and what is not known yet. Pure."""

from __future__ import annotations

from caesura.contract.messages import PlannedVm, Policy, VmResult
from caesura.contract.reasons import Reason
from caesura.lifecycle.proof import BROKEN_WORDS
from caesura_coordinator.members import has_verdict, members_of
from caesura_coordinator.proofs import unproven
from caesura_coordinator.records import ClockVerdict, HostOperation, Wave


def verify(wave: Wave, policy: Policy) -> tuple[list[Reason], list[Reason]]:
    """The definite failures of the wave, and what is not known yet."""
    members = members_of(wave.vms)
    wrong: list[Reason] = []
    missing: list[Reason] = []
    frozen: dict[tuple[str, str], VmResult] = {}
    for operation in (*wave.completed_operations, *wave.operations):
        frozen |= {(operation.host, each.vm): each for each in operation.vms if each.frozen}
        wrong += _of_results(operation, members.by_host.get(operation.host, ()), policy)
    for vm in wave.vms:
        result, clock = frozen.get((vm.host, vm.vm)), wave.clocks.get(vm.vm)
        wrong_here, missing_here = verify_vm(vm, result, clock, policy)
        wrong += wrong_here
        missing += missing_here
    return wrong, missing


def host_verified(wave: Wave, operation: HostOperation, policy: Policy) -> bool:
    """Whether a host has done its part and nothing about it is wrong or still unknown."""
    mine = members_of(wave.vms).by_host.get(operation.host, ())
    if operation.status != "completed" or any(vm.vm not in wave.clocks for vm in mine if has_verdict(vm)):
        return False
    if _of_results(operation, mine, policy):
        return False
    frozen = {each.vm: each for each in operation.vms if each.frozen}
    return not any(
        found for vm in mine for found in verify_vm(vm, frozen.get(vm.vm), wave.clocks.get(vm.vm), policy)
    )


def verify_vm(
    vm: PlannedVm, result: VmResult | None, clock: ClockVerdict | None, policy: Policy
) -> tuple[list[Reason], list[Reason]]:
    """The same for the clock and the memory of one VM.

    Args:
        result: the host's result for it, if it was paused.
        clock: the host's verdict on its clock afterwards, if it has arrived.
    """
    if vm.method in ("live", "reboot"):
        return [], []  # no pause: no memory to compare, no clock to correct
    why = unproven(vm, policy, result.memory, clock) if result is not None else ""
    unshown = [Reason("memory_unproven", why)] if why else []
    if vm.clock == "none":
        return unshown, []
    if clock is None:
        missing = [Reason("clock_unknown", f"{vm.vm}: no verdict on its clock")]
        missing += [Reason("memory_unproven", f"{why}; its guest has not answered")] if why else []
        return [], missing
    wrong = _of_memory(vm.vm, clock) + unshown
    if policy.on_unsynced == "halt":
        wrong += _of_clock(vm.vm, clock, policy.clock_bound_s)
    return wrong, []


def _of_results(operation: HostOperation, vms: tuple[PlannedVm, ...], policy: Policy) -> list[Reason]:
    """The failures in a host's report about its VMs."""
    ours = {vm.vm for vm in vms}
    # Its report about another host's VM does not count.
    results = [each for each in operation.vms if each.vm in ours]
    reported = {each.vm for each in results}
    wrong = [
        Reason("result_missing", f"{vm.vm}: {operation.host} reported nothing about it")
        for vm in vms
        if vm.vm not in reported
    ]
    for result in results:
        if result.state != "running":
            wrong.append(Reason("vm_not_running", f"{result.vm} is {result.state} after the resume"))
        if result.pause_s > policy.budget_s:
            over = f"{result.vm} was paused {result.pause_s:.3f} s, budget {policy.budget_s:g} s"
            wrong.append(Reason("pause_over_budget", over))
        if result.memory is not None and not result.memory.ok:
            changed = f"{result.vm} changed in memory during the pause: {result.memory.detail}"
            wrong.append(Reason("memory_changed", changed))
    return wrong


def _of_clock(vm: str, verdict: ClockVerdict, bound_s: float) -> list[Reason]:
    if not verdict.synced:
        why = verdict.reason or "its clock could not be corrected"
        return [Reason("clock_unsynced", f"{vm} is unsynced: {why}")]
    if verdict.error_after_s is not None and abs(verdict.error_after_s) > bound_s:
        off = f"{vm} is {verdict.error_after_s:+.3f} s off after its sync (bound {bound_s:g} s)"
        return [Reason("clock_unsynced", off)]
    return []


def _of_memory(vm: str, verdict: ClockVerdict) -> list[Reason]:
    """What the guest itself found to be wrong with its memory."""
    broken = verdict.broken or (("not_rebooted",) if verdict.memory_ok is False else ())
    words = [BROKEN_WORDS[code] for code in broken]
    detail = f": {verdict.memory_detail}" if verdict.memory_detail else ""
    if not words:
        return []
    text = f"{vm} is not the guest it was before the pause ({', '.join(words)}){detail}"
    return [Reason("memory_changed", text)]
