"""One operation of this host, as a pure machine: what to do next, and what to publish about it.

``decide(operation, event, now) -> (operation, effects)``. All instants are seconds on CLOCK_MONOTONIC. The
shell performs the effects in order and feeds back their results. The machine's promises, verified by
Hypothesis (``tests/unit/host_updater/test_pause_machine.py``):

- nothing is frozen before the guard is armed, after an abort, or when too little of the budget is left;
- every VM that may have been paused is resumed, and every one that may have been shut down is started;
- a resume is requested no later than ``PauseDeadlines.resume_at``;
- every operation ends exactly once, and not before every VM runs or is gone.
"""

from __future__ import annotations

import msgspec

from caesura_host_updater.operation.arming import arm
from caesura_host_updater.operation.effects import (
    DigestVms,
    Effect,
    FreezeVms,
    Persist,
    PublishFrozen,
    RunUpdate,
    StopUpdate,
)
from caesura_host_updater.operation.inputs import (
    AbortReceived,
    Armed,
    ArmRefused,
    Digested,
    Disarmed,
    Event,
    GuardLost,
    KernelNotReady,
    KernelReady,
    NotLeft,
    Outcome,
    ResumeEnded,
    Sampled,
    Start,
    TimePassed,
    UpdateEnded,
    VmFroze,
    VmLost,
    VmNotFrozen,
    VmNotPrepared,
    VmNotShutDown,
    VmNotStarted,
    VmNotSwapped,
    VmPrepared,
    VmShutDown,
    VmStarted,
    VmSwapped,
)
from caesura_host_updater.operation.kernel_jump import leave, not_left
from caesura_host_updater.operation.kernel_jump import overdue as not_left_in_time
from caesura_host_updater.operation.reboot import (
    not_stopped_in_time,
    shut_down,
    start,
    started,
    stopped,
)
from caesura_host_updater.operation.resume import (
    disarmed,
    finish,
    finish_killed,
    resume_all,
    update_runs,
    vm_resumed,
)
from caesura_host_updater.operation.state import (
    Decision,
    Operation,
    Phase,
    UnexpectedEvent,
    changed,
    changed_vm,
    deadlines_of,
    failed,
    vm_of,
)
from caesura_host_updater.operation.swap import (
    not_prepared_in_time,
    overdue,
    prepare,
    prepared,
    swap,
    swapped,
)

_SAMPLE_S = 1.0  # s: for sampled pages alone, which take a millisecond if no disk is involved

_BEFORE_RESUME: tuple[Phase, ...] = (
    "preparing",
    "arming",
    "swapping",
    "stopping",
    "freezing",
    "frozen",
    "updating",
    "updated",
    "leaving",
)


def decide(op: Operation, event: Event, now: float) -> Decision:  # noqa: PLR0912 - one flat table of events
    """The next state and what to do.

    Raises:
        UnexpectedEvent: an event that only a faulty shell can send in this phase.
    """
    match event:
        case Start():
            return _begin(op, event, now)
        case Armed() | ArmRefused():
            return _armed(op, event, now)
        case VmPrepared() | VmNotPrepared() | KernelReady() | KernelNotReady():
            return prepared(op, event, now)
        case NotLeft():
            return not_left(op, event)
        case VmSwapped() | VmNotSwapped():
            return swapped(op, event)
        case VmFroze() | VmNotFrozen():
            return _freeze_result(op, event, now)
        case VmShutDown() | VmNotShutDown():
            return _shut_down(op, event, now)
        case VmStarted() | VmNotStarted():
            return started(op, event)
        case VmLost():
            return _vm_lost(op, event, now)
        case Sampled():
            return _sampled(op, event)
        case Digested():
            return _digested(op, event, now)
        case UpdateEnded():
            return _update_ended(op, event, now)
        case AbortReceived():
            return _abort(op, event, now)
        case GuardLost():
            return _guard_lost(op, now)
        case ResumeEnded():
            return vm_resumed(op, event)
        case Disarmed():
            return disarmed(op, event)
        case TimePassed():
            return _tick(op, now)


