"""The course of a rollout: how far the state, the fleet and the time allow its waves to proceed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import msgspec

from caesura.contract.messages import WaveStatus
from caesura.contract.reasons import Reason, codes_of
from caesura_coordinator.fleet import fence_blockers, health_blockers, placement_blockers
from caesura_coordinator.inputs import (
    EventScheduled,
    EventStarted,
)
from caesura_coordinator.members import members_of
from caesura_coordinator.records import (
    FINAL,
    HostOperation,
    Wave,
    WaveEvent,
    event_id,
    operation_id,
)
from caesura_coordinator.step import Step
from caesura_coordinator.text import join_reasons
from caesura_coordinator.verification import verify

COMMAND_WINDOW_S = 30.0
"""s: hosts refuse a wave's command later than this after its start; a command delayed for that long should not be obeyed."""
REPORT_GRACE_S = 30.0
"""s: after the window and the budget, for a host that restarts and reconciles before it reports."""


def advance(step: Step) -> None:
    """Proceed as far as the state, the fleet and the time allow."""
    while step.rollout.status in {"running", "aborting"}:
        wave = step.rollout.current
        if wave is None:
            step.finish("completed")
            return
        status = step.rollout.status
        _from(step, wave)
        now = step.rollout.waves[wave.index]
        if (step.rollout.status, now.status, now.attempt) == (status, wave.status, wave.attempt):
            return


def _from(step: Step, wave: Wave) -> None:
    match wave.status:
        case "pending":
            _from_pending(step, wave)
        case "scheduled":
            _from_scheduled(step, wave)
        case "started":
            _from_started(step, wave)
        case "verifying":
            _from_verifying(step, wave)
        case "soaking":
            _from_soaking(step, wave)
        case "completed" | "failed" | "cancelled":
            raise AssertionError(f"wave {wave.index} is {wave.status} in a rollout that is not halted")


def _from_pending(step: Step, wave: Wave) -> None:
    blockers = health_blockers(step.fleet, wave.vms) or _placement(step, wave) or _fence(step, wave)
    if step.blocked(wave, blockers):
        return
    if all(vm.method == "live" for vm in wave.vms):
        _start(step, wave)  # no VM is paused: no event is announced
        return
    resources: dict[str, list[str]] = {}
    for vm in wave.ahead:
        resources.setdefault(vm.set, []).append(vm.vm)
    events = tuple(
        WaveEvent(
            set=name,
            event_id=event_id(step.rollout, wave, name, step.authority.epoch),
            resources=tuple(vms),
        )
        for name, vms in sorted(resources.items())
    )
    # Whole seconds, rounded up: NotBefore is published in RFC 1123, and a wave must not start before it.
    not_before = step.after(step.rollout.policy.notice_s)
    if not_before.microsecond:
        not_before = not_before.replace(microsecond=0) + timedelta(seconds=1)
    wave = step.move(
        wave,
        "scheduled",
        published_at=step.now,
        not_before=not_before,
        answers_by=not_before,
        events=events,
    )
    step.effects.extend(EventScheduled(event=event) for event in events)


def _placement(step: Step, wave: Wave) -> list[Reason]:
    return placement_blockers(step.fleet, wave.vms, {each.host for each in wave.done})


def _fence(step: Step, wave: Wave) -> list[Reason]:
    """Why the wave may not be started, or not be continued if a previous run of this coordinator started it."""
    return fence_blockers(
        step.fleet,
        wave.domains,
        step.rollout.set_hosts,
        members_of(wave.vms).by_host,
        epoch=step.authority.epoch,
        coordinator=step.authority.coordinator,
        own={each.operation for each in wave.operations},
    )


def _from_scheduled(step: Step, wave: Wave) -> None:
    policy = step.rollout.policy
    due = wave.not_before is not None and step.now >= wave.not_before
    # With so few answers some must be missing: no need to find out which.
    expected = sum(vm.agent for vm in wave.ahead) if wave.done else members_of(wave.vms).agents
    answered = len(wave.readiness) >= expected and all(event.approved_by for event in wave.events)
    if not due and not answered and not step.refused:
        return
    refusing = [
        Reason("agent_not_ready", f"{vm} is not ready: {answer.reason or 'its prepare hook refused'}")
        for vm, answer in sorted(wave.readiness.items())
        if not answer.ready
    ]
    silent = [vm.vm for vm in wave.ahead if vm.agent and vm.vm not in wave.readiness]
    if refusing and policy.on_not_ready == "halt":
        step.halt(wave, refusing)
        return
    if not due and (not answered or silent):
        return
    if silent and policy.on_not_ready == "halt":
        if any(until and step.now < until for until in (wave.answers_by, step.fleet.grace_until)):
            return  # they may have answered while this coordinator was down; they repeat their answers
        text = f"no answer of the agent by NotBefore: {join_reasons(silent, ', ')}"
        step.halt(wave, [Reason("agent_silent", text)])
        return
    if not step.blocked(wave, _placement(step, wave) or _fence(step, wave)):
        _start(step, wave)


