"""The verdict on a VM's clock and memory after a pause. Pure."""

from __future__ import annotations

from datetime import datetime

import msgspec

from caesura.contract.messages import AgentClockSynced, MemoryProof, VmClockSynced


class ClockWait(msgspec.Struct, frozen=True):
    """A resumed VM whose clock is not judged yet. ``boot_id``: its agent's before the pause, if known."""

    vm: str
    set: str
    update_domain: int
    operation: str
    bound_s: float
    boot_id: str = ""


def judge(host: str, wait: ClockWait, told: AgentClockSynced, at: datetime) -> VmClockSynced:
    """The host's verdict on what an agent measured.

    The true error lies within the uncertainty around the measured one, so the clock is right only if even
    the worst of that range is within the bound.
    """
    why = told.reason
    right = told.synced and told.error_after_s is not None
    if told.synced and told.error_after_s is None:
        why = "the agent says synced but measured no error"
    if right and told.error_after_s is not None:
        worst_s = abs(told.error_after_s) + (told.uncertainty_s or 0.0)
        if worst_s > wait.bound_s:
            right = False
            why = f"the clock may be {worst_s:.4f} s off after the sync, the bound is {wait.bound_s:g} s"
    return VmClockSynced(
        vm=wait.vm,
        host=host,
        set=wait.set,
        update_domain=wait.update_domain,
        operation=wait.operation,
        synced=right,
        by="agent",
        error_before_s=told.error_before_s,
        error_after_s=told.error_after_s,
        uncertainty_s=told.uncertainty_s,
        simulated=told.simulated,
        memory=heartbeat(wait.boot_id, told.boot_id),
        reason=why[:4096],
        at=at,
    )


def heartbeat(before: str, after: str) -> MemoryProof:
    """The agent's boot id lives in guest memory only: the same one after the pause shows that memory stayed."""
    if not before:
        return MemoryProof(proof="none", ok=True, detail="the agent was not heard before the pause")
    if before == after:
        return MemoryProof(proof="heartbeat", ok=True, detail=f"agent {after} before and after")
    return MemoryProof(proof="heartbeat", ok=False, detail=f"agent {before} became {after}: it started anew")


def unsynced(host: str, wait: ClockWait, reason: str, at: datetime) -> VmClockSynced:
    """Loudly: nobody put this clock right."""
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
