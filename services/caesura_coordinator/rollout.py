"""The life of a rollout: ``decide(rollout, input, fleet, now) -> (rollout, effects)``. Pure.

A wave goes pending → scheduled → started → verifying → soaking → completed; from each of these it may end
failed or cancelled, which halts or aborts the rollout. What goes wrong halts with a reason; nothing is
retried without an operator (who resumes or aborts).

Commands to hosts are not effects: they follow from the state (``commands.py``) and are repeated until the
state shows the host's answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from operator import attrgetter
from typing import TypeVar

import msgspec

from caesura.contract.messages import OperationReported, VmClockSynced, VmReady, WaveStatus
from caesura.contract.reasons import Reason, codes_of
from caesura.lifecycle.errors import IllegalTransition
from caesura_coordinator.fleet import Fleet, fence_blockers, health_blockers, placement_blockers
from caesura_coordinator.inputs import (
    Abort,
    Approve,
    Authority,
    Effect,
    EventApprovedEffect,
    EventEnded,
    EventScheduled,
    EventStarted,
    Input,
    Outdated,
    RequestRefused,
    Resume,
    RolloutMoved,
    Tick,
    WaveMoved,
)
from caesura_coordinator.members import members_of
from caesura_coordinator.proofs import clock_verdict
from caesura_coordinator.reasons import listed, shortened
from caesura_coordinator.records import (
    FINAL,
    HostOperation,
    Readiness,
    Rollout,
    Wave,
    WaveEvent,
    event_id,
    operation_id,
)
from caesura_coordinator.verification import verify, verify_vm

V = TypeVar("V")
_SET_OF: Callable[[WaveEvent], str] = attrgetter("set")

COMMAND_WINDOW_S = 30.0
"""s: hosts refuse a wave's command later than this after its start; a command lost for so long is better not obeyed."""
REPORT_GRACE_S = 30.0
"""s: after the window and the budget, for a host that restarts and reconciles before it reports."""
RESTART_GRACE_S = 30.0
"""s: what deadlines are moved by when the coordinator was away, so that it hears the hosts before it judges."""


def decide(
    rollout: Rollout, received: Input, fleet: Fleet, authority: Authority, now: datetime
) -> tuple[Rollout, list[Effect]]:
    """One step. Repeated and late inputs change nothing.

    Raises:
        IllegalTransition: an operator's request that the rollout's status does not allow.
        RequestRefused: a resume while a host still owes its report.
    """
    step = _Step(rollout, fleet, authority, now)
    match received:
        case Abort():
            step.abort(received.reason)
        case Resume():
            step.resume()
        case Approve():
            step.approve(received)
        case VmReady():
            step.ready(received)
        case OperationReported():
            step.report(received)
        case VmClockSynced():
            step.clock(received)
        case Outdated():
            step.outdated(received)
        case Tick():
            pass
    step.advance()
    return step.rollout, step.effects


def after_restart(rollout: Rollout, now: datetime) -> Rollout:
    """The rollout as a restarted coordinator takes it up: deadlines that passed meanwhile are moved.

    NotBefore and the hosts' ``not_after`` stay as they were announced.
    """
    wave = rollout.current
    if wave is None or not rollout.active:
        return rollout
    earliest = now + timedelta(seconds=RESTART_GRACE_S)
    changed = msgspec.structs.replace(
        wave,
        waiting_since=now if wave.waiting_since else None,
        answers_by=max(wave.answers_by, earliest) if wave.answers_by else None,
        report_by=max(wave.report_by, earliest) if wave.report_by else None,
        verify_by=max(wave.verify_by, earliest) if wave.verify_by else None,
    )
    return _with_wave(rollout, changed)


def _with_wave(rollout: Rollout, wave: Wave) -> Rollout:
    before, after = rollout.waves[: wave.index], rollout.waves[wave.index + 1 :]
    return msgspec.structs.replace(rollout, waves=(*before, wave, *after))


