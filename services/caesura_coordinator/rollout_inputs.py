"""The effect of each input on a rollout: requests of operators, approvals, answers, reports. Pure.

A repeated or late input changes nothing. What follows from it, and from time, is in ``rollout_course``.
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
from caesura_coordinator.inputs import (
    Approve,
    EventApprovedEffect,
    Outdated,
    RequestRefused,
    RolloutMoved,
)
from caesura_coordinator.members import members_of
from caesura_coordinator.proofs import clock_verdict
from caesura_coordinator.records import (
    FINAL,
    HostOperation,
    Readiness,
    Wave,
    WaveEvent,
)
from caesura_coordinator.step import Step
from caesura_coordinator.text import truncate
from caesura_coordinator.verification import verify_vm

V = TypeVar("V")
_SET_OF: Callable[[WaveEvent], str] = attrgetter("set")


def abort(step: Step, reason: str) -> None:
    """The operator aborts: operations already commanded finish first."""
    if step.rollout.status == "aborting":
        return
    if not step.rollout.active:
        raise IllegalStatusChange(f"rollout {step.rollout.id}", step.rollout.status, "aborted")
    text = f"aborted: {reason}" if reason else "aborted by the operator"
    if step.rollout.status == "halted" and step.rollout.reason:
        # Readers look for the failure afterwards, not only for the abort.
        text = f"{text}; it had halted: {step.rollout.reason}"
    text = truncate(text)
    codes = tuple(dict.fromkeys(("aborted", *step.rollout.codes)))
    wave = step.rollout.current
    if wave is not None and wave.status == "started" and step.rollout.status == "running":
        step.rollout = msgspec.structs.replace(step.rollout, status="aborting", reason=text, codes=codes)
        step.effects.append(RolloutMoved(rollout=step.rollout))
        return
    if wave is not None and wave.status in {"pending", "scheduled", "verifying", "soaking"}:
        _cancel(step, wave, text, codes)
    step.finish("aborted", text, codes)


def _cancel(step: Step, wave: Wave, text: str, codes: tuple[str, ...]) -> None:
    if (
        wave.status == "soaking"
    ):  # its events have ended and its VMs are verified: it is done, only the soak is cut short
        step.move(wave, "completed", ended_at=step.now)
        return
    status: WaveStatus = "failed" if wave.started_at else "cancelled"
    wave = step.end_events(wave, status, text, codes)
    step.move(wave, status, reason=text, codes=codes, ended_at=step.now)


def resume(step: Step) -> None:
    """The operator continues after a halt. Raises as ``decide``."""
    if step.rollout.status != "halted":
        raise IllegalStatusChange(f"rollout {step.rollout.id}", step.rollout.status, "running")
    wave = step.rollout.current
    lost = sorted(each.host for each in wave.operations if each.status == "lost") if wave else []
    if lost:
        raise RequestRefused(
            "report_outstanding",
            f"rollout {step.rollout.id} cannot be resumed yet: {', '.join(lost)} never reported how its operation ended; "
            "bring the host updater back (it reports at start), or abort the rollout",
        )
    step.rollout = msgspec.structs.replace(step.rollout, status="running", reason="", codes=())
    step.effects.append(RolloutMoved(rollout=step.rollout))
    if wave is None or wave.status != "failed":
        return
    done = wave.done + tuple(each for each in wave.operations if each.status == "completed")
    hosts = {each.host for each in done}
    # Hosts that completed their part are not paused again.
    again = Wave(
        index=wave.index,
        domains=wave.domains,
        vms=wave.vms,
        attempt=wave.attempt + 1,
        done=done,
        clocks={vm.vm: wave.clocks[vm.vm] for vm in wave.vms if vm.host in hosts and vm.vm in wave.clocks},
    )
    if any(vm.host not in hosts for vm in wave.vms):
        step.move(again, "pending")
        return
    # The operator has seen the findings of the verification so far and accepts them: what it has not checked (a lost
    # host that completed its part after all, an outstanding verdict) is checked now.
    again = msgspec.structs.replace(
        again,
        started_at=wave.started_at,
        accepted=wave.accepted,
        soak_until=step.now if wave.soak_until is not None else None,
    )
    step.wrong = True
    step.move(again, "verifying", verify_by=step.after(step.rollout.policy.verify_timeout_s))


def outdated(step: Step, found: Outdated) -> None:
    """Another coordinator has published events of the set in the meantime."""
    wave = step.rollout.current
    if wave is None or step.rollout.status == "halted" or found.set not in step.rollout.sets:
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
    wave = step.put(msgspec.structs.replace(wave, events=events, outdated=why))
    if wave.status != "started":  # operations already commanded finish first
        step.halt(wave, [Reason("superseded", why)])


def approve(step: Step, approval: Approve) -> None:
    """A workload approves."""
    wave = step.rollout.current
    if wave is None or wave.status != "scheduled":
        return
    located = step.fleet.vm(approval.by)
    place = _event_of(wave, located.record.set) if located is not None else None
    if place is None:
        return
    event = wave.events[place]
    if event.event_id.lower() == approval.event_id.lower() and not event.approved_by:
        event = msgspec.structs.replace(event, approved_by=approval.by, approved_at=step.now)
        step.effects.append(EventApprovedEffect(event=event))
        step.put(msgspec.structs.replace(wave, events=_replaced(wave.events, place, event)))


def ready(step: Step, answer: VmReady) -> None:
    """An agent reports whether its guest is ready."""
    wave = step.rollout.current
    if wave is None or wave.status != "scheduled":
        return
    vm = members_of(wave.vms).by_vm.get(answer.vm)
    place = _event_of(wave, vm.set) if vm is not None else None
    if vm is None or place is None or wave.events[place].event_id.lower() != answer.event_id.lower():
        return
    if any(each.host == vm.host for each in wave.done):
        return  # it is not paused again, and not a resource of the event
    verdict = Readiness(ready=answer.ready, reason=answer.reason)
    if wave.readiness.get(answer.vm) != verdict:
        step.refused = not answer.ready
        step.put(msgspec.structs.replace(wave, readiness=newest_last(wave.readiness, answer.vm, verdict)))


def report(step: Step, report: OperationReported) -> None:
    """A host reports on its operation."""
    wave = step.rollout.current
    if wave is None or wave.status not in {"started", "failed"}:
        return
    place = _operation_of(wave, report.host)
    if place is None or wave.operations[place].operation != report.operation:
        return
    operation = _reported(wave.operations[place], report)
    if operation != wave.operations[place]:
        step.put(msgspec.structs.replace(wave, operations=_replaced(wave.operations, place, operation)))


def clock(step: Step, verdict: VmClockSynced) -> None:
    """A host's verdict on a VM's clock."""
    wave = step.rollout.current
    # In a failed wave too: on a retry, the hosts that completed their part are verified with the rest.
    if wave is None or wave.status not in {"pending", "scheduled", "started", "verifying", "failed"}:
        return
    vm = members_of(wave.vms).by_vm.get(verdict.vm)
    if vm is None or vm.host != verdict.host:
        return
    place = _operation_of(wave, verdict.host)
    operations = [*wave.done, *(() if place is None else (wave.operations[place],))]
    operation = next(
        (each for each in operations if (each.operation, each.host) == (verdict.operation, verdict.host)),
        None,
    )
    if operation is None:
        return
    clock = clock_verdict(verdict)
    if wave.clocks.get(verdict.vm) != clock:
        result = next((each for each in operation.vms if each.vm == vm.vm and each.frozen), None)
        wrong, _ = verify_vm(vm, result, clock, step.rollout.policy)
        step.wrong = bool(wrong)
        step.put(msgspec.structs.replace(wave, clocks=newest_last(wave.clocks, verdict.vm, clock)))


def newest_last(known: dict[str, V], name: str, value: V) -> dict[str, V]:
    """These entries plus a new one at the end, so that new entries are found from the end."""
    changed = known.copy()  # one block copy of pointers: far cheaper than the rest of handling a message
    changed.pop(name, None)
    changed[name] = value
    return changed


def _replaced(items: tuple[V, ...], place: int, item: V) -> tuple[V, ...]:
    return (*items[:place], item, *items[place + 1 :])


def _event_of(wave: Wave, set_name: str) -> int | None:
    """The index of this set's event; events are in the order of their sets' names."""
    place = bisect_left(wave.events, set_name, key=_SET_OF)
    return place if place < len(wave.events) and wave.events[place].set == set_name else None


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
