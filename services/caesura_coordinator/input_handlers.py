"""The effect of each input on a rollout: requests of operators, approvals, answers, reports. Pure.

A repeated or late input changes nothing. What follows from it, and from time, is in ``wave_transitions``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from operator import attrgetter
from typing import TypeVar

import msgspec

from caesura.contract.messages import OperationReported, VmClockSynced, VmReady, WaveStatus
from caesura.contract.reasons import Reason
from caesura.lifecycle.errors import IllegalStatusChange
from caesura_coordinator.decision import Decision
from caesura_coordinator.effects import EventApprovedEffect, RolloutMoved
from caesura_coordinator.inputs import Approve, DocumentSuperseded
from caesura_coordinator.members import members_of
from caesura_coordinator.proofs import clock_verdict
from caesura_coordinator.records import (
    FINAL,
    AgentReadiness,
    HostOperation,
    Wave,
    WaveEvent,
)
from caesura_coordinator.request_refusals import RequestRefused
from caesura_coordinator.text import truncate
from caesura_coordinator.verification import verify_vm

V = TypeVar("V")
_SET_OF: Callable[[WaveEvent], str] = attrgetter("set")


def abort(decision: Decision, reason: str) -> None:
    """The operator aborts: operations already commanded finish first."""
    if decision.rollout.status == "aborting":
        return
    if not decision.rollout.active:
        raise IllegalStatusChange(f"rollout {decision.rollout.id}", decision.rollout.status, "aborted")
    text = f"aborted: {reason}" if reason else "aborted by the operator"
    if decision.rollout.status == "halted" and decision.rollout.reason:
        # Readers look for the failure afterwards, not only for the abort.
        text = f"{text}; it had halted: {decision.rollout.reason}"
    text = truncate(text)
    codes = tuple(dict.fromkeys(("aborted", *decision.rollout.codes)))
    wave = decision.rollout.current
    if wave is not None and wave.status == "started" and decision.rollout.status == "running":
        decision.rollout = msgspec.structs.replace(
            decision.rollout, status="aborting", reason=text, codes=codes
        )
        decision.effects.append(RolloutMoved(rollout=decision.rollout))
        return
    if wave is not None and wave.status in {"pending", "scheduled", "verifying", "soaking"}:
        _cancel(decision, wave, text, codes)
    decision.finish("aborted", text, codes)


def _cancel(decision: Decision, wave: Wave, text: str, codes: tuple[str, ...]) -> None:
    if (
        wave.status == "soaking"
    ):  # its events have ended and its VMs are verified: it is done, only the soak is cut short
        decision.move(wave, "completed", ended_at=decision.now)
        return
    status: WaveStatus = "failed" if wave.started_at else "cancelled"
    wave = decision.end_events(wave, status, text, codes)
    decision.move(wave, status, reason=text, codes=codes, ended_at=decision.now)


def resume(decision: Decision) -> None:
    """The operator continues after a halt. Raises as ``decide``."""
    if decision.rollout.status != "halted":
        raise IllegalStatusChange(f"rollout {decision.rollout.id}", decision.rollout.status, "running")
    wave = decision.rollout.current
    lost = sorted(each.host for each in wave.operations if each.status == "lost") if wave else []
    if lost:
        raise RequestRefused(
            "report_outstanding",
            f"rollout {decision.rollout.id} cannot be resumed yet: {', '.join(lost)} never reported how its operation ended; "
            "bring the host updater back (it reports at start), or abort the rollout",
        )
    decision.rollout = msgspec.structs.replace(decision.rollout, status="running", reason="", codes=())
    decision.effects.append(RolloutMoved(rollout=decision.rollout))
    if wave is None or wave.status != "failed":
        return
    done = wave.completed_operations + tuple(each for each in wave.operations if each.status == "completed")
    hosts = {each.host for each in done}
    # Hosts that completed their part are not paused again.
    again = Wave(
        index=wave.index,
        domains=wave.domains,
        vms=wave.vms,
        attempt=wave.attempt + 1,
        completed_operations=done,
        clocks={vm.vm: wave.clocks[vm.vm] for vm in wave.vms if vm.host in hosts and vm.vm in wave.clocks},
    )
    if any(vm.host not in hosts for vm in wave.vms):
        decision.move(again, "pending")
        return
    # The operator has seen the findings of the verification so far and accepts them: what it has not checked (a lost
    # host that completed its part after all, an outstanding verdict) is checked now.
    again = msgspec.structs.replace(
        again,
        started_at=wave.started_at,
        acknowledged_findings=wave.acknowledged_findings,
        soak_until=decision.now if wave.soak_until is not None else None,
    )
    decision.wrong = True
    decision.move(again, "verifying", verify_by=decision.after(decision.rollout.policy.verify_timeout_s))


def document_superseded(decision: Decision, found: DocumentSuperseded) -> None:
    """Another coordinator has published events of the set in the meantime."""
    wave = decision.rollout.current
    if wave is None or decision.rollout.status == "halted" or found.set not in decision.rollout.sets:
        return
    # Our events that are no longer in the document have ended, announced by the coordinator that ended them.
    events = tuple(
        msgspec.structs.replace(each, status="failed" if each.status == "started" else "cancelled")
        if each.set == found.set
        and each.status in {"scheduled", "started"}
        and each.event_id not in found.open_events
        else each
        for each in wave.events
    )
    why = (
        f"events of set {found.set} were announced that this coordinator has no record of: another one "
        "was active, or the store is an old copy. Check the fleet, then resume or abort"
    )
    wave = decision.put(msgspec.structs.replace(wave, events=events, superseded_reason=why))
    if wave.status != "started":  # operations already commanded finish first
        decision.halt(wave, [Reason("superseded", why)])


def approve(decision: Decision, approval: Approve) -> None:
    """A workload approves."""
    wave = decision.rollout.current
    if wave is None or wave.status != "scheduled":
        return
    located = decision.fleet.vm(approval.by)
    place = _event_of(wave, located.record.set, approval.event_id) if located is not None else None
    if place is None:
        return
    event = wave.events[place]
    if not event.approved_by:
        event = msgspec.structs.replace(event, approved_by=approval.by, approved_at=decision.now)
        decision.effects.append(EventApprovedEffect(event=event))
        decision.put(msgspec.structs.replace(wave, events=_replaced(wave.events, place, event)))


def ready(decision: Decision, answer: VmReady) -> None:
    """An agent reports whether its guest is ready."""
    wave = decision.rollout.current
    if wave is None or wave.status != "scheduled":
        return
    vm = members_of(wave.vms).by_vm.get(answer.vm)
    place = wave.event_place(vm.set, vm.host) if vm is not None else None
    if vm is None or place is None or wave.events[place].event_id.lower() != answer.event_id.lower():
        return
    if any(each.host == vm.host for each in wave.completed_operations):
        return  # it is not paused again, and not a resource of the event
    verdict = AgentReadiness(ready=answer.ready, reason=answer.reason)
    if wave.readiness.get(answer.vm) != verdict:
        decision.refused = not answer.ready
        decision.put(msgspec.structs.replace(wave, readiness=newest_last(wave.readiness, answer.vm, verdict)))


def report(decision: Decision, report: OperationReported) -> None:
    """A host reports on its operation."""
    wave = decision.rollout.current
    if wave is None or wave.status not in {"started", "failed"}:
        return
    place = _operation_of(wave, report.host)
    if place is None or wave.operations[place].operation != report.operation:
        return
    operation = _reported(wave.operations[place], report)
    if operation != wave.operations[place]:
        decision.put(msgspec.structs.replace(wave, operations=_replaced(wave.operations, place, operation)))


def clock(decision: Decision, verdict: VmClockSynced) -> None:
    """A host's verdict on a VM's clock."""
    wave = decision.rollout.current
    # In a failed wave too: on a retry, the hosts that completed their part are verified with the rest.
    if wave is None or wave.status not in {"pending", "scheduled", "started", "verifying", "failed"}:
        return
    vm = members_of(wave.vms).by_vm.get(verdict.vm)
    if vm is None or vm.host != verdict.host:
        return
    place = _operation_of(wave, verdict.host)
    operations = [*wave.completed_operations, *(() if place is None else (wave.operations[place],))]
    operation = next(
        (each for each in operations if (each.operation, each.host) == (verdict.operation, verdict.host)),
        None,
    )
    if operation is None:
        return
    clock = clock_verdict(verdict)
    if wave.clocks.get(verdict.vm) != clock:
        result = next((each for each in operation.vms if each.vm == vm.vm and each.frozen), None)
        wrong, _ = verify_vm(vm, result, clock, decision.rollout.policy)
        decision.wrong = bool(wrong)
        decision.put(msgspec.structs.replace(wave, clocks=newest_last(wave.clocks, verdict.vm, clock)))


def newest_last(known: dict[str, V], name: str, value: V) -> dict[str, V]:
    """These entries plus a new one at the end, so that new entries are found from the end."""
    changed = known.copy()  # one block copy of pointers: far cheaper than the rest of handling a message
    changed.pop(name, None)
    changed[name] = value
    return changed


def _replaced(items: tuple[V, ...], place: int, item: V) -> tuple[V, ...]:
    return (*items[:place], item, *items[place + 1 :])


def _event_of(wave: Wave, set_name: str, event_id: str) -> int | None:
    """The index of this set's event with this id; ids are compared case-insensitively."""
    wanted = event_id.lower()
    for place in range(bisect_left(wave.events, set_name, key=_SET_OF), len(wave.events)):
        if wave.events[place].set != set_name:
            break
        if wave.events[place].event_id.lower() == wanted:
            return place
    return None


def _operation_of(wave: Wave, host: str) -> int | None:
    """The index of this host's operation. In a first attempt they are in the order of the hosts."""
    place = members_of(wave.vms).host_position.get(host, 0)
    if place < len(wave.operations) and wave.operations[place].host == host:
        return place
    return next((number for number, each in enumerate(wave.operations) if each.host == host), None)


def _reported(operation: HostOperation, report: OperationReported) -> HostOperation:
    # Late or repeated; but a host that counted as lost and now reports is no longer lost.
    if operation.status in FINAL and (operation.status != "lost" or report.status not in FINAL):
        return operation
    return msgspec.structs.replace(
        operation,
        status=report.status,
        reason=report.reason,
        codes=report.codes,
        vms=report.vms,
        update=report.update,
    )
