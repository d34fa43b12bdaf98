"""The course of a rollout: how far the state, the fleet and the time allow its waves to proceed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec

from caesura.contract.messages import WaveStatus
from caesura.contract.reasons import Reason, codes_of
from caesura_coordinator.decision import Decision
from caesura_coordinator.effects import EventScheduled, EventStarted
from caesura_coordinator.members import members_of
from caesura_coordinator.not_before import first_not_before
from caesura_coordinator.queued_waves import keep_waiting, leave_queue
from caesura_coordinator.records import (
    FINAL,
    HostOperation,
    Wave,
    WaveEvent,
    event_id,
    operation_id,
)
from caesura_coordinator.text import join_reasons
from caesura_coordinator.verification import host_verified, verify
from caesura_coordinator.wave_gates import (
    all_healthy,
    announcement_blockers,
    continuation_blockers,
    health_blockers,
    start_blockers,
)

COMMAND_WINDOW_S = 30.0
"""s: hosts refuse a wave's command later than this after its start; a command delayed for that long should not be obeyed."""
REPORT_GRACE_S = 30.0
"""s: after the window and the budget, for a host that restarts and reconciles before it reports."""


def advance(decision: Decision) -> None:
    """Proceed as far as the state, the fleet and the time allow."""
    while decision.rollout.status in {"running", "aborting"}:
        wave = decision.rollout.current
        if wave is None:
            decision.finish("completed")
            return
        status = decision.rollout.status
        _from(decision, wave)
        now = decision.rollout.waves[wave.index]
        if (decision.rollout.status, now.status, now.attempt) == (status, wave.status, wave.attempt):
            return


def _from(decision: Decision, wave: Wave) -> None:
    match wave.status:
        case "pending":
            _from_pending(decision, wave)
        case "scheduled":
            _from_scheduled(decision, wave)
        case "started":
            _from_started(decision, wave)
        case "verifying":
            _from_verifying(decision, wave)
        case "soaking":
            _from_soaking(decision, wave)
        case "completed" | "failed" | "cancelled":
            raise AssertionError(f"wave {wave.index} is {wave.status} in a rollout that is not halted")


def _from_pending(decision: Decision, wave: Wave) -> None:
    nothing_pauses = all(vm.method == "live" for vm in wave.vms)
    if decision.ahead:
        if nothing_pauses:
            keep_waiting(decision, wave)  # there is no event to announce
        else:
            _announce(decision, wave, first_not_before(decision.rollout.policy, decision.ahead, decision.now))
        return
    _take_sets(decision)
    if decision.blocked(wave, announcement_blockers(decision, wave)):
        return
    if nothing_pauses:
        _start(decision, wave)  # no VM is paused: no event is announced
    else:
        _announce(decision, wave, first_not_before(decision.rollout.policy, (), decision.now))


def _take_sets(decision: Decision) -> None:
    """Those ahead have ended, if there were any: the rollout holds its sets from now on."""
    if decision.rollout.queued_behind:
        decision.rollout = msgspec.structs.replace(decision.rollout, queued_behind="")


def _announce(decision: Decision, wave: Wave, not_before: datetime) -> None:
    # One event for each set and host: the smallest group of VMs that can be acted on independently, as in Azure.
    resources: dict[tuple[str, str], list[str]] = {}
    for vm in wave.pending_vms:
        resources.setdefault((vm.set, vm.host), []).append(vm.vm)
    events = tuple(
        WaveEvent(
            set=name,
            host=host,
            event_id=event_id(decision.rollout, wave, name, host, decision.authority.epoch),
            resources=tuple(vms),
        )
        for (name, host), vms in sorted(resources.items())
    )
    wave = decision.move(
        wave,
        "scheduled",
        published_at=decision.now,
        not_before=not_before,
        answers_by=not_before,
        events=events,
        queued=bool(decision.ahead),
    )
    decision.effects.extend(EventScheduled(event=event) for event in events)
    if decision.ahead:
        keep_waiting(decision, wave)


