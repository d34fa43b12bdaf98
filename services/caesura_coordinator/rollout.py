"""The life cycle of a rollout: ``decide(rollout, input, fleet, now) -> (rollout, effects)``. Pure.

A wave goes pending → scheduled → started → verifying → soaking → completed; from each of these it may end
failed or cancelled, which halts or aborts the rollout. A failure halts it with a reason; nothing is
retried without an operator (who resumes or aborts).

Commands to hosts are not effects: they are derived from the state (``commands.py``) and repeated until the
state contains the host's answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from caesura.contract.messages import OperationReported, VmClockSynced, VmReady
from caesura_coordinator import input_handlers
from caesura_coordinator.authority import Authority
from caesura_coordinator.decision import Decision, with_wave
from caesura_coordinator.effects import Effect
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Abort, Approve, DocumentSuperseded, Input, Resume, Tick
from caesura_coordinator.records import (
    Rollout,
)
from caesura_coordinator.wave_transitions import advance

RESTART_GRACE_S = 30.0
"""s: by how much deadlines are extended when the coordinator was down, so that it receives the hosts' messages before it judges."""


def decide(
    rollout: Rollout,
    received: Input,
    fleet: FleetLookup,
    authority: Authority,
    now: datetime,
    ahead: Sequence[Rollout] = (),
) -> tuple[Rollout, list[Effect]]:
    """One step. Repeated and late inputs change nothing.

    Args:
        ahead: the older rollouts that have not ended and share a set with this one, oldest first.

    Raises:
        IllegalStatusChange: an operator's request that the rollout's status does not allow.
        RequestRefused: a resume while a host's report is outstanding.
    """
    decision = Decision(rollout, fleet, authority, now, ahead)
    match received:
        case Abort():
            input_handlers.abort(decision, received.reason)
        case Resume():
            input_handlers.resume(decision)
        case Approve():
            input_handlers.approve(decision, received)
        case VmReady():
            input_handlers.ready(decision, received)
        case OperationReported():
            input_handlers.report(decision, received)
        case VmClockSynced():
            input_handlers.clock(decision, received)
        case DocumentSuperseded():
            input_handlers.document_superseded(decision, received)
        case Tick():
            decision.time_passed = True
    advance(decision)
    return decision.rollout, decision.effects


def after_restart(rollout: Rollout, now: datetime) -> Rollout:
    """The rollout as a restarted coordinator continues it: deadlines that passed in the meantime are extended.

    NotBefore and the hosts' ``not_after`` remain as announced.
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
    return with_wave(rollout, changed)
