"""Preparing VMs for a swap or replace, and the swaps themselves. Pure part of ``machine``.

A swap's update, if it has one, runs first, while every VM runs: it puts the new VMM on the host. The new
processes are started and checked before the guard is armed, and the guard is armed before the first guest
is touched. Guests are handed over one after the other, each for milliseconds; the first failure ends it.
"""

from __future__ import annotations

from caesura.lifecycle.budget import PREPARE_S
from caesura_host_updater.operation.arming import arm
from caesura_host_updater.operation.effects import (
    Disarm,
    Effect,
    Persist,
    PrepareVms,
    PublishFrozen,
    SwapVms,
)
from caesura_host_updater.operation.inputs import (
    KernelNotReady,
    KernelReady,
    VmNotPrepared,
    VmNotSwapped,
    VmPrepared,
    VmSwapped,
)
from caesura_host_updater.operation.kernel_jump import all_checked, check_kernel, kernel_checked
from caesura_host_updater.operation.resume import finish, publish_resumed, resume_all
from caesura_host_updater.operation.state import (
    Decision,
    Operation,
    UnexpectedEvent,
    changed,
    changed_vm,
    deadlines_of,
    failed,
)


def prepare(op: Operation, now: float) -> Decision:
    """Start preparing; nothing is paused for it."""
    if op.failure or op.aborted:
        return finish(op)
    op = changed(op, phase="preparing", wake_at=now + PREPARE_S)
    return op, (Persist(), *check_kernel(op), PrepareVms(tuple(vm.vm for vm in op.vms)))


def prepared(
    op: Operation, event: VmPrepared | VmNotPrepared | KernelReady | KernelNotReady, now: float
) -> Decision:
    """One VM or the kernel is ready, or cannot be; when all have answered the guard is armed, or nothing is done at all."""
    if op.phase != "preparing":
        return op, ()  # too late: it was not awaited
    if isinstance(event, KernelReady | KernelNotReady):
        op = kernel_checked(op, event)
    elif isinstance(event, VmNotPrepared):
        op = changed_vm(op, event.vm, error=event.why)
        op = failed(
            op, "prepare_failed", f"nothing was frozen: VM {event.vm} cannot {op.method}: {event.why}"
        )
    else:
        op = changed_vm(op, event.vm, prepared=True)
    if any(not vm.prepared and not vm.error for vm in op.vms) or not all_checked(op):
        return op, ()
    return finish(op) if op.failure or op.aborted else arm(op, now)


def not_prepared_in_time(op: Operation) -> Decision:
    """Give up before anything was paused."""
    waits = [vm.vm for vm in op.vms if not vm.prepared and not vm.error]
    late = ", ".join(waits if all_checked(op) else [*waits, f"kernel {op.kernel_release}"])
    return finish(
        failed(op, "prepare_failed", f"nothing was frozen: not ready within {PREPARE_S:g} s: {late}")
    )


def swap(op: Operation) -> Decision:
    """The guard holds it: hand the guests over, none of them after the update's share of the budget."""
    deadlines = deadlines_of(op)
    op = changed(op, phase="swapping", wake_at=deadlines.resume_at)
    return op, (SwapVms(deadlines.update_until), Persist())


def swapped(op: Operation, event: VmSwapped | VmNotSwapped) -> Decision:
    """One guest was handed over, or stayed where it was."""
    if op.phase in ("accepted", "preparing", "arming", "ended"):
        raise UnexpectedEvent(op.phase, event, "swapping")
    effects: list[Effect] = []
    if isinstance(event, VmSwapped):
        sampled = {None: "", True: "equal", False: "differs"}[event.sampled]
        op = changed_vm(
            op,
            event.vm,
            swap_finished=True,
            detail=event.detail,
            sampled=sampled,
            sampled_note=event.sampled_note,
        )
    else:
        op = changed_vm(op, event.vm, swap_finished=True, error=event.why, called_at=event.called_at)
        if event.differs:
            op = changed_vm(op, event.vm, sampled="differs", sampled_note=event.differs)
        op = failed(op, "swap_failed", f"VM {event.vm} was not swapped: {event.why}")
    if event.called_at is not None and event.frozen_at is not None:
        op = changed_vm(op, event.vm, called_at=event.called_at, frozen_at=event.frozen_at)
        effects.append(PublishFrozen(event.vm))
        if event.resumed_at is not None and op.phase == "swapping":
            op = changed_vm(op, event.vm, resumed_at=event.resumed_at, end="running", resumed_by="updater")
            op, more = publish_resumed(op, event.vm)
            effects += more
    if op.phase != "swapping" or any(not vm.swap_finished for vm in op.vms):
        return op, tuple(effects)
    if op.failure:
        op, after = resume_all(op)  # whatever a failed swap left behind
        return op, (*effects, *after)
    op = changed(op, phase="resumed", wake_at=None)
    return op, (*effects, Persist(), Disarm())


def overdue(op: Operation) -> Decision:
    """The instant of the resume arrived while guests were being handed over."""
    late = ", ".join(vm.vm for vm in op.vms if not vm.swap_finished)
    return resume_all(failed(op, "swap_failed", f"not swapped in time: {late}"))