def _from_scheduled(decision: Decision, wave: Wave) -> None:
    approvals = sum(bool(each.approved_by) for each in wave.events) if decision.time_passed else 0
    if approvals > wave.approvals_shown:
        wave = decision.put(msgspec.structs.replace(wave, approvals_shown=approvals))
    if wave.queued:
        if decision.ahead:
            keep_waiting(decision, wave)
            return
        _take_sets(decision)
        # What was not asked when it was announced: the rollout ahead may have been aborted in the middle.
        if decision.blocked(wave, announcement_blockers(decision, wave)):
            return
        wave = leave_queue(decision, decision.rollout.waves[wave.index])
    policy = decision.rollout.policy
    due = wave.not_before is not None and decision.now >= wave.not_before
    # With so few answers some must be missing: no need to find out which.
    expected = (
        sum(vm.agent for vm in wave.pending_vms) if wave.completed_operations else members_of(wave.vms).agents
    )
    answered = len(wave.readiness) >= expected and all(event.approved_by for event in wave.events)
    if not due and not answered and not decision.refused:
        return
    refusing = [
        Reason("agent_not_ready", f"{vm} is not ready: {answer.reason or 'its prepare hook refused'}")
        for vm, answer in sorted(wave.readiness.items())
        if not answer.ready
    ]
    silent = [vm.vm for vm in wave.pending_vms if vm.agent and vm.vm not in wave.readiness]
    if refusing and policy.on_not_ready == "halt":
        decision.halt(wave, refusing)
        return
    if not due and (not answered or silent):
        return
    if silent and policy.on_not_ready == "halt":
        if any(until and decision.now < until for until in (wave.answers_by, decision.fleet.grace_until)):
            return  # they may have answered while this coordinator was down; they repeat their answers
        text = f"no answer of the agent by NotBefore: {join_reasons(silent, ', ')}"
        decision.halt(wave, [Reason("agent_silent", text)])
        return
    if not decision.blocked(wave, start_blockers(decision, wave)):
        _start(decision, wave)


def _start(decision: Decision, wave: Wave) -> None:
    if decision.ahead:
        raise AssertionError(
            f"rollout {decision.rollout.id} starts though {decision.ahead[0].id} has not ended (I1)"
        )
    operations = tuple(
        HostOperation(
            host=host, operation=operation_id(decision.rollout, wave, host, decision.authority.epoch)
        )
        for host in dict.fromkeys(vm.host for vm in wave.pending_vms)
    )
    events = tuple(msgspec.structs.replace(event, status="started") for event in wave.events)
    decision.move(
        wave,
        "started",
        events=events,
        operations=operations,
        fence_epoch=decision.authority.epoch,
        started_at=decision.now,
        not_after=decision.after(COMMAND_WINDOW_S),
        report_by=decision.after(
            COMMAND_WINDOW_S
            + decision.rollout.work_outside_pause_s
            + decision.rollout.policy.budget_s
            + REPORT_GRACE_S
        ),
    )
    decision.effects.extend(EventStarted(event=event) for event in events)


def _from_started(decision: Decision, wave: Wave) -> None:
    if wave.report_by is not None and decision.now >= wave.report_by:
        lost = tuple(
            msgspec.structs.replace(
                each, status="lost", reason="did not report in time", codes=("report_lost",)
            )
            if each.status not in FINAL
            else each
            for each in wave.operations
        )
        wave = decision.put(msgspec.structs.replace(wave, operations=lost))
    if any(each.status not in FINAL for each in wave.operations):
        _end_verified_events(decision, wave)
        _fence_again(decision, decision.rollout.waves[wave.index])
        return
    wrong = [each for each in wave.operations if each.status != "completed"]
    if decision.rollout.status == "aborting":
        _aborted(decision, wave)
    elif wrong or wave.superseded_reason:
        texts = [_why(each) for each in wrong] + ([wave.superseded_reason] if wave.superseded_reason else [])
        codes = [code for each in wrong for code in each.codes or ("unexplained",)]
        codes += ["superseded"] if wave.superseded_reason else []
        decision.halt_for(wave, join_reasons(texts), tuple(dict.fromkeys(codes)))
    else:
        decision.wrong = True
        decision.move(wave, "verifying", verify_by=decision.after(decision.rollout.policy.verify_timeout_s))


