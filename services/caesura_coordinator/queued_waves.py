"""A rollout that waits for others which hold its sets: announced at once, it starts when they have ended. Pure.

Which rollouts wait for which is in ``rollout_queue``.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec

from caesura.contract.reasons import ReasonCode
from caesura_coordinator.decision import Decision
from caesura_coordinator.effects import EventPostponed
from caesura_coordinator.not_before import expected_end, lead, whole_second
from caesura_coordinator.records import Rollout, Wave

MOST_QUEUED = 8
"""The most rollouts that wait for one: else those of a script that orders one a day would all run in a row after a halt."""
_CODES: tuple[ReasonCode, ...] = ("queued",)


def waits_behind(rollout: str) -> str:
    """The sentence for people."""
    return f"queued behind rollout {rollout}"


def keep_waiting(decision: Decision, wave: Wave) -> None:
    """Rollouts ahead have not ended: NotBefore moves later when it comes near."""
    behind = decision.ahead[-1].id
    if decision.rollout.queued_behind != behind:
        decision.rollout = msgspec.structs.replace(decision.rollout, queued_behind=behind)
    why = waits_behind(behind)
    if (wave.waiting_for, wave.waiting_since) != (why, None):
        wave = decision.put(
            msgspec.structs.replace(wave, waiting_since=None, waiting_for=why, waiting_codes=_CODES)
        )
    if wave.status == "pending":
        return
    elsewhere = _in_other_events(decision.ahead)
    if any(vm in elsewhere for vm in wave.readiness):
        # The end of the other event undoes what the agent has prepared: it prepares again then, and answers again.
        still = {vm: answer for vm, answer in wave.readiness.items() if vm not in elsewhere}
        wave = decision.put(msgspec.structs.replace(wave, readiness=still))
    policy = decision.rollout.policy
    if wave.not_before is not None and decision.now + lead(policy) > wave.not_before:
        # At least one lead before it comes near again: workloads see few changes.
        ends = [expected_end(each, decision.now) for each in decision.ahead]
        later = max(decision.after(policy.notice_s), *ends) + lead(policy)
        postpone(decision, wave, later)


def leave_queue(decision: Decision, wave: Wave) -> Wave:
    """Those ahead have ended and every gate is open: from now on the wave is like any other that is scheduled."""
    decision.refused = any(not answer.ready for answer in wave.readiness.values())
    wave = decision.put(
        msgspec.structs.replace(wave, queued=False, waiting_since=None, waiting_for="", waiting_codes=())
    )
    soonest = decision.now + lead(decision.rollout.policy)
    return postpone(decision, wave, soonest) if wave.not_before is None or wave.not_before < soonest else wave


def postpone(decision: Decision, wave: Wave, not_before: datetime) -> Wave:
    """Move NotBefore later; it never moves earlier."""
    later = whole_second(not_before)
    if wave.not_before is not None and later <= wave.not_before:
        return wave
    wave = decision.put(msgspec.structs.replace(wave, not_before=later, answers_by=later))
    decision.effects.extend(
        EventPostponed(event=each, not_before=later) for each in wave.events if each.status == "scheduled"
    )
    return wave


def _in_other_events(ahead: Sequence[Rollout]) -> set[str]:
    """The VMs in open events of the rollouts ahead."""
    return {
        vm
        for rollout in ahead
        if rollout.current is not None
        for event in rollout.current.events
        if event.status in {"scheduled", "started"}
        for vm in event.resources
    }
