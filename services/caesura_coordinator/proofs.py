"""Which proof of memory a plan promises, what it refuses for lack of one, and what a wave's VMs have shown in the end. Pure."""

from __future__ import annotations

from caesura.contract.messages import (
    MemoryProof,
    Method,
    PlannedVm,
    Policy,
    ProofCode,
    VmClockSynced,
    VmRecord,
)
from caesura.lifecycle.budget import DIGEST_S, digest_by_s
from caesura.lifecycle.proof import asks_for_proof, broken_codes, held_codes, in_words, is_proof, ordered
from caesura_coordinator.records import ClockVerdict
from caesura_coordinator.text import truncate

_DETAIL_CHARACTERS = 300  # kept of a guest's statement about its memory, for each VM of a wave


def planned_proofs(vm: VmRecord, method: Method, policy: Policy, expected_s: float) -> tuple[ProofCode, ...]:
    """What will be shown about the VM's memory, according to its host.

    A digest of all memory needs time at the end of the pause too: if an update of ``expected_s`` uses up the budget,
    only sampled pages remain.
    """
    can = ordered((vm.proofs or {}).get(method, ()))
    if expected_s + 2 * DIGEST_S <= digest_by_s(policy.budget_s):
        return can
    return tuple(code for code in can if code != "digest_equal")


def unprovable(vm: VmRecord, planned: PlannedVm, policy: Policy) -> str:
    """Why the policy forbids pausing this VM by the planned method, and what to do; empty if it does not."""
    if not asks_for_proof(policy, planned.method) or is_proof(planned.proofs):
        return ""
    if vm.proofs is None:
        why = f"its host {planned.host} does not say which proofs it can make: update the host updater there"
    else:
        shown = f" ({in_words(planned.proofs)} is not a proof of memory)" if planned.proofs else ""
        why = f"{vm.no_digest or 'no digest of it can be taken'}{shown}"
    return (
        f"no proof can be made that {planned.method} leaves its memory as it is: {why}; run an agent with a canary in the guest "
        "(CAESURA_VM_AGENT_CANARY_BYTES above 0), or accept it with --on-unproven proceed"
    )


def clock_verdict(message: VmClockSynced) -> ClockVerdict:
    """The stored part of a host's verdict on a VM: its clock, and what the guest itself showed about its memory."""
    memory = message.memory
    return ClockVerdict(
        synced=message.synced,
        error_after_s=message.error_after_s,
        memory_ok=memory.ok if memory is not None else None,
        held=held_codes(memory),
        broken=broken_codes(memory),
        memory_detail=truncate(memory.detail, _DETAIL_CHARACTERS) if memory is not None else "",
        reason=message.reason,
    )


def unproven(vm: PlannedVm, policy: Policy, memory: MemoryProof | None, verdict: ClockVerdict | None) -> str:
    """A sentence on what is missing for a proof of a paused VM; empty if nothing is missing, or the policy does not require one.

    Args:
        memory: the host's findings.
        verdict: the guest's own findings, if it has answered.
    """
    if not asks_for_proof(policy, vm.method):
        return ""
    shown = (*held_codes(memory), *(verdict.held if verdict is not None else ()))
    if is_proof(shown):
        return ""
    details = [
        memory.detail if memory is not None else "",
        verdict.memory_detail if verdict is not None else "",
    ]
    why = "; ".join(filter(None, dict.fromkeys(details)))
    return f"{vm.vm} is unproven: {in_words(shown)} of its memory, planned was {in_words(vm.proofs)}" + (
        f" ({why})" if why else ""
    )