def _fence_again(decision: Decision, wave: Wave) -> None:
    """Command under a new epoch only when no command of another coordinator can still be in effect in the sets (I1).

    While this one was down, another may have led: its operations must have ended. Hosts that do not receive our
    command in time count as lost for the wave, which halts it.
    """
    if wave.fence_epoch == decision.authority.epoch:
        return
    if wave.waiting_for and not decision.time_passed:
        return  # while all hosts of a large fleet are in the way a look costs milliseconds, and messages come by thousands
    blockers = continuation_blockers(decision, wave)
    why, codes = join_reasons(blockers), codes_of(blockers)
    epoch = wave.fence_epoch if why else decision.authority.epoch
    if (wave.waiting_for, wave.fence_epoch) != (why, epoch):
        decision.put(msgspec.structs.replace(wave, waiting_for=why, waiting_codes=codes, fence_epoch=epoch))


def _end_verified_events(decision: Decision, wave: Wave) -> None:
    """Complete the events of the hosts that have done their part and whose VMs are verified; the wave continues for the others.

    Only when time has passed, a few times a second: then a document changes once for many hosts, and a message costs in its own size.
    """
    if not decision.time_passed or decision.rollout.status != "running" or wave.superseded_reason:
        return
    verified: dict[str, bool] = {"": False}
    operations = {each.host: each for each in wave.operations}
    ended = []
    for event in wave.events:
        if event.status != "started":
            continue
        if event.host not in verified:
            verified[event.host] = host_verified(
                wave, operations[event.host], decision.rollout.policy
            ) and all_healthy(decision.fleet, members_of(wave.vms).by_host[event.host])
        if verified[event.host]:
            ended.append(event.event_id)
    if ended:
        decision.end_events(wave, "completed", only=frozenset(ended))


def _aborted(decision: Decision, wave: Wave) -> None:
    """All hosts have answered the abort: the record says whether anything had been paused."""
    untouched = all(each.status in {"cancelled", "refused"} for each in wave.operations)
    status: WaveStatus = "cancelled" if untouched else "failed"
    reason, codes = decision.rollout.reason, decision.rollout.codes
    wave = decision.end_events(wave, status, reason, codes)
    decision.move(wave, status, reason=reason, codes=codes, ended_at=decision.now)
    decision.finish("aborted", reason, codes)


def _from_verifying(decision: Decision, wave: Wave) -> None:
    over = wave.verify_by is not None and decision.now >= wave.verify_by
    ill = health_blockers(decision.fleet, wave.vms)
    # A failure would have halted the wave when it became known, and with so few verdicts some must be missing.
    if not decision.wrong and not over and (ill or len(wave.clocks) < members_of(wave.vms).verdicts):
        _end_verified_events(decision, wave)
        return
    wrong, missing = (
        [each for each in found if each.text not in wave.acknowledged_findings]
        for found in verify(wave, decision.rollout.policy)
    )
    if wrong:
        decision.halt(_accepting(decision, wave, wrong), wrong)
        return
    late = missing + ill
    if late:
        if over:
            decision.halt(_accepting(decision, wave, missing), late, "not verified in time: ")
        return
    wave = decision.end_events(wave, "completed")
    decision.move(
        wave, "soaking", soak_until=wave.soak_until or decision.after(decision.rollout.policy.soak_s)
    )


def _accepting(decision: Decision, wave: Wave, found: Sequence[Reason]) -> Wave:
    """The wave with the findings that an operator accepts by a resume."""
    accepted = (*wave.acknowledged_findings, *(each.text for each in found))
    return decision.put(msgspec.structs.replace(wave, acknowledged_findings=accepted))


def _from_soaking(decision: Decision, wave: Wave) -> None:
    ill = health_blockers(decision.fleet, wave.vms)
    if decision.blocked(wave, ill):
        return
    if wave.soak_until is None or decision.now >= wave.soak_until:
        decision.move(wave, "completed", ended_at=decision.now)


def _why(operation: HostOperation) -> str:
    return f"{operation.host} {operation.status}" + (f": {operation.reason}" if operation.reason else "")