class _Step:
    """One call of ``decide``: the rollout as it changes, and the effects so far.

    A wave gets several messages of each of its VMs, so no message looks at all of them. What a message says is judged when it
    comes; the whole wave is judged when everything is there, or its time is over. Waves complete one after the other only
    by that judgement.
    """

    def __init__(self, rollout: Rollout, fleet: Fleet, authority: Authority, now: datetime) -> None:
        self.rollout = rollout
        self.fleet = fleet
        self.authority = authority
        self.now = now
        self.effects: list[Effect] = []
        self._refused = False
        """Whether an agent has just said that its guest is not ready."""
        self._wrong = False
        """Whether something is known to be wrong that only this step has brought, or might be."""

    # -- small pieces --

    def _in(self, seconds: float) -> datetime:
        return self.now + timedelta(seconds=seconds)

    def _put(self, wave: Wave) -> Wave:
        self.rollout = _with_wave(self.rollout, wave)
        return wave

    def _move(self, wave: Wave, status: WaveStatus, **changes: object) -> Wave:
        moved = self._put(
            msgspec.structs.replace(
                wave, status=status, waiting_since=None, waiting_for="", waiting_codes=(), **changes
            )
        )
        self.effects.append(WaveMoved(wave=moved))
        return moved

    def _end_events(self, wave: Wave, status: str, reason: str = "", codes: tuple[str, ...] = ()) -> Wave:
        """Bring every open event of the wave to its one end."""
        events = []
        for event in wave.events:
            if event.status in {"scheduled", "started"}:
                event = msgspec.structs.replace(event, status=status)  # noqa: PLW2901
                self.effects.append(EventEnded(event=event, reason=reason, codes=codes))
            events.append(event)
        return self._put(msgspec.structs.replace(wave, events=tuple(events)))

    def _halt(self, wave: Wave, why: Sequence[Reason], before: str = "") -> None:
        """Wave failed, rollout halted. Events not started are cancelled, started ones failed."""
        self._halt_for(wave, before + listed(why), codes_of(why))

    def _halt_for(self, wave: Wave, reason: str, codes: tuple[str, ...]) -> None:
        reason = shortened(reason)
        started = wave.started_at is not None
        wave = self._end_events(wave, "failed" if started else "cancelled", reason, codes)
        self._move(wave, "failed", reason=reason, codes=codes, ended_at=self.now)
        self.rollout = msgspec.structs.replace(self.rollout, status="halted", reason=reason, codes=codes)
        self.effects.append(RolloutMoved(rollout=self.rollout))

    def _finish(self, status: str, reason: str = "", codes: tuple[str, ...] = ()) -> None:
        self.rollout = msgspec.structs.replace(
            self.rollout, status=status, reason=reason, codes=codes, ended_at=self.now
        )
        self.effects.append(RolloutMoved(rollout=self.rollout))

    def _blocked(self, wave: Wave, blockers: Sequence[Reason]) -> bool:
        """Wait for a gate; halt when it stays shut for the verify timeout."""
        if not blockers:
            if wave.waiting_since is not None:  # it opened: what shuts it next time has the whole time again
                self._put(msgspec.structs.replace(wave, waiting_since=None, waiting_for="", waiting_codes=()))
            return False
        why = listed(blockers)
        since = wave.waiting_since or self.now
        if self.now - since >= timedelta(seconds=self.rollout.policy.verify_timeout_s):
            self._halt(wave, blockers, "cannot go on: ")
        elif (wave.waiting_since, wave.waiting_for) != (since, why):
            codes = codes_of(blockers)
            self._put(
                msgspec.structs.replace(wave, waiting_since=since, waiting_for=why, waiting_codes=codes)
            )
        return True

    # -- inputs --

    def abort(self, reason: str) -> None:
        if self.rollout.status == "aborting":
            return
        if not self.rollout.active:
            raise IllegalTransition(f"rollout {self.rollout.id}", self.rollout.status, "aborted")
        text = f"aborted: {reason}" if reason else "aborted by the operator"
        if self.rollout.status == "halted" and self.rollout.reason:
            # Why it failed is what somebody looks for afterwards, not only that it was given up.
            text = f"{text}; it had halted: {self.rollout.reason}"
        text = shortened(text)
        codes = tuple(dict.fromkeys(("aborted", *self.rollout.codes)))
        wave = self.rollout.current
        if wave is not None and wave.status == "started" and self.rollout.status == "running":
            self.rollout = msgspec.structs.replace(self.rollout, status="aborting", reason=text, codes=codes)
            self.effects.append(RolloutMoved(rollout=self.rollout))
            return
        if wave is not None and wave.status in {"pending", "scheduled", "verifying", "soaking"}:
            self._cancel(wave, text, codes)
        self._finish("aborted", text, codes)

    def _cancel(self, wave: Wave, text: str, codes: tuple[str, ...]) -> None:
        if (
            wave.status == "soaking"
        ):  # its events are over and its VMs verified: it is done, only the waiting is cut
            self._move(wave, "completed", ended_at=self.now)
            return
        status: WaveStatus = "failed" if wave.started_at else "cancelled"
        wave = self._end_events(wave, status, text, codes)
        self._move(wave, status, reason=text, codes=codes, ended_at=self.now)

    def resume(self) -> None:
        if self.rollout.status != "halted":
            raise IllegalTransition(f"rollout {self.rollout.id}", self.rollout.status, "running")
        wave = self.rollout.current
        lost = sorted(each.host for each in wave.operations if each.status == "lost") if wave else []
        if lost:
            raise RequestRefused(
                "report_outstanding",
                f"rollout {self.rollout.id} cannot go on yet: {', '.join(lost)} never said what became of its operation; "
                "bring the host updater back (it reports at start), or abort the rollout",
            )
        self.rollout = msgspec.structs.replace(self.rollout, status="running", reason="", codes=())
        self.effects.append(RolloutMoved(rollout=self.rollout))
        if wave is None or wave.status != "failed":
            return
        done = wave.done + tuple(each for each in wave.operations if each.status == "completed")
        hosts = {each.host for each in done}
        # Hosts that did their part are not paused again.
        again = Wave(
            index=wave.index,
            domains=wave.domains,
            vms=wave.vms,
            attempt=wave.attempt + 1,
            done=done,
            clocks={
                vm.vm: wave.clocks[vm.vm] for vm in wave.vms if vm.host in hosts and vm.vm in wave.clocks
            },
        )
        if any(vm.host not in hosts for vm in wave.vms):
            self._move(again, "pending")
            return
        # The operator has seen what the verification found so far, and accepts it: what it did not come to (a lost
        # host that did its part after all, a verdict that was still due) is looked at now.
        again = msgspec.structs.replace(
            again,
            started_at=wave.started_at,
            accepted=wave.accepted,
            soak_until=self.now if wave.soak_until is not None else None,
        )
        self._wrong = True
        self._move(again, "verifying", verify_by=self._in(self.rollout.policy.verify_timeout_s))

    def outdated(self, found: Outdated) -> None:
        wave = self.rollout.current
        if wave is None or self.rollout.status == "halted" or found.set not in self.rollout.sets:
            return
        # Events of ours that are not in the document any more had their end, announced by whoever ended them.
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
            "was at work, or the store is an old copy. Look at the fleet, then resume or abort"
        )
        wave = self._put(msgspec.structs.replace(wave, events=events, outdated=why))
        if wave.status != "started":  # what hosts were commanded comes to its end first
            self._halt(wave, [Reason("superseded", why)])

    def approve(self, approval: Approve) -> None:
        wave = self.rollout.current
        if wave is None or wave.status != "scheduled":
            return
        located = self.fleet.vm(approval.by)
        place = _event_of(wave, located.record.set) if located is not None else None
        if place is None:
            return
        event = wave.events[place]
        if event.event_id.lower() == approval.event_id.lower() and not event.approved_by:
            event = msgspec.structs.replace(event, approved_by=approval.by, approved_at=self.now)
            self.effects.append(EventApprovedEffect(event=event))
            self._put(msgspec.structs.replace(wave, events=_replaced(wave.events, place, event)))

    def ready(self, answer: VmReady) -> None:
        wave = self.rollout.current
        if wave is None or wave.status != "scheduled":
            return
        vm = members_of(wave.vms).by_vm.get(answer.vm)
        place = _event_of(wave, vm.set) if vm is not None else None
        if vm is None or place is None or wave.events[place].event_id.lower() != answer.event_id.lower():
            return
        if any(each.host == vm.host for each in wave.done):
            return  # it is not paused again, and no resource of the event
        verdict = Readiness(ready=answer.ready, reason=answer.reason)
        if wave.readiness.get(answer.vm) != verdict:
            self._refused = not answer.ready
            self._put(
                msgspec.structs.replace(wave, readiness=newest_last(wave.readiness, answer.vm, verdict))
            )

    def report(self, report: OperationReported) -> None:
        wave = self.rollout.current
        if wave is None or wave.status not in {"started", "failed"}:
            return
        place = _operation_of(wave, report.host)
        if place is None or wave.operations[place].operation != report.operation:
            return
        operation = _reported(wave.operations[place], report)
        if operation != wave.operations[place]:
            self._put(msgspec.structs.replace(wave, operations=_replaced(wave.operations, place, operation)))

    def clock(self, verdict: VmClockSynced) -> None:
        wave = self.rollout.current
        # In a failed wave too: when it is tried again, the hosts that did their part are verified with the rest.
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
            wrong, _ = verify_vm(vm, result, clock, self.rollout.policy)
            self._wrong = bool(wrong)
            self._put(msgspec.structs.replace(wave, clocks=newest_last(wave.clocks, verdict.vm, clock)))

    # -- time --

    def advance(self) -> None:
        """Go as far as the state, the fleet and the time allow."""
        while self.rollout.status in {"running", "aborting"}:
            wave = self.rollout.current
            if wave is None:
                self._finish("completed")
                return
            status = self.rollout.status
            self._from(wave)
            now = self.rollout.waves[wave.index]
            if (self.rollout.status, now.status, now.attempt) == (status, wave.status, wave.attempt):
                return

    def _from(self, wave: Wave) -> None:
        match wave.status:
            case "pending":
                self._from_pending(wave)
            case "scheduled":
                self._from_scheduled(wave)
            case "started":
                self._from_started(wave)
            case "verifying":
                self._from_verifying(wave)
            case "soaking":
                self._from_soaking(wave)
            case "completed" | "failed" | "cancelled":
                raise AssertionError(f"wave {wave.index} is {wave.status} in a rollout that is not halted")

    def _from_pending(self, wave: Wave) -> None:
        blockers = health_blockers(self.fleet, wave.vms) or self._placement(wave) or self._fence(wave)
        if self._blocked(wave, blockers):
            return
        if all(vm.method == "live" for vm in wave.vms):
            self._start(wave)  # nothing pauses: nobody is warned
            return
        resources: dict[str, list[str]] = {}
        for vm in wave.ahead:
            resources.setdefault(vm.set, []).append(vm.vm)
        events = tuple(
            WaveEvent(
                set=name,
                event_id=event_id(self.rollout, wave, name, self.authority.epoch),
                resources=tuple(vms),
            )
            for name, vms in sorted(resources.items())
        )
        # Whole seconds, rounded up: NotBefore is published in RFC 1123, and a wave must not start before it.
        not_before = self._in(self.rollout.policy.notice_s)
        if not_before.microsecond:
            not_before = not_before.replace(microsecond=0) + timedelta(seconds=1)
        wave = self._move(
            wave,
            "scheduled",
            published_at=self.now,
            not_before=not_before,
            answers_by=not_before,
            events=events,
        )
        self.effects.extend(EventScheduled(event=event) for event in events)

    def _placement(self, wave: Wave) -> list[Reason]:
        return placement_blockers(self.fleet, wave.vms, {each.host for each in wave.done})

    def _fence(self, wave: Wave) -> list[Reason]:
        """Why the wave may not be started, or not be continued if a previous run of this coordinator started it."""
        return fence_blockers(
            self.fleet,
            wave.domains,
            self.rollout.set_hosts,
            members_of(wave.vms).by_host,
            epoch=self.authority.epoch,
            coordinator=self.authority.coordinator,
            own={each.operation for each in wave.operations},
        )

    def _from_scheduled(self, wave: Wave) -> None:
        policy = self.rollout.policy
        due = wave.not_before is not None and self.now >= wave.not_before
        # So few answers cannot be all: then nobody is asked who is missing.
        expected = sum(vm.agent for vm in wave.ahead) if wave.done else members_of(wave.vms).agents
        answered = len(wave.readiness) >= expected and all(event.approved_by for event in wave.events)
        if not due and not answered and not self._refused:
            return
        refusing = [
            Reason("agent_not_ready", f"{vm} is not ready: {answer.reason or 'its prepare hook said no'}")
            for vm, answer in sorted(wave.readiness.items())
            if not answer.ready
        ]
        silent = [vm.vm for vm in wave.ahead if vm.agent and vm.vm not in wave.readiness]
        if refusing and policy.on_not_ready == "halt":
            self._halt(wave, refusing)
            return
        if not due and (not answered or silent):
            return
        if silent and policy.on_not_ready == "halt":
            if any(until and self.now < until for until in (wave.answers_by, self.fleet.grace_until)):
                return  # they may have answered while nobody was there to hear it; they say it again
            text = f"no answer of the agent by NotBefore: {listed(silent, ', ')}"
            self._halt(wave, [Reason("agent_silent", text)])
            return
        if not self._blocked(wave, self._placement(wave) or self._fence(wave)):
            self._start(wave)

    def _start(self, wave: Wave) -> None:
        operations = tuple(
            HostOperation(host=host, operation=operation_id(self.rollout, wave, host, self.authority.epoch))
            for host in dict.fromkeys(vm.host for vm in wave.ahead)
        )
        events = tuple(msgspec.structs.replace(event, status="started") for event in wave.events)
        self._move(
            wave,
            "started",
            events=events,
            operations=operations,
            fence_epoch=self.authority.epoch,
            started_at=self.now,
            not_after=self._in(COMMAND_WINDOW_S),
            report_by=self._in(
                COMMAND_WINDOW_S
                + self.rollout.outside_pause_s
                + self.rollout.policy.budget_s
                + REPORT_GRACE_S
            ),
        )
        self.effects.extend(EventStarted(event=event) for event in events)

    def _from_started(self, wave: Wave) -> None:
        if wave.report_by is not None and self.now >= wave.report_by:
            lost = tuple(
                msgspec.structs.replace(
                    each, status="lost", reason="did not report in time", codes=("report_lost",)
                )
                if each.status not in FINAL
                else each
                for each in wave.operations
            )
            wave = self._put(msgspec.structs.replace(wave, operations=lost))
        if any(each.status not in FINAL for each in wave.operations):
            self._fence_again(wave)
            return
        wrong = [each for each in wave.operations if each.status != "completed"]
        if self.rollout.status == "aborting":
            self._aborted(wave)
        elif wrong or wave.outdated:
            texts = [_why(each) for each in wrong] + ([wave.outdated] if wave.outdated else [])
            codes = [code for each in wrong for code in each.codes or ("unexplained",)]
            codes += ["superseded"] if wave.outdated else []
            self._halt_for(wave, listed(texts), tuple(dict.fromkeys(codes)))
        else:
            self._wrong = True
            self._move(wave, "verifying", verify_by=self._in(self.rollout.policy.verify_timeout_s))

    def _fence_again(self, wave: Wave) -> None:
        """Command under a new epoch only when no command of another coordinator can be at work in the sets (I1).

        While this one was away, another may have led: what it began must be over. Hosts that do not hear from
        us in time are lost to the wave, which halts it.
        """
        if wave.fence_epoch == self.authority.epoch:
            return
        blockers = self._fence(wave)
        why, codes = listed(blockers), codes_of(blockers)
        epoch = wave.fence_epoch if why else self.authority.epoch
        if (wave.waiting_for, wave.fence_epoch) != (why, epoch):
            self._put(msgspec.structs.replace(wave, waiting_for=why, waiting_codes=codes, fence_epoch=epoch))

    def _aborted(self, wave: Wave) -> None:
        """All hosts have answered the abort: the record says whether anything had been paused."""
        untouched = all(each.status in {"cancelled", "refused"} for each in wave.operations)
        status: WaveStatus = "cancelled" if untouched else "failed"
        reason, codes = self.rollout.reason, self.rollout.codes
        wave = self._end_events(wave, status, reason, codes)
        self._move(wave, status, reason=reason, codes=codes, ended_at=self.now)
        self._finish("aborted", reason, codes)

    def _from_verifying(self, wave: Wave) -> None:
        over = wave.verify_by is not None and self.now >= wave.verify_by
        ill = health_blockers(self.fleet, wave.vms)
        # What was wrong would have halted the wave when it became known; so few verdicts cannot be all.
        if not self._wrong and not over and (ill or len(wave.clocks) < members_of(wave.vms).verdicts):
            return
        wrong, missing = (
            [each for each in found if each.text not in wave.accepted]
            for found in verify(wave, self.rollout.policy)
        )
        if wrong:
            self._halt(self._accepting(wave, wrong), wrong)
            return
        late = missing + ill
        if late:
            if over:
                self._halt(self._accepting(wave, missing), late, "not verified in time: ")
            return
        wave = self._end_events(wave, "completed")
        self._move(wave, "soaking", soak_until=wave.soak_until or self._in(self.rollout.policy.soak_s))

    def _accepting(self, wave: Wave, found: Sequence[Reason]) -> Wave:
        """The wave with what an operator accepts by a resume."""
        accepted = (*wave.accepted, *(each.text for each in found))
        return self._put(msgspec.structs.replace(wave, accepted=accepted))

    def _from_soaking(self, wave: Wave) -> None:
        ill = health_blockers(self.fleet, wave.vms)
        if self._blocked(wave, ill):
            return
        if wave.soak_until is None or self.now >= wave.soak_until:
            self._move(wave, "completed", ended_at=self.now)


