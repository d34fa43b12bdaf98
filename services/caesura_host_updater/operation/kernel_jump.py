"""The host's kernel is replaced under paused VMs: the jump, and what becomes of it if there is none. Pure part of ``machine``.

The update runs first, while every VM runs, and ends with a loaded kernel. Host and VMs are checked before the guard is armed. Once every
VM's device state is in its file, the facts and the journal are made durable and the pause guard is asked to leave the kernel: it is the
process that would resume the VMs otherwise, so there is never both a jump and a resume. What follows is another boot's:
see ``kernel_change_outcome``.
"""

from __future__ import annotations

from caesura_host_updater.operation.effects import CheckKernel, Effect, LeaveKernel, Persist
from caesura_host_updater.operation.inputs import KernelNotReady, KernelReady, NotLeft
from caesura_host_updater.operation.resume import resume_all
from caesura_host_updater.operation.state import (
    Decision,
    Operation,
    UnexpectedEvent,
    changed,
    deadlines_of,
    failed,
)

NO_DIGEST = "no process of this kernel can compare it with what the next one finds"


def check_kernel(op: Operation) -> tuple[Effect, ...]:
    """What is to be looked at beside the VMs before the guard is armed."""
    return (CheckKernel(op.kernel_release),) if op.method == "kexec" else ()


def kernel_checked(op: Operation, event: KernelReady | KernelNotReady) -> Operation:
    """The host can start the kernel, or a reason why it cannot."""
    op = changed(op, kernel_checked=True)
    if isinstance(event, KernelReady):
        return op
    return failed(op, "kernel_not_ready", f"nothing was frozen: {event.why}")


def all_checked(op: Operation) -> bool:
    """Whether nothing of the host is left to be looked at."""
    return op.method != "kexec" or op.kernel_checked


def leave(op: Operation, now: float) -> Decision:
    """Every VM's state is in its file: go, or have them run again under this kernel."""
    deadlines = deadlines_of(op)
    if now >= deadlines.leave_by:
        return resume_all(
            failed(
                op, "pause_ran_out", "the time to start the other kernel had passed before every VM was saved"
            )
        )
    op = changed(op, phase="leaving", wake_at=deadlines.resume_at)
    return op, (Persist(), LeaveKernel(deadlines.leave_by))


def not_left(op: Operation, event: NotLeft) -> Decision:
    """The host still runs this kernel."""
    if op.phase != "leaving":
        if op.phase in ("resuming", "resumed", "ended"):
            return op, ()  # it was not awaited any more
        raise UnexpectedEvent(op.phase, event, "leaving")
    return resume_all(failed(op, "leave_failed", f"kernel {op.kernel_release} was not started: {event.why}"))


def overdue(op: Operation) -> Decision:
    """Neither the jump nor an answer."""
    return resume_all(
        failed(
            op, "leave_failed", f"kernel {op.kernel_release} was not started: the pause guard did not answer"
        )
    )
