"""How an operation ends: every VM runs, the guard releases it, the end is published. Pure part of ``machine``."""

from __future__ import annotations

import msgspec

from caesura_host_updater.operation.effects import (
    Disarm,
    Effect,
    Finish,
    Persist,
    PublishFrozen,
    PublishResumed,
    ResumeVms,
    StopUpdate,
)
from caesura_host_updater.operation.inputs import Disarmed, ResumeEnded
from caesura_host_updater.operation.state import (
    Decision,
    End,
    Operation,
    UnexpectedEvent,
    changed,
    changed_vm,
    deadlines_of,
    failed,
    vm_of,
)


def update_runs(op: Operation) -> bool:
    """Whether a run of the update has not ended."""
    return any(run.started and run.outcome is None for run in op.runs)


def kill_update(op: Operation) -> Operation:
    """Runs of the update that did not end have no outcome of their own."""
    runs = tuple(
        msgspec.structs.replace(run, outcome=op.stop_outcome) if run.started and run.outcome is None else run
        for run in op.runs
    )
    return changed(op, runs=runs)


def resume_all(op: Operation) -> Decision:
    """Resume every VM that may have been touched, whatever else is under way."""
    effects: list[Effect] = []
    if update_runs(op):
        op = kill_update(op)
        effects.append(StopUpdate(kill=True))
    op = changed(op, wake_at=None)
    if op.phase in ("accepted", "arming"):
        op = changed(op, phase="resumed")
        return op, (*effects, Disarm(tuple(vm.vm for vm in op.vms)))
    op = changed(
        op, phase="resuming", vms=tuple(msgspec.structs.replace(vm, digesting=False) for vm in op.vms)
    )
    left = tuple(vm.vm for vm in op.vms if not vm.end)
    if not left:
        return changed(op, phase="resumed"), (*effects, Persist(), Disarm())
    return op, (*effects, ResumeVms(left), Persist())


def finish_killed(op: Operation) -> Decision:
    """A live update, or one before a swap, that does not end."""
    op, effects = finish(kill_update(op))
    return op, (StopUpdate(kill=True), *effects)


def ended_while_paused(detail: str) -> str:
    """What is said of a VM that does not run any more, with what its driver knows."""
    return f"ended while it was paused{f': {detail}' if detail else ''}"


def vm_resumed(op: Operation, event: ResumeEnded) -> Decision:
    """A VM runs again, or is gone."""
    if op.phase != "resuming" or vm_of(op, event.vm).end:
        return op, ()
    effects: list[Effect] = []
    if event.was_held:
        op, effects = _was_frozen(op, event.vm)
    by = "updater" if vm_of(op, event.vm).called_at is not None and event.end == "running" else "nobody"
    detail = event.detail or vm_of(op, event.vm).detail
    op = changed_vm(op, event.vm, resumed_at=event.at, end=event.end, resumed_by=by, detail=detail)
    if event.end != "running":
        why = ended_while_paused(event.detail)
        if event.end == "left":
            why = f"was not resumed: {event.detail}"
        op = changed_vm(op, event.vm, error=vm_of(op, event.vm).error or why)
        op = failed(op, "resume_failed", f"VM {event.vm} {why}")
    # After the guard's deadline only the guard knows who resumed it, and when: wait for its record.
    if event.at < deadlines_of(op).guard_at:
        op, more = publish_resumed(op, event.vm)
        effects += more
    if any(not vm.end for vm in op.vms):
        return op, tuple(effects)
    return changed(op, phase="resumed"), (*effects, Persist(), Disarm())


def _was_frozen(op: Operation, name: str) -> tuple[Operation, list[Effect]]:
    """It was paused without a confirmation: the pause counts from its freeze call on."""
    vm = vm_of(op, name)
    if vm.frozen_at is not None or vm.called_at is None:
        return op, []
    return changed_vm(op, name, frozen_at=vm.called_at), [PublishFrozen(name)]


def publish_resumed(op: Operation, name: str) -> tuple[Operation, list[Effect]]:
    """Announce it once, if it was paused and runs."""
    vm = vm_of(op, name)
    if vm.resume_published or vm.frozen_at is None or vm.end != "running":
        return op, []
    return changed_vm(op, name, resume_published=True), [PublishResumed(name)]


def disarmed(op: Operation, event: Disarmed) -> Decision:
    """The guard released the operation; its interventions are part of the record."""
    if op.phase != "resumed":
        raise UnexpectedEvent(op.phase, event, "resumed")
    effects: list[Effect] = []
    resumed_by_guard: list[str] = []
    for intervention in event.interventions:
        if (
            not intervention.was_frozen
            or intervention.running_at is None
            or vm_of(op, intervention.vm).resume_published
        ):
            continue
        resumed_by_guard.append(intervention.vm)
        op, more = _was_frozen(op, intervention.vm)
        effects += more
        vm = vm_of(op, intervention.vm)
        called_at = vm.called_at
        if intervention.frozen_after is not None and called_at is not None:
            called_at = max(called_at, intervention.frozen_after)
        resumed_at = (
            intervention.running_at if vm.resumed_at is None else min(vm.resumed_at, intervention.running_at)
        )
        by = "guard" if vm.end == "running" else vm.resumed_by
        op = changed_vm(op, intervention.vm, called_at=called_at, resumed_at=resumed_at, resumed_by=by)
    if resumed_by_guard:
        why = f"the pause guard resumed VM {', '.join(resumed_by_guard)}: {event.why}"
        op = changed(
            op,
            failure=f"{why}; {op.failure}" if op.failure else why,
            codes=tuple(dict.fromkeys(("guard_acted", *op.codes))),
            guard_why=event.why,
        )
    for vm in op.vms:
        op, more = publish_resumed(op, vm.vm)
        effects += more
    op, end = finish(op)
    return op, (*effects, *end)


def finish(op: Operation) -> Decision:
    """The one end."""
    end: End = "completed"
    if op.failure:
        end = "cancelled" if op.aborted and not op.touched else "failed"
    return changed(op, phase="ended", end=end, wake_at=None), (Finish(),)