def _start(step: Step, wave: Wave) -> None:
    operations = tuple(
        HostOperation(host=host, operation=operation_id(step.rollout, wave, host, step.authority.epoch))
        for host in dict.fromkeys(vm.host for vm in wave.ahead)
    )
    events = tuple(msgspec.structs.replace(event, status="started") for event in wave.events)
    step.move(
        wave,
        "started",
        events=events,
        operations=operations,
        fence_epoch=step.authority.epoch,
        started_at=step.now,
        not_after=step.after(COMMAND_WINDOW_S),
        report_by=step.after(
            COMMAND_WINDOW_S + step.rollout.outside_pause_s + step.rollout.policy.budget_s + REPORT_GRACE_S
        ),
    )
    step.effects.extend(EventStarted(event=event) for event in events)


def _from_started(step: Step, wave: Wave) -> None:
    if wave.report_by is not None and step.now >= wave.report_by:
        lost = tuple(
            msgspec.structs.replace(
                each, status="lost", reason="did not report in time", codes=("report_lost",)
            )
            if each.status not in FINAL
            else each
            for each in wave.operations
        )
        wave = step.put(msgspec.structs.replace(wave, operations=lost))
    if any(each.status not in FINAL for each in wave.operations):
        _fence_again(step, wave)
        return
    wrong = [each for each in wave.operations if each.status != "completed"]
    if step.rollout.status == "aborting":
        _aborted(step, wave)
    elif wrong or wave.outdated:
        texts = [_why(each) for each in wrong] + ([wave.outdated] if wave.outdated else [])
        codes = [code for each in wrong for code in each.codes or ("unexplained",)]
        codes += ["superseded"] if wave.outdated else []
        step.halt_for(wave, join_reasons(texts), tuple(dict.fromkeys(codes)))
    else:
        step.wrong = True
        step.move(wave, "verifying", verify_by=step.after(step.rollout.policy.verify_timeout_s))


def _fence_again(step: Step, wave: Wave) -> None:
    """Command under a new epoch only when no command of another coordinator can still be in effect in the sets (I1).

    While this one was down, another may have led: its operations must have ended. Hosts that do not receive our
    command in time count as lost for the wave, which halts it.
    """
    if wave.fence_epoch == step.authority.epoch:
        return
    blockers = _fence(step, wave)
    why, codes = join_reasons(blockers), codes_of(blockers)
    epoch = wave.fence_epoch if why else step.authority.epoch
    if (wave.waiting_for, wave.fence_epoch) != (why, epoch):
        step.put(msgspec.structs.replace(wave, waiting_for=why, waiting_codes=codes, fence_epoch=epoch))


def _aborted(step: Step, wave: Wave) -> None:
    """All hosts have answered the abort: the record says whether anything had been paused."""
    untouched = all(each.status in {"cancelled", "refused"} for each in wave.operations)
    status: WaveStatus = "cancelled" if untouched else "failed"
    reason, codes = step.rollout.reason, step.rollout.codes
    wave = step.end_events(wave, status, reason, codes)
    step.move(wave, status, reason=reason, codes=codes, ended_at=step.now)
    step.finish("aborted", reason, codes)


def _from_verifying(step: Step, wave: Wave) -> None:
    over = wave.verify_by is not None and step.now >= wave.verify_by
    ill = health_blockers(step.fleet, wave.vms)
    # A failure would have halted the wave when it became known, and with so few verdicts some must be missing.
    if not step.wrong and not over and (ill or len(wave.clocks) < members_of(wave.vms).verdicts):
        return
    wrong, missing = (
        [each for each in found if each.text not in wave.accepted]
        for found in verify(wave, step.rollout.policy)
    )
    if wrong:
        step.halt(_accepting(step, wave, wrong), wrong)
        return
    late = missing + ill
    if late:
        if over:
            step.halt(_accepting(step, wave, missing), late, "not verified in time: ")
        return
    wave = step.end_events(wave, "completed")
    step.move(wave, "soaking", soak_until=wave.soak_until or step.after(step.rollout.policy.soak_s))


def _accepting(step: Step, wave: Wave, found: Sequence[Reason]) -> Wave:
    """The wave with the findings that an operator accepts by a resume."""
    accepted = (*wave.accepted, *(each.text for each in found))
    return step.put(msgspec.structs.replace(wave, accepted=accepted))


def _from_soaking(step: Step, wave: Wave) -> None:
    ill = health_blockers(step.fleet, wave.vms)
    if step.blocked(wave, ill):
        return
    if wave.soak_until is None or step.now >= wave.soak_until:
        step.move(wave, "completed", ended_at=step.now)


def _why(operation: HostOperation) -> str:
    return f"{operation.host} {operation.status}" + (f": {operation.reason}" if operation.reason else "")
