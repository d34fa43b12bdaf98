"""Whether a wave came out well: what is wrong for good, and what is not known yet. Pure."""

from __future__ import annotations

from caesura.contract.messages import MemoryProof, Policy
from caesura.contract.reasons import Reason
from caesura.lifecycle.proof import BROKEN_WORDS
from caesura_coordinator.proofs import unproven
from caesura_coordinator.records import ClockVerdict, Wave


def verify(wave: Wave, policy: Policy) -> tuple[list[Reason], list[Reason]]:
    """What is wrong with the wave for good, and what is not known yet."""
    wrong: list[Reason] = []
    missing: list[Reason] = []
    paused: dict[str, MemoryProof | None] = {}
    for operation in (*wave.done, *wave.operations):
        ours = {vm.vm for vm in wave.vms if vm.host == operation.host}
        results = [
            each for each in operation.vms if each.vm in ours
        ]  # of another's VM its word means nothing
        told = {result.vm for result in results}
        wrong += [
            Reason("result_missing", f"{vm.vm}: {operation.host} reported nothing about it")
            for vm in wave.vms
            if vm.host == operation.host and vm.vm not in told
        ]
        for result in results:
            if result.frozen:
                paused[result.vm] = result.memory
            if result.state != "running":
                wrong.append(Reason("vm_not_running", f"{result.vm} is {result.state} after the resume"))
            if result.pause_s > policy.budget_s:
                over = f"{result.vm} was paused {result.pause_s:.3f} s, budget {policy.budget_s:g} s"
                wrong.append(Reason("pause_over_budget", over))
            if result.memory is not None and not result.memory.ok:
                changed = f"{result.vm} changed in memory during the pause: {result.memory.detail}"
                wrong.append(Reason("memory_changed", changed))
    for vm in wave.vms:
        if vm.method == "live":
            continue
        clock = wave.clocks.get(vm.vm)
        why = unproven(vm, policy, paused[vm.vm], clock) if vm.vm in paused else ""
        if vm.clock == "none":
            wrong += [Reason("memory_unproven", why)] if why else []
            continue
        if clock is None:
            missing.append(Reason("clock_unknown", f"{vm.vm}: no verdict on its clock"))
            missing += [Reason("memory_unproven", f"{why}; its guest has not answered")] if why else []
            continue
        wrong += _of_memory(vm.vm, clock)
        wrong += [Reason("memory_unproven", why)] if why else []
        if policy.on_unsynced == "halt":
            wrong += _of_clock(vm.vm, clock, policy.clock_bound_s)
    return wrong, missing


def _of_clock(vm: str, verdict: ClockVerdict, bound_s: float) -> list[Reason]:
    if not verdict.synced:
        why = verdict.reason or "its clock could not be corrected"
        return [Reason("clock_unsynced", f"{vm} is unsynced: {why}")]
    if verdict.error_after_s is not None and abs(verdict.error_after_s) > bound_s:
        off = f"{vm} is {verdict.error_after_s:+.3f} s off after its sync (bound {bound_s:g} s)"
        return [Reason("clock_unsynced", off)]
    return []


def _of_memory(vm: str, verdict: ClockVerdict) -> list[Reason]:
    """What the guest itself showed to be wrong with its memory."""
    broken = verdict.broken or (("not_rebooted",) if verdict.memory_ok is False else ())
    words = [BROKEN_WORDS[code] for code in broken]
    detail = f": {verdict.memory_detail}" if verdict.memory_detail else ""
    if not words:
        return []
    text = f"{vm} is not the guest it was before the pause ({', '.join(words)}){detail}"
    return [Reason("memory_changed", text)]
