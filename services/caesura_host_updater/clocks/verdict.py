"""The verdict on a VM's clock and memory after a pause. Pure."""

from __future__ import annotations

from datetime import datetime

import msgspec

from caesura.contract.messages import AgentClockSynced, CanaryReport, MemoryProof, VmClockSynced
from caesura.lifecycle.proof import combined, memory_proof
from caesura_host_updater.drivers.port import ClockSet


class ClockCheck(msgspec.Struct, frozen=True):
    """A resumed VM whose clock is not judged yet. ``boot_id``: its agent's before the pause, if known; ``kernel_boot_id``: the
    guest kernel's. ``canary_writes``: how many pages the agent last reported as written before the pause, 0: it holds none."""

    vm: str
    set: str
    update_domain: int
    operation: str
    bound_s: float
    boot_id: str = ""
    kernel_boot_id: str = ""
    canary_writes: int = 0


def judge(host: str, wait: ClockCheck, answer: AgentClockSynced, at: datetime) -> VmClockSynced:
    """The host's verdict on what an agent measured.

    The true error lies within the uncertainty around the measured one, so the clock is right only if even
    the worst of that range is within the bound.
    """
    why = answer.reason
    right = answer.synced and answer.error_after_s is not None
    if answer.synced and answer.error_after_s is None:
        why = "the agent says synced but measured no error"
    if right and answer.error_after_s is not None:
        too_far = _too_far(answer.error_after_s, answer.uncertainty_s or 0.0, wait.bound_s)
        right, why = not too_far, too_far or why
    return VmClockSynced(
        vm=wait.vm,
        host=host,
        set=wait.set,
        update_domain=wait.update_domain,
        operation=wait.operation,
        synced=right,
        by="agent",
        error_before_s=answer.error_before_s,
        error_after_s=answer.error_after_s,
        uncertainty_s=answer.uncertainty_s,
        simulated=answer.simulated,
        memory=shown_by_guest(wait, answer),
        reason=why[:4096],
        at=at,
    )


def judge_driver(
    host: str, wait: ClockCheck, answer: ClockSet, memory: MemoryProof | None, at: datetime
) -> VmClockSynced:
    """The verdict on a clock that was set from outside the guest."""
    why = _too_far(answer.after_s, answer.uncertainty_s, wait.bound_s)
    return VmClockSynced(
        vm=wait.vm,
        host=host,
        set=wait.set,
        update_domain=wait.update_domain,
        operation=wait.operation,
        synced=not why,
        by="driver",
        error_before_s=answer.before_s,
        error_after_s=answer.after_s,
        uncertainty_s=answer.uncertainty_s,
        memory=memory,
        reason=why,
        at=at,
    )


def by_wrong_clock(
    host: str, wait: ClockCheck, answer: AgentClockSynced, why: str, at: datetime
) -> VmClockSynced:
    """The verdict where the host's own clock cannot be the reference, whatever was measured against it; what the guest shows of its memory counts."""
    return msgspec.structs.replace(unsynced(host, wait, why, at), memory=shown_by_guest(wait, answer))


def _too_far(error_s: float, uncertainty_s: float, bound_s: float) -> str:
    worst_s = abs(error_s) + uncertainty_s
    if worst_s <= bound_s:
        return ""
    return f"the clock may be {worst_s:.4f} s off after the sync, the bound is {bound_s:g} s"


def shown_by_guest(wait: ClockCheck, answer: AgentClockSynced) -> MemoryProof:
    """What the agent's answer shows of the guest's memory: its boot id, and its canary if it holds one."""
    one = same_boot(wait.boot_id, answer.boot_id)
    return combined(one, _canary(wait.canary_writes, answer.canary)) or one


def _canary(writes_before: int, found: CanaryReport | None) -> MemoryProof | None:
    if found is None or not found.pages:
        return None
    what = f"{found.pages} pages of {found.page_bytes} bytes"
    if found.bad_pages:
        detail = f"canary differs: {found.bad_pages} of {what}: {found.detail}"
        return memory_proof((), ["canary_equal"], detail)
    if found.writes < writes_before:
        # Pages and index agree, but both are of an earlier time: only an observer outside can know.
        detail = f"canary differs: {found.writes} pages written after the pause, {writes_before} before it: all memory is an older copy"
        return memory_proof((), ["canary_equal"], detail)
    return memory_proof(["canary_equal"], (), f"canary equal: {what}")


def same_boot(before: str, after: str) -> MemoryProof:
    """A boot id (the agent's, or the guest kernel's) lives in guest memory only: an unchanged one shows that it did not restart."""
    if not before:
        return memory_proof(detail="no boot id was received from the guest before the pause")
    if before == after:
        return memory_proof(["not_rebooted"], (), f"not rebooted: boot id {after}")
    return memory_proof((), ["not_rebooted"], f"rebooted: boot id {before} became {after}")


def unsynced(host: str, wait: ClockCheck, reason: str, at: datetime) -> VmClockSynced:
    """At error level: nothing corrected this clock."""
    return VmClockSynced(
        vm=wait.vm,
        host=host,
        set=wait.set,
        update_domain=wait.update_domain,
        operation=wait.operation,
        synced=False,
        by="nobody",
        reason=reason,
        at=at,
    )