def newest_last(known: dict[str, V], name: str, value: V) -> dict[str, V]:
    """These entries with another one, which is the last of them: so what is new is found from the end."""
    changed = known.copy()  # of pointers, in one piece: far less than anything else that a message costs
    changed.pop(name, None)
    changed[name] = value
    return changed


def _replaced(items: tuple[V, ...], place: int, item: V) -> tuple[V, ...]:
    return (*items[:place], item, *items[place + 1 :])


def _event_of(wave: Wave, set_name: str) -> int | None:
    """Where the event of this set is; events are in the order of their sets' names."""
    place = bisect_left(wave.events, set_name, key=_SET_OF)
    return place if place < len(wave.events) and wave.events[place].set == set_name else None


def _operation_of(wave: Wave, host: str) -> int | None:
    """Where the operation of this host is. In a first attempt they are in the order of the hosts."""
    place = members_of(wave.vms).host_position.get(host, 0)
    if place < len(wave.operations) and wave.operations[place].host == host:
        return place
    return next((number for number, each in enumerate(wave.operations) if each.host == host), None)


def _reported(operation: HostOperation, report: OperationReported) -> HostOperation:
    # Late or repeated; but a host that was given up for lost and now reports is lost no more.
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


def _why(operation: HostOperation) -> str:
    return f"{operation.host} {operation.status}" + (f": {operation.reason}" if operation.reason else "")
