"""One operation of this host, as a pure machine: what to do next, and what is to be told about it.

``decide(operation, event, now) -> (operation, effects)``. All instants are seconds on CLOCK_MONOTONIC. The
shell performs the effects in order and feeds back what came of them. The machine's promises, held by
Hypothesis (``tests/unit/host_updater/test_pause_machine.py``):

- nothing is frozen before the guard is armed, after an abort, or when too little of the budget is left;
- every VM that may have been touched is resumed, and no later than ``Schedule.resume_at`` is the resume asked for;
- every operation ends exactly once, and not before every VM runs or is gone.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from caesura.contract.messages import Method
from caesura.runtime.errors import CaesuraError
from caesura_host_updater.schedule import Schedule
from caesura_host_updater.steps import (
    AbortAsked,
    Arm,
    Armed,
    ArmRefused,
    Begin,
    Digested,
    DigestVms,
    Disarm,
    Disarmed,
    Effect,
    Event,
    Finish,
    FreezeVms,
    GuardLost,
    Note,
    Outcome,
    ResumeVms,
    RunUpdate,
    StopUpdate,
    TellFrozen,
    TellResumed,
    Tick,
    UpdateEnded,
    VmFroze,
    VmLost,
    VmNotFrozen,
    VmResumed,
)

Phase = Literal[
    "accepted", "arming", "freezing", "frozen", "updating", "updated", "resuming", "resumed", "ended"
]
End = Literal["completed", "failed", "cancelled"]


class IllegalTransition(CaesuraError):
    """An event that cannot happen in this phase: a bug in the shell, never a late message."""

    def __init__(self, phase: str, event: object, wanted: str) -> None:
        self.phase = phase
        super().__init__(f"{type(event).__name__} in phase {phase!r}: it belongs to phase {wanted!r}")


class VmPause(msgspec.Struct, frozen=True, kw_only=True):
    """One VM of an operation."""

    vm: str
    set: str
    update_domain: int
    event_id: str = ""
    boot_id: str = ""
    """Its agent's boot id before the pause, empty if it was not heard."""
    digestible: bool = False
    called_at: float | None = None
    """Just before its freeze call; None: it was never asked to freeze."""
    frozen_at: float | None = None
    """When it was confirmed to stand still."""
    resumed_at: float | None = None
    end: Literal["", "running", "gone"] = ""
    resumed_by: Literal["updater", "guard", "nobody"] = "nobody"
    told: bool = False
    """Whether its `resumed` was announced."""
    digest_before: str = ""
    digest_after: str = ""
    digest_note: str = ""
    """Why there is no digest."""
    digesting: bool = False
    error: str = ""

    @property
    def pause_s(self) -> float:
        """Seconds it stood still, at most."""
        if self.called_at is None or self.resumed_at is None:
            return 0.0
        return max(0.0, self.resumed_at - self.called_at)


class UpdateRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the update. ``key``: the VM for scope vm, empty for scope host."""

    key: str = ""
    started: bool = False
    outcome: Outcome | None = None
    exit_code: int | None = None
    seconds: float = 0.0
    output_tail: str = ""


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """An operation and where it is."""

    operation: str
    method: Method
    budget_s: float
    hold_s: float = 0.0
    update: str = ""
    update_timeout_s: float = 0.0
    vms: tuple[VmPause, ...]
    runs: tuple[UpdateRun, ...] = ()
    phase: Phase = "accepted"
    schedule: Schedule | None = None
    failure: str = ""
    """The first thing that went wrong."""
    aborted: bool = False
    wake_at: float | None = None
    """When the machine wants a Tick."""
    kill_at: float | None = None
    """The update was asked to end and is killed at this instant."""
    stop_outcome: Outcome = "interrupted"
    guard_why: str = ""
    """Why the guard fired, if it did."""
    end: End | None = None

    @property
    def paused(self) -> bool:
        """Whether a VM of it was shown to stand still."""
        return any(vm.frozen_at is not None for vm in self.vms)


Decision = tuple[Operation, tuple[Effect, ...]]

_BEFORE_RESUME: tuple[Phase, ...] = ("arming", "freezing", "frozen", "updating", "updated")


def decide(op: Operation, event: Event, now: float) -> Decision:
    """The next state and what to do.

    Raises:
        IllegalTransition: an event that only a broken shell can bring in this phase.
    """
    match event:
        case Begin():
            return _begin(op, event, now)
        case Armed() | ArmRefused():
            return _armed(op, event, now)
        case VmFroze() | VmNotFrozen():
            return _freeze_result(op, event, now)
        case VmLost():
            return _vm_lost(op, event, now)
        case Digested():
            return _digested(op, event, now)
        case UpdateEnded():
            return _update_ended(op, event, now)
        case AbortAsked():
            return _abort(op, event, now)
        case GuardLost():
            return _guard_lost(op, now)
        case VmResumed():
            return _vm_resumed(op, event)
        case Disarmed():
            return _disarmed(op, event)
        case Tick():
            return _tick(op, now)


def _set(op: Operation, **changes: object) -> Operation:
    return msgspec.structs.replace(op, **changes)


def _set_vm(op: Operation, name: str, **changes: object) -> Operation:
    vms = tuple(msgspec.structs.replace(vm, **changes) if vm.vm == name else vm for vm in op.vms)
    return _set(op, vms=vms)


def _vm(op: Operation, name: str) -> VmPause:
    return next(vm for vm in op.vms if vm.vm == name)


def _fail(op: Operation, why: str) -> Operation:
    return _set(op, failure=op.failure or why)


def _plan(op: Operation) -> Schedule:
    if op.schedule is None:
        raise IllegalTransition(op.phase, op, "arming")
    return op.schedule


def _begin(op: Operation, event: Begin, now: float) -> Decision:
    if op.phase != "accepted":
        raise IllegalTransition(op.phase, event, "accepted")
    if op.end is not None or op.aborted:
        return _finish(op)
    if op.method == "live":
        return _start_update(op, now)
    schedule = Schedule.of(now, op.budget_s)
    op = _set(op, phase="arming", schedule=schedule, wake_at=schedule.freeze_by)
    return op, (Arm(schedule.guard_at),)


def _armed(op: Operation, event: Armed | ArmRefused, now: float) -> Decision:
    if op.phase != "arming":
        raise IllegalTransition(op.phase, event, "arming")
    if isinstance(event, ArmRefused):
        op = _fail(op, f"nothing was frozen: the pause guard could not be armed: {event.why}")
    elif op.failure or op.aborted:
        pass
    elif now >= _plan(op).freeze_by:
        op = _fail(
            op, f"nothing was frozen: {now - _plan(op).started_at:.2f} s passed before the first freeze call"
        )
    else:
        op = _set(op, phase="freezing", wake_at=_plan(op).freeze_by)
        return op, (FreezeVms(_plan(op).freeze_by), Note())
    return _resume(op)


def _freeze_result(op: Operation, event: VmFroze | VmNotFrozen, now: float) -> Decision:
    if op.phase in ("accepted", "arming", "ended"):
        raise IllegalTransition(op.phase, event, "freezing")
    told: tuple[Effect, ...] = ()
    if isinstance(event, VmFroze):
        op = _set_vm(op, event.vm, called_at=event.called_at, frozen_at=event.at)
        told = (TellFrozen(event.vm),)
    else:
        op = _set_vm(op, event.vm, called_at=event.called_at, error=event.why)
        op = _fail(op, f"VM {event.vm} could not be frozen: {event.why}")
    if op.phase != "freezing":
        return op, told
    if op.failure:
        op, more = _resume(op)
        return op, told + more
    if any(vm.frozen_at is None for vm in op.vms):
        return op, told
    op, more = _frozen(op, now)
    return op, told + more


def _frozen(op: Operation, now: float) -> Decision:
    schedule = _plan(op)
    digest = tuple(vm.vm for vm in op.vms if vm.digestible)
    op = _set(op, phase="frozen", wake_at=schedule.digest_until)
    if not digest or now >= schedule.digest_until:
        op, effects = _start_update(op, now)
        return op, (Note(), *effects)
    op = _digesting(op, digest)
    return op, (Note(), DigestVms(digest, schedule.digest_until))


def _digesting(op: Operation, names: tuple[str, ...]) -> Operation:
    for name in names:
        op = _set_vm(op, name, digesting=True)
    return op


def _digested(op: Operation, event: Digested, now: float) -> Decision:
    if not _vm(op, event.vm).digesting or op.phase not in ("frozen", "updated"):
        return op, ()  # too late: it was not waited for
    op = _set_vm(op, event.vm, digesting=False)
    if op.phase == "frozen":
        op = _set_vm(op, event.vm, digest_before=event.digest, digest_note=event.note)
    else:
        op = _set_vm(op, event.vm, digest_after=event.digest, digest_note=event.note)
        if event.digest and event.digest != _vm(op, event.vm).digest_before:
            op = _fail(op, f"the memory of VM {event.vm} changed while it stood still")
    if any(vm.digesting for vm in op.vms):
        return op, ()
    return _start_update(op, now) if op.phase == "frozen" else _resume(op)


def _start_update(op: Operation, now: float) -> Decision:
    """From frozen, or at once for method live."""
    schedule = op.schedule
    if schedule is not None and now >= schedule.update_until:
        return _resume(_fail(op, "the budget was used up before the update could start"))
    if not op.update:
        op = _set(op, phase="updating", wake_at=min(now + op.hold_s, _plan(op).resume_at))
        return op, (Note(),)
    until = now + op.update_timeout_s
    if schedule is not None:
        until = min(until, schedule.update_until)
    runs = tuple(msgspec.structs.replace(run, started=True) for run in op.runs)
    op = _set(op, phase="updating", wake_at=until, runs=runs)
    return op, (Note(), RunUpdate(tuple(run.key for run in runs)))


def _running(op: Operation) -> bool:
    return any(run.started and run.outcome is None for run in op.runs)


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
            op = _fail(op, f"update {op.update} failed{where}{code}")
    op = _set(op, runs=tuple(runs))
    if op.phase != "updating" or _running(op):
        return op, ()
    return _updated(op, now)


def _updated(op: Operation, now: float) -> Decision:
    """The update is over: check memory if there is time, then resume."""
    if op.method == "live":
        return _finish(op)
    schedule = _plan(op)
    op = _set(op, phase="updated")
    names = tuple(vm.vm for vm in op.vms if vm.digest_before and not vm.error)
    if not names or op.aborted or now >= schedule.digest_until:
        if not op.aborted:
            for name in names:
                op = _set_vm(op, name, digest_note="no time was left in the budget for the second digest")
        op, effects = _resume(op)
        return op, (Note(), *effects)
    op = _set(_digesting(op, names), wake_at=schedule.digest_until)
    return op, (Note(), DigestVms(names, schedule.digest_until))


def _stop_update(op: Operation, now: float, outcome: Outcome) -> Decision:
    """Ask the update to end; it has one margin of grace, but never beyond the instant of the resume."""
    margin = op.schedule.margin_s if op.schedule is not None else 1.0
    kill_at = now + margin
    if op.schedule is not None:
        kill_at = min(kill_at, op.schedule.resume_at)
    op = _set(op, kill_at=kill_at, wake_at=kill_at, stop_outcome=outcome)
    return op, (StopUpdate(kill=False),)


def _kill_update(op: Operation) -> Operation:
    runs = tuple(
        msgspec.structs.replace(run, outcome=op.stop_outcome) if run.started and run.outcome is None else run
        for run in op.runs
    )
    return _set(op, runs=runs)


def _resume(op: Operation) -> Decision:
    """Let everything run that may have been touched, whatever else is going on."""
    effects: list[Effect] = []
    if _running(op):
        op = _kill_update(op)
        effects.append(StopUpdate(kill=True))
    op = _set(op, wake_at=None)
    if op.phase in ("accepted", "arming"):
        op = _set(op, phase="resumed")
        return op, (*effects, Disarm())
    op = _set(op, phase="resuming", vms=tuple(msgspec.structs.replace(vm, digesting=False) for vm in op.vms))
    return op, (*effects, ResumeVms(tuple(vm.vm for vm in op.vms)), Note())


def _vm_lost(op: Operation, event: VmLost, now: float) -> Decision:
    if op.phase not in ("freezing", "frozen", "updating", "updated"):
        return op, ()
    op = _set_vm(op, event.vm, error=_vm(op, event.vm).error or event.why)
    op = _fail(op, f"VM {event.vm} {event.why}")
    if event.thawed or op.phase == "freezing":
        return _resume(
            op
        )  # it runs while the host is changed under it, or nothing is begun: get out of there
    if _vm(op, event.vm).digesting:
        return _digested(op, Digested(event.vm, "", "it ended"), now)
    return op, ()


def _abort(op: Operation, event: AbortAsked, now: float) -> Decision:
    if op.phase not in ("accepted", *_BEFORE_RESUME) or op.aborted:
        return op, ()
    op = _set(_fail(op, f"aborted: {event.why}" if event.why else "aborted"), aborted=True)
    if op.phase in ("accepted", "arming"):
        return op, ()  # Begin, or the guard's answer, ends it without a freeze
    if op.phase == "updating" and _running(op):
        return _stop_update(op, now, "interrupted") if op.kill_at is None else (op, ())
    return _resume(op)


def _guard_lost(op: Operation, now: float) -> Decision:
    if op.phase == "arming":
        return _fail(op, "nothing was frozen: the pause guard died"), ()
    if op.phase not in _BEFORE_RESUME or op.method == "live":
        return op, ()
    return _resume(
        _fail(op, f"the pause guard died after {now - _plan(op).started_at:.2f} s, so all VMs were resumed")
    )


def _tick(op: Operation, now: float) -> Decision:  # noqa: PLR0912 - one flat table of phases
    if op.wake_at is None or now < op.wake_at:
        return op, ()
    schedule = op.schedule
    match op.phase:
        case "freezing":
            late = ", ".join(vm.vm for vm in op.vms if vm.frozen_at is None)
            return _resume(_fail(op, f"not frozen within {now - _plan(op).started_at:.2f} s: {late}"))
        case "frozen":
            for vm in op.vms:
                if vm.digesting:
                    op = _set_vm(op, vm.vm, digesting=False, digest_note="the digest took too long")
            return _start_update(op, now)
        case "updated":
            return _resume(op)
        case "updating" if not op.update:
            if now >= _plan(op).guard_at:
                op = _fail(op, "the host updater woke up after the guard's deadline")
            return _updated(op, now)
        case "updating":
            if op.kill_at is None and (schedule is None or now < schedule.resume_at):
                op = _fail(op, f"update {op.update} did not end within {_allowed(op)}")
                return _stop_update(op, now, "timeout")
            if op.kill_at is None:
                op = _set(_fail(op, f"update {op.update} did not end in time"), stop_outcome="timeout")
            if op.method == "live":
                return _finish_killed(op)
            return _resume(op)
        case _:
            return _set(op, wake_at=None), ()


def _allowed(op: Operation) -> str:
    """The time that the update was given, and what limited it, for the report."""
    if op.schedule is None:
        return f"{op.update_timeout_s:.1f} s"
    left = op.schedule.update_until - max((vm.frozen_at or 0.0) for vm in op.vms)
    if op.update_timeout_s <= left:
        return f"{op.update_timeout_s:.1f} s"
    return f"{left:.1f} s, all that the pause budget of {op.budget_s:g} s leaves for it"


def _finish_killed(op: Operation) -> Decision:
    op, effects = _finish(_kill_update(op))
    return op, (StopUpdate(kill=True), *effects)


def _vm_resumed(op: Operation, event: VmResumed) -> Decision:
    if op.phase != "resuming" or _vm(op, event.vm).end:
        return op, ()
    effects: list[Effect] = []
    if event.was_held:
        op, effects = _was_frozen(op, event.vm)
    by = "updater" if _vm(op, event.vm).called_at is not None and event.end == "running" else "nobody"
    op = _set_vm(op, event.vm, resumed_at=event.at, end=event.end, resumed_by=by)
    if event.end == "gone":
        op = _set_vm(op, event.vm, error=_vm(op, event.vm).error or "ended while it was paused")
        op = _fail(op, f"VM {event.vm} ended while it was paused")
    # After the guard's deadline only the guard knows who let it run, and when: wait for its record.
    if event.at < _plan(op).guard_at:
        op, more = _tell_resumed(op, event.vm)
        effects += more
    if any(not vm.end for vm in op.vms):
        return op, tuple(effects)
    return _set(op, phase="resumed"), (*effects, Note(), Disarm())


def _was_frozen(op: Operation, name: str) -> tuple[Operation, list[Effect]]:
    """It stood still without a confirmation: it counts from its freeze call on."""
    vm = _vm(op, name)
    if vm.frozen_at is not None or vm.called_at is None:
        return op, []
    return _set_vm(op, name, frozen_at=vm.called_at), [TellFrozen(name)]


def _tell_resumed(op: Operation, name: str) -> tuple[Operation, list[Effect]]:
    vm = _vm(op, name)
    if vm.told or vm.frozen_at is None or vm.end != "running":
        return op, []
    return _set_vm(op, name, told=True), [TellResumed(name)]


def _disarmed(op: Operation, event: Disarmed) -> Decision:
    if op.phase != "resumed":
        raise IllegalTransition(op.phase, event, "resumed")
    effects: list[Effect] = []
    caught: list[str] = []
    for catch in event.catches:
        if not catch.was_frozen or catch.running_at is None or _vm(op, catch.vm).told:
            continue
        caught.append(catch.vm)
        op, more = _was_frozen(op, catch.vm)
        effects += more
        vm = _vm(op, catch.vm)
        called_at = vm.called_at
        if catch.frozen_after is not None and called_at is not None:
            called_at = max(called_at, catch.frozen_after)
        resumed_at = catch.running_at if vm.resumed_at is None else min(vm.resumed_at, catch.running_at)
        by = vm.resumed_by if vm.end == "gone" else "guard"
        op = _set_vm(op, catch.vm, called_at=called_at, resumed_at=resumed_at, resumed_by=by)
    if caught:
        why = f"the pause guard resumed VM {', '.join(caught)}: {event.why}"
        op = _set(op, failure=f"{why}; {op.failure}" if op.failure else why, guard_why=event.why)
    for vm in op.vms:
        op, more = _tell_resumed(op, vm.vm)
        effects += more
    op, end = _finish(op)
    return op, (*effects, *end)


def _finish(op: Operation) -> Decision:
    end: End = "completed"
    if op.failure:
        touched = op.paused or any(run.started for run in op.runs)
        end = "cancelled" if op.aborted and not touched else "failed"
    return _set(op, phase="ended", end=end, wake_at=None), (Finish(),)
