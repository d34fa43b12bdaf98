"""The facts that announce a decision, derived from its effects. Pure."""

from __future__ import annotations

from datetime import datetime

import msgspec

from caesura.contract.messages import (
    EventChanged,
    EventStatus,
    RolloutState,
    ScheduledEvent,
    SetDocument,
    WaveChanged,
)
from caesura.contract.reasons import ReasonCode
from caesura_coordinator.members import members_of
from caesura_coordinator.records import Rollout, Wave, WaveEvent

NO_RECORD = "the coordinator that scheduled it has lost its record"
_NO_RECORD_CODES: tuple[ReasonCode, ...] = ("record_missing",)

DESCRIPTIONS = {
    "Freeze": "Host server is undergoing maintenance.",  # the wording of Azure for an in-place host update
    "Reboot": "Host server is undergoing maintenance that needs a reboot.",
}
"""Maps the type of an event to the description that workloads see."""
KERNEL_DESCRIPTION = "Host server is undergoing maintenance that replaces its kernel while memory is kept; a restart is a small possibility."
"""Of a Freeze by method kexec: between the two kernels nothing keeps the promise of every other freeze."""


def event_changed(
    rollout: Rollout,
    event: WaveEvent,
    status: EventStatus,
    *,
    incarnation: int,
    now: datetime,
    reason: str = "",
    codes: tuple[str, ...] = (),
) -> EventChanged:
    """An event reached a status.

    Args:
        incarnation: of the document that shows it.
    """
    wave = wave_of(rollout, event)
    published = wave.published_at or now
    not_before = wave.not_before or now
    return EventChanged(
        event_id=event.event_id,
        set=event.set,
        event_type=rollout.event_type,
        status=status,
        resources=event.resources,
        host=event.host,
        incarnation=incarnation,
        rollout=rollout.id,
        wave=wave.index,
        not_before=not_before,
        approved_by=event.approved_by,
        reason=reason,
        codes=codes,
        notice_s=max(0.0, (not_before - published).total_seconds()),
        approval_delay_s=max(0.0, (event.approved_at - published).total_seconds())
        if event.approved_at
        else None,
        at=now,
    )


def wave_changed(rollout: Rollout, wave: Wave, now: datetime) -> WaveChanged:
    """A wave reached a status."""
    return WaveChanged(
        rollout=rollout.id,
        wave=wave.index,
        status=wave.status,
        domains=wave.domains,
        hosts=wave.hosts,
        reason=wave.reason,
        codes=wave.codes,
        at=now,
    )


def scheduled_event(rollout: Rollout, event: WaveEvent) -> ScheduledEvent:
    """The event as its set's document shows it at first."""
    wave = wave_of(rollout, event)
    if wave.not_before is None:
        raise AssertionError(f"wave {wave.index} of rollout {rollout.id} was scheduled without NotBefore")
    return ScheduledEvent(
        event_id=event.event_id,
        event_type=rollout.event_type,
        status="scheduled",
        resources=event.resources,
        host=event.host,
        not_before=wave.not_before,
        description=_description(rollout, wave, event),
        source=rollout.policy.event_source,
        duration_s=round(rollout.expected_pause_s) if rollout.event_type == "Freeze" else -1,
        rollout=rollout.id,
        wave=wave.index,
    )


def _description(rollout: Rollout, wave: Wave, event: WaveEvent) -> str:
    # By name: a wave of many hosts has an event for each of them, and each would look at all VMs.
    vms = members_of(wave.vms).by_vm
    if any(vms[name].method == "kexec" for name in event.resources if name in vms):
        return KERNEL_DESCRIPTION
    return DESCRIPTIONS[rollout.event_type]


def wave_of(rollout: Rollout, event: WaveEvent) -> Wave:
    """The wave of an event that has just changed: the current one, or one that has just ended."""
    current = rollout.current
    place = current.index if current is not None else len(rollout.waves) - 1
    for wave in (*rollout.waves[place::-1], *rollout.waves[place + 1 :]):
        at = wave.event_place(event.set, event.host)
        if at is not None and wave.events[at].event_id == event.event_id:
            return wave
    raise AssertionError(f"event {event.event_id} is in no wave of rollout {rollout.id}")


def orphan_event_ended(event: ScheduledEvent, document: SetDocument, now: datetime) -> EventChanged:
    """The end of an event of which there is no record here.

    Args:
        document: of its set, without the event.
    """
    return EventChanged(
        event_id=event.event_id,
        set=document.set,
        event_type=event.event_type,
        status="failed" if event.status == "started" else "cancelled",
        resources=event.resources,
        host=event.host,
        incarnation=document.incarnation,
        rollout=event.rollout,
        wave=event.wave,
        not_before=event.not_before,
        reason=NO_RECORD,
        codes=_NO_RECORD_CODES,
        at=now,
    )


def orphan_wave_ended(published: RolloutState, now: datetime) -> WaveChanged | None:
    """The end of the current wave of a rollout of which there is no record here; None if no wave is under way."""
    wave, status = published.current_wave, published.current_status
    if wave is None or status not in {"scheduled", "started", "verifying", "soaking"}:
        return None
    return WaveChanged(
        rollout=published.rollout,
        wave=wave,
        status="cancelled" if status == "scheduled" else "failed",
        domains={},
        reason=NO_RECORD,
        codes=_NO_RECORD_CODES,
        at=now,
    )


def orphan_aborted(published: RolloutState, now: datetime) -> RolloutState:
    """The last state of a rollout of which there is no record here."""
    return msgspec.structs.replace(
        published, status="aborted", reason=NO_RECORD, codes=_NO_RECORD_CODES, wave_etags=(), ended_at=now
    )
