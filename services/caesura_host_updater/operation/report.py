"""What is published about an operation: messages made from the pure state and the wall clock. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

from caesura.contract.fitting import cut, fits
from caesura.contract.messages import (
    MemoryProof,
    OperationReported,
    OperationStatus,
    ProofCode,
    StartOperation,
    UpdateOutcome,
    VmFrozen,
    VmResult,
    VmResumed,
    VmState,
)
from caesura.contract.reasons import ReasonCode
from caesura.lifecycle.proof import BROKEN_WORDS, WORDS, memory_proof
from caesura_host_updater.clocks.verdict import ClockCheck
from caesura_host_updater.operation.inputs import Outcome
from caesura_host_updater.operation.state import Operation, VmPause

_WORST: tuple[Outcome, ...] = ("timeout", "failed", "interrupted", "not_run", "succeeded")
_TEXT_CHARACTERS = 1000
"""The longest text of a VM, where there are many: one part of a report still holds several VMs."""
_TAIL_CHARACTERS = 3800  # the contract allows 4096; the rest names the VM

Wall = Callable[[float], datetime]
"""An instant on CLOCK_MONOTONIC as wall-clock time."""


def shown_by_host(vm: VmPause) -> MemoryProof:
    """What the host itself saw of the VM's memory; what the guest reports follows after the resume."""
    held: list[ProofCode] = []
    broken: list[ProofCode] = []
    details: list[str] = []
    if vm.sampled:
        (held if vm.sampled == "equal" else broken).append("sampled_digest_equal")
        words = WORDS if vm.sampled == "equal" else BROKEN_WORDS
        details.append(f"{words['sampled_digest_equal']}: {vm.sampled_note}")
    if vm.digest_before and vm.digest_after:
        same = vm.digest_before == vm.digest_after
        (held if same else broken).append("digest_equal")
        detail = vm.digest_before if same else f"{vm.digest_before} became {vm.digest_after}"
        details.append(f"{(WORDS if same else BROKEN_WORDS)['digest_equal']}: {detail}")
    elif vm.digest_note:
        details.append(f"no digest of all memory: {vm.digest_note}")
    if not held and not broken and not vm.digest_note:
        details.append(vm.sampled_note or vm.no_digest or "its memory was not digested twice")
    return memory_proof(held, broken, "; ".join(details))


def status_report(
    host: str,
    command: StartOperation,
    epoch: int,
    status: OperationStatus,
    at: datetime,
    *,
    reason: str = "",
    codes: tuple[ReasonCode, ...] = (),
) -> OperationReported:
    """A report without VMs: accepted, refused, or cancelled before it began."""
    return OperationReported(
        operation=command.operation,
        host=host,
        epoch=epoch,
        rollout=command.rollout,
        wave=command.wave,
        status=status,
        reason=reason[:4096],
        codes=codes,
        at=at,
    )


def frozen_fact(host: str, op: Operation, name: str, wall: Wall) -> VmFrozen:
    """A VM is paused."""
    vm = next(each for each in op.vms if each.vm == name)
    return VmFrozen(
        vm=name,
        host=host,
        set=vm.set,
        update_domain=vm.update_domain,
        operation=op.operation,
        event_id=vm.event_id,
        method=op.method,
        budget_s=op.budget_s,
        at=wall(vm.frozen_at or 0.0),
    )


def resumed_fact(host: str, op: Operation, name: str, wall: Wall) -> VmResumed:
    """A VM runs again."""
    vm = next(each for each in op.vms if each.vm == name)
    return VmResumed(
        vm=name,
        host=host,
        set=vm.set,
        update_domain=vm.update_domain,
        operation=op.operation,
        event_id=vm.event_id,
        method=op.method,
        pause_s=vm.pause_s,
        budget_s=op.budget_s,
        within_budget=vm.pause_s <= op.budget_s,
        resumed_by="guard" if vm.resumed_by == "guard" else "updater",
        memory=shown_by_host(vm),
        at=wall(vm.resumed_at or 0.0),
    )


def clock_wait(op: Operation, vm: VmPause, bound_s: float) -> ClockCheck:
    """A resumed VM that waits for the verdict on its clock."""
    return ClockCheck(
        vm=vm.vm,
        set=vm.set,
        update_domain=vm.update_domain,
        operation=op.operation,
        bound_s=bound_s,
        boot_id=vm.boot_id,
        kernel_boot_id=vm.kernel_boot_id,
        canary_writes=vm.canary_writes,
    )


def update_outcome(op: Operation) -> UpdateOutcome | None:
    """The update's outcome, over all its runs: the worst of them counts."""
    if not op.update:
        return None
    outcomes: list[Outcome] = [run.outcome or "not_run" for run in op.runs]
    worst: Outcome = min(outcomes, key=_WORST.index, default="not_run")
    first = next((run for run in op.runs if (run.outcome or "not_run") == worst), None)
    tails = [
        f"[{run.key}] {run.output_tail}" if run.key else run.output_tail for run in op.runs if run.output_tail
    ]
    return UpdateOutcome(
        update=op.update,
        outcome=worst,
        exit_code=first.exit_code if first else None,
        seconds=max((run.seconds for run in op.runs), default=0.0),
        output_tail="\n".join(tails)[-_TAIL_CHARACTERS:],
    )


def _under_the_pause(op: Operation, update: UpdateOutcome | None) -> float:
    """Seconds of the pause that were the update's; a swap's update runs before it."""
    if op.method == "swap":
        return 0.0
    return update.seconds if update else op.hold_s


def final_report(
    host: str,
    command: StartOperation,
    op: Operation,
    epoch: int,
    states: Mapping[str, VmState],
    at: datetime,
) -> OperationReported:
    """The one end of an operation."""
    update = update_outcome(op)
    pauses = [vm.pause_s for vm in op.vms if vm.frozen_at is not None]
    over = [vm for vm in op.vms if vm.pause_s > op.budget_s]
    reason, codes = op.failure, op.codes
    if over:
        worst = max(vm.pause_s for vm in over)
        note = f"pause of {worst:.2f} s is over the budget of {op.budget_s:g} s"
        reason = f"{reason}; {note}" if reason else note
        codes = tuple(dict.fromkeys((*codes, "pause_over_budget")))
    report = OperationReported(
        operation=op.operation,
        host=host,
        epoch=epoch,
        rollout=command.rollout,
        wave=command.wave,
        status=op.end if op.end is not None and not (over and op.end == "completed") else "failed",
        reason=reason[:4096],
        codes=codes,
        vms=tuple(
            VmResult(
                vm=vm.vm,
                set=vm.set,
                update_domain=vm.update_domain,
                state=states.get(vm.vm, "unknown"),
                frozen=vm.frozen_at is not None,
                pause_s=vm.pause_s,
                resumed_by=vm.resumed_by,
                memory=shown_by_host(vm) if vm.frozen_at is not None else None,
                error=vm.error[:4096],
                detail=vm.detail[:4096],
            )
            for vm in op.vms
        ),
        update=update,
        overhead_s=max(0.0, max(pauses) - _under_the_pause(op, update)) if pauses else None,
        at=at,
    )
    return _reportable(report)


def _reportable(report: OperationReported) -> OperationReported:
    """A report of which no part can be too large: where it does not fit one message, the texts of its VMs are shortened."""
    return report if fits(report) else cut(report, _TEXT_CHARACTERS)