def _begin(op: Operation, event: Start, now: float) -> Decision:
    if op.phase != "accepted":
        raise UnexpectedEvent(op.phase, event, "accepted")
    if op.end is not None or op.aborted:
        return finish(op)
    if op.method in ("live", "kexec") or (op.method == "swap" and op.update):
        return _start_update(op, now)
    if op.method in ("swap", "replace"):
        return prepare(op, now)
    if op.method == "reboot":
        return shut_down(op, now)
    return arm(op, now)


def _shut_down(op: Operation, event: VmShutDown | VmNotShutDown, now: float) -> Decision:
    (op, effects), all_down = stopped(op, event, now)
    if not all_down:
        return op, effects
    return _start_update(op, now)


def _armed(op: Operation, event: Armed | ArmRefused, now: float) -> Decision:
    if op.phase != "arming":
        raise UnexpectedEvent(op.phase, event, "arming")
    if isinstance(event, ArmRefused):
        op = failed(op, "guard_refused", f"nothing was frozen: {event.what}: {event.why}")
    elif op.failure or op.aborted:
        pass
    elif now >= deadlines_of(op).freeze_by:
        op = failed(
            op,
            "pause_ran_out",
            f"nothing was frozen: {now - deadlines_of(op).started_at:.2f} s passed before the first freeze call",
        )
    elif op.method == "swap":
        return swap(op)
    else:
        op = changed(op, phase="freezing", wake_at=deadlines_of(op).freeze_by)
        return op, (FreezeVms(deadlines_of(op).freeze_by), Persist())
    return resume_all(op)


def _freeze_result(op: Operation, event: VmFroze | VmNotFrozen, now: float) -> Decision:
    if op.phase in ("accepted", "preparing", "arming", "swapping", "ended"):
        raise UnexpectedEvent(op.phase, event, "freezing")
    effects: tuple[Effect, ...] = ()
    if isinstance(event, VmFroze):
        op = changed_vm(op, event.vm, called_at=event.called_at, frozen_at=event.at)
        effects = (PublishFrozen(event.vm),)
    else:
        op = changed_vm(op, event.vm, called_at=event.called_at, error=event.why)
        op = failed(op, "freeze_failed", f"VM {event.vm} could not be frozen: {event.why}")
    if op.phase != "freezing":
        return op, effects
    if op.failure:
        op, more = resume_all(op)
        return op, effects + more
    if any(vm.frozen_at is None for vm in op.vms):
        return op, effects
    op, more = _frozen(op, now)
    return op, effects + more


def _frozen(op: Operation, now: float) -> Decision:
    if op.method == "kexec":
        return leave(op, now)
    deadlines = deadlines_of(op)
    whole = frozenset(vm.vm for vm in op.vms if vm.can_digest)
    digest = tuple(vm.vm for vm in op.vms if vm.can_digest or vm.can_sample)
    until = deadlines.digest_until if whole else min(now + _SAMPLE_S, deadlines.digest_until)
    op = changed(op, phase="frozen", wake_at=until)
    if not digest or now >= deadlines.digest_until:
        op, effects = _start_update(op, now)
        return op, (Persist(), *effects)
    op = _digesting(op, digest)
    return op, (Persist(), DigestVms(digest, until, whole))


def _digesting(op: Operation, names: tuple[str, ...]) -> Operation:
    for name in names:
        op = changed_vm(op, name, digesting=True)
    return op


def _sampled(op: Operation, event: Sampled) -> Decision:
    vm = vm_of(op, event.vm)
    if not vm.digesting or op.phase not in ("frozen", "updated"):
        return op, ()  # too late: it was not awaited
    if op.phase == "frozen":
        return changed_vm(op, event.vm, sampled_before=event.digest, sampled_note=event.note), ()
    if not event.digest:
        return changed_vm(op, event.vm, sampled_note=event.note), ()
    equal = event.digest == vm.sampled_before
    note = event.digest if equal else f"{vm.sampled_before} became {event.digest}"
    op = changed_vm(op, event.vm, sampled="equal" if equal else "differs", sampled_note=note)
    return op if equal else _changed_memory(op, event.vm), ()


def _changed_memory(op: Operation, name: str) -> Operation:
    return failed(op, "memory_changed", f"the memory of VM {name} changed while it was paused")


