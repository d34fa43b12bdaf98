"""An update that cannot keep memory: VMs shut down, the update, the VMs started again. Pure part of ``machine``.

Nothing is paused, so there is no budget and the guard has nothing to hold; the journal has the operation before the first VM
is asked, and the next run of a host updater that died starts what it finds shut down. Nothing is killed unless the update says
so: the first VM that does not shut down in time ends the operation before the update, and those that did are started again.
"""

from __future__ import annotations

import msgspec

from caesura_host_updater.operation.effects import Effect, KillVm, Persist, ShutDownVms, StartVms, StopUpdate
from caesura_host_updater.operation.inputs import VmNotShutDown, VmNotStarted, VmShutDown, VmStarted
from caesura_host_updater.operation.resume import finish, kill_update, update_runs
from caesura_host_updater.operation.state import (
    Decision,
    Operation,
    UnexpectedEvent,
    changed,
    changed_vm,
    failed,
    vm_of,
)

_KILL_S = 5.0  # s: for a VM that is killed to be gone; milliseconds are usual
_ANSWER_S = 2.0  # s: after the instant by which the VMs are to be down, for the driver to say which is not


def shut_down(op: Operation, now: float) -> Decision:
    """Every VM is asked at once."""
    by = now + op.shutdown_s
    vms = tuple(msgspec.structs.replace(vm, shutdown_at=now) for vm in op.vms)
    down_by = by + _KILL_S if op.kill_after_timeout else by
    op = changed(op, phase="stopping", vms=vms, wake_at=down_by + _ANSWER_S)
    return op, (Persist(), ShutDownVms(tuple(vm.vm for vm in vms), by))


def stopped(op: Operation, event: VmShutDown | VmNotShutDown, now: float) -> tuple[Decision, bool]:
    """One VM has shut down, or did not. The second value: all have, and the update may run."""
    if op.phase in ("accepted", "ended"):
        raise UnexpectedEvent(op.phase, event, "stopping")
    if vm_of(op, event.vm).up:
        return (op, ()), False
    if isinstance(event, VmShutDown):
        op = changed_vm(op, event.vm, down_at=event.at, detail=event.detail)
    elif op.phase == "stopping" and op.kill_after_timeout and event.asked and not vm_of(op, event.vm).killed:
        # The intent is in the journal before it is killed. One that could not be asked is not: it had no chance.
        op = changed_vm(op, event.vm, killed=True)
        return (op, (Persist(), KillVm(event.vm, now + _KILL_S))), False
    elif op.phase == "stopping":
        op = changed_vm(op, event.vm, error=event.why)
        op = failed(
            op, "shutdown_failed", f"nothing was updated: VM {event.vm} did not shut down: {event.why}"
        )
        return start(op), False
    if op.phase != "stopping":
        return (op, ()), False
    return (op, (Persist(),)), all(vm.down_at is not None for vm in op.vms)


def not_stopped_in_time(op: Operation) -> Decision:
    """The driver did not say which VM does not end."""
    late = ", ".join(vm.vm for vm in op.vms if vm.down_at is None)
    why = f"nothing was updated: not shut down within {op.shutdown_s:g} s: {late}"
    return start(failed(op, "shutdown_failed", why))


def start(op: Operation) -> Decision:
    """Start every VM that may have been shut down, whatever became of the update."""
    effects: list[Effect] = []
    if update_runs(op):
        op = kill_update(op)
        effects.append(StopUpdate(kill=True))
    op = changed(op, phase="starting", wake_at=None, kill_at=None)
    return op, (*effects, StartVms(tuple(vm.vm for vm in op.vms)), Persist())


def started(op: Operation, event: VmStarted | VmNotStarted) -> Decision:
    """One VM runs again, or cannot be started."""
    if op.phase != "starting" or vm_of(op, event.vm).up:
        return op, ()
    vm = vm_of(op, event.vm)
    if isinstance(event, VmNotStarted):
        op = changed_vm(op, event.vm, up=True, error=vm.error or event.why)
        op = failed(op, "start_failed", f"VM {event.vm} was not started again: {event.why}")
    else:
        op = changed_vm(op, event.vm, up=True, detail=_course(op, event))
    return finish(op) if all(vm.up for vm in op.vms) else (op, (Persist(),))


def _course(op: Operation, event: VmStarted) -> str:
    """What happened to it, for people."""
    vm = vm_of(op, event.vm)
    if not event.again or vm.shutdown_at is None:
        return "it was not restarted"
    how = f"shut down by {vm.detail}, " if vm.detail else ""
    if vm.killed:
        how = f"killed, since it had not shut down after {op.shutdown_s:g} s, "
    return f"{how}up again {event.at - vm.shutdown_at:.1f} s after it was asked to shut down"