def _digested(op: Operation, event: Digested, now: float) -> Decision:
    if not vm_of(op, event.vm).digesting or op.phase not in ("frozen", "updated"):
        return op, ()  # too late: it was not awaited
    op = changed_vm(op, event.vm, digesting=False)
    if op.phase == "frozen":
        op = changed_vm(op, event.vm, digest_before=event.digest, digest_note=event.note)
    else:
        note = event.note or vm_of(op, event.vm).digest_note
        op = changed_vm(op, event.vm, digest_after=event.digest, digest_note=note)
        if event.digest and event.digest != vm_of(op, event.vm).digest_before:
            op = _changed_memory(op, event.vm)
    if any(vm.digesting for vm in op.vms):
        return op, ()
    return _start_update(op, now) if op.phase == "frozen" else resume_all(op)


def _start_update(op: Operation, now: float) -> Decision:
    """From frozen; at once for method live, and for swap and kexec, whose update runs before anything pauses."""
    deadlines = op.deadlines
    if deadlines is not None and now >= deadlines.update_until:
        return resume_all(failed(op, "pause_ran_out", "the budget was used up before the update could start"))
    if not op.update:
        op = changed(op, phase="updating", wake_at=min(now + op.hold_s, deadlines_of(op).resume_at))
        return op, (Persist(),)
    until = now + op.update_timeout_s
    if deadlines is not None:
        until = min(until, deadlines.update_until)
    runs = tuple(msgspec.structs.replace(run, started=True) for run in op.runs)
    op = changed(op, phase="updating", wake_at=until, runs=runs)
    return op, (Persist(), RunUpdate(tuple(run.key for run in runs)))


def _update_ended(op: Operation, event: UpdateEnded, now: float) -> Decision:
    runs = []
    for run in op.runs:
        if run.key != event.key or run.outcome is not None:
            runs.append(run)
            continue
        outcome = op.stop_outcome if op.kill_at is not None else event.outcome
        ended = msgspec.structs.replace(
            run,
            outcome=outcome,
            exit_code=event.exit_code,
            seconds=event.seconds,
            output_tail=event.output_tail,
        )
        runs.append(ended)
        if outcome == "failed":
            code = "" if event.exit_code is None else f" with exit code {event.exit_code}"
            if event.exit_code is not None and event.exit_code < 0:
                code = f": killed by signal {-event.exit_code}"
            where = f" for VM {event.key}" if event.key else ""
            op = failed(op, "update_failed", f"update {op.update} failed{where}{code}")
    op = changed(op, runs=tuple(runs))
    if op.phase != "updating" or update_runs(op):
        return op, ()
    return _updated(op, now)


def _updated(op: Operation, now: float) -> Decision:
    """The update is over: check memory if there is time, then resume."""
    if op.method == "live":
        return finish(op)
    if op.method in ("swap", "kexec"):
        return prepare(changed(op, kill_at=None), now)
    if op.method == "reboot":
        return start(op)
    deadlines = deadlines_of(op)
    op = changed(op, phase="updated")
    whole = frozenset(vm.vm for vm in op.vms if vm.digest_before and not vm.error)
    names = tuple(vm.vm for vm in op.vms if (vm.digest_before or vm.sampled_before) and not vm.error)
    until = deadlines.digest_until
    if now >= until and not op.aborted:
        # The update took long: sampled pages are compared nevertheless, which takes almost no time.
        for name in whole:
            op = changed_vm(op, name, digest_note="no time was left in the budget for the second digest")
        names = tuple(name for name in names if vm_of(op, name).sampled_before)
        whole = frozenset()
    if not whole:
        until = min(now + _SAMPLE_S, deadlines.resume_at)
    if not names or op.aborted or now >= until:
        op, effects = resume_all(op)
        return op, (Persist(), *effects)
    op = changed(_digesting(op, names), wake_at=until)
    return op, (Persist(), DigestVms(names, until, whole))


def _stop_update(op: Operation, now: float, outcome: Outcome) -> Decision:
    """Ask the update to end; it has one margin of grace, but never beyond the instant of the resume."""
    margin = op.deadlines.margin_s if op.deadlines is not None else 1.0
    kill_at = now + margin
    if op.deadlines is not None:
        kill_at = min(kill_at, op.deadlines.resume_at)
    op = changed(op, kill_at=kill_at, wake_at=kill_at, stop_outcome=outcome)
    return op, (StopUpdate(kill=False),)


def _vm_lost(op: Operation, event: VmLost, now: float) -> Decision:
    if op.phase not in ("freezing", "frozen", "updating", "updated", "leaving"):
        return op, ()
    op = changed_vm(op, event.vm, error=vm_of(op, event.vm).error or event.why)
    op = failed(op, "vm_ended", f"VM {event.vm} {event.why}")
    if event.thawed or op.phase == "freezing":
        return resume_all(op)  # it runs while the host is changed under it, or nothing is begun: abort
    if vm_of(op, event.vm).digesting:
        return _digested(op, Digested(event.vm, "", "it ended"), now)
    return op, ()


def _abort(op: Operation, event: AbortReceived, now: float) -> Decision:
    if op.phase not in ("accepted", *_BEFORE_RESUME) or op.aborted:
        return op, ()
    op = changed(failed(op, event.code, f"aborted: {event.why}" if event.why else "aborted"), aborted=True)
    if op.phase in ("accepted", "preparing", "arming"):
        return op, ()  # Start, the last VM's answer, or the guard's ends it without a freeze
    if op.phase == "leaving":
        return op, ()  # the guard's answer ends it; without one there was a jump, and VMs run again after it
    if op.phase == "updating" and update_runs(op):
        return _stop_update(op, now, "interrupted") if op.kill_at is None else (op, ())
    return start(op) if op.method == "reboot" else resume_all(op)


def _guard_lost(op: Operation, now: float) -> Decision:
    if op.phase == "arming":
        return failed(op, "guard_died", "nothing was frozen: the pause guard died"), ()
    if op.phase not in _BEFORE_RESUME or op.deadlines is None:
        return op, ()
    return resume_all(
        failed(
            op,
            "guard_died",
            f"the pause guard died after {now - deadlines_of(op).started_at:.2f} s, so all VMs were resumed",
        )
    )


def _tick(op: Operation, now: float) -> Decision:  # noqa: PLR0912 - one flat table of phases
    if op.wake_at is None or now < op.wake_at:
        return op, ()
    deadlines = op.deadlines
    match op.phase:
        case "preparing":
            return not_prepared_in_time(op)
        case "swapping":
            return overdue(op)
        case "leaving":
            return not_left_in_time(op)
        case "stopping":
            return not_stopped_in_time(op)
        case "freezing":
            late = ", ".join(vm.vm for vm in op.vms if vm.frozen_at is None)
            return resume_all(
                failed(
                    op,
                    "freeze_failed",
                    f"not frozen within {now - deadlines_of(op).started_at:.2f} s: {late}",
                )
            )
        case "frozen":
            for vm in op.vms:
                if vm.digesting:
                    op = changed_vm(op, vm.vm, digesting=False, digest_note="the digest took too long")
            return _start_update(op, now)
        case "updated":
            for vm in op.vms:
                if vm.digesting:
                    op = changed_vm(op, vm.vm, digest_note="the second digest took too long")
            return resume_all(op)
        case "updating" if not op.update:
            if now >= deadlines_of(op).guard_at:
                op = failed(op, "pause_ran_out", "the host updater woke up after the guard's deadline")
            return _updated(op, now)
        case "updating":
            if op.kill_at is None and (deadlines is None or now < deadlines.resume_at):
                op = failed(op, "update_timeout", f"update {op.update} did not end within {_allowed(op)}")
                return _stop_update(op, now, "timeout")
            if op.kill_at is None:
                op = changed(
                    failed(op, "update_timeout", f"update {op.update} did not end in time"),
                    stop_outcome="timeout",
                )
            if op.method == "reboot":
                return start(op)
            if op.deadlines is None:
                return finish_killed(op)
            return resume_all(op)
        case _:
            return changed(op, wake_at=None), ()


def _allowed(op: Operation) -> str:
    """The time that the update was given, and what limited it, for the report."""
    if op.deadlines is None:
        return f"{op.update_timeout_s:.1f} s"
    left = op.deadlines.update_until - max((vm.frozen_at or 0.0) for vm in op.vms)
    if op.update_timeout_s <= left:
        return f"{op.update_timeout_s:.1f} s"
    return f"{left:.1f} s, all that the pause budget of {op.budget_s:g} s leaves for it"
