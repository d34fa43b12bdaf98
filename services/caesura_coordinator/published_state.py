"""A rollout and its waves as they are published, and which changes of them a reader sees. Pure."""

from __future__ import annotations

from datetime import datetime

import msgspec

from caesura.contract.codec import size_bytes
from caesura.contract.envelope import Message
from caesura.contract.fitting import fits
from caesura.contract.messages import (
    INTEGER_MOST,
    MAX_BUDGET_S,
    EventChanged,
    FailedUpdate,
    RolloutState,
    ScheduledEvent,
    SetDocument,
    WaveState,
)
from caesura.contract.parts import etag_of
from caesura.contract.reasons import KNOWN
from caesura_coordinator.announcements import DESCRIPTIONS
from caesura_coordinator.records import Rollout, Wave

_FAILED_NAMED = 16
"""How many hosts of a wave are published with their failed update."""
_OUTPUTS_SHOWN = 3
"""How many of those hosts are published with the output."""
_OUTPUT_CHARACTERS = 2048
_NO_ETAG = "0" * 12
_ANY_ID = "6F1D4E52-6F0B-5E0A-9A51-0C1F3A7F3F0E"
"""As long as the id of an event."""


def rollout_state(rollout: Rollout, *, with_waves: bool = True) -> RolloutState:
    """The rollout as it is published alongside its waves.

    Args:
        with_waves: whether its waves are retained as well.
    """
    current = rollout.current
    return RolloutState(
        rollout=rollout.id,
        update=rollout.update,
        hold_s=rollout.hold_s,
        status=rollout.status,
        queued_behind=rollout.queued_behind,
        reason=rollout.reason,
        codes=rollout.codes,
        policy=rollout.policy,
        sets=rollout.sets,
        wave_count=len(rollout.waves),
        waves_completed=sum(wave.status == "completed" for wave in rollout.waves),
        current_wave=current.index if current is not None else None,
        current_status=current.status if current is not None else None,
        wave_etags=tuple(wave.etag for wave in rollout.waves) if with_waves else (),
        estimate_s=rollout.estimate_s,
        requested_by=rollout.requested_by,
        created_at=rollout.created_at,
        ended_at=rollout.ended_at,
    )


def _published_state_changed(one: Wave, two: Wave) -> bool:
    """Without the VMs, which never change: most messages do not change the published state."""
    same_vms = one.vms is two.vms or one.vms == two.vms
    same_events = one.events is two.events or [each.event_id for each in one.events] == [
        each.event_id for each in two.events
    ]
    same_updates = one.operations is two.operations or _failed_updates(one) == _failed_updates(two)
    return not (same_vms and same_events and same_updates) or any(
        getattr(one, name) != getattr(two, name) for name in _PUBLISHED
    )


_PUBLISHED = (
    "status",
    "domains",
    "not_before",
    "started_at",
    "ended_at",
    "reason",
    "waiting_for",
    "codes",
    "waiting_codes",
    "approvals_shown",
)


def wave_state(rollout: str, wave: Wave) -> WaveState:
    """The wave as it is published, of the rollout with this id."""
    state = WaveState(
        rollout=rollout,
        wave=wave.index,
        etag=_NO_ETAG,
        status=wave.status,
        domains=wave.domains,
        hosts=wave.hosts,
        vms=tuple(vm.vm for vm in wave.vms),
        events=_first_events(wave),
        event_count=len(wave.events),
        not_before=wave.not_before,
        approved=_approved_sets(wave),
        approved_count=sum(bool(each.approved_by) for each in wave.events),
        started_at=wave.started_at,
        ended_at=wave.ended_at,
        reason=wave.reason or wave.waiting_for,
        codes=wave.codes or wave.waiting_codes,
        failed_updates=_failed_updates(wave),
    )
    if state.failed_updates and not fits(state):
        # The output of updates is dropped first: readers need the rest to know where the wave is.
        silent = tuple(msgspec.structs.replace(each, output_tail="") for each in state.failed_updates)
        state = msgspec.structs.replace(state, failed_updates=silent)
    return msgspec.structs.replace(state, etag=etag_of(state))


def _first_events(wave: Wave) -> dict[str, str]:
    """Maps each set to the id of its first event."""
    first: dict[str, str] = {}
    for each in wave.events:
        first.setdefault(each.set, each.event_id)
    return first


def _approved_sets(wave: Wave) -> tuple[str, ...]:
    """The sets of which every event is approved."""
    approved: dict[str, bool] = {}
    for each in wave.events:
        approved[each.set] = bool(each.approved_by) and approved.get(each.set, True)
    return tuple(name for name, whole in approved.items() if whole)


def with_etags(rollout: Rollout, before: Rollout | None = None) -> tuple[Rollout, list[WaveState]]:
    """The rollout with the etags of its waves, and the states of the waves whose published state changed.

    Args:
        before: the last published rollout: its waves have their etags, and waves that are the same objects are skipped, since
            most waves do not change in one step.
    """
    known = before.waves if before is not None else (None,) * len(rollout.waves)
    waves, states = [], []
    for wave, old in zip(rollout.waves, known, strict=True):
        if wave.etag and old is not None and (wave is old or not _published_state_changed(old, wave)):
            waves.append(wave)
            continue
        state = wave_state(rollout.id, wave)
        if old is None or state.etag != old.etag:
            states.append(state)
        waves.append(wave if wave.etag == state.etag else msgspec.structs.replace(wave, etag=state.etag))
    return msgspec.structs.replace(rollout, waves=tuple(waves)), states


def largest_states(rollout: Rollout) -> list[Message]:
    """The largest messages that may ever announce this rollout: every event approved, long reasons; a set's document."""
    at = rollout.created_at.replace(microsecond=999999)
    head = msgspec.structs.replace(
        rollout_state(with_etags(rollout)[0]),
        status="completed",
        queued_behind="r" * 64,
        reason="?" * 4096,
        codes=tuple(KNOWN),
        ended_at=at,
    )
    found: list[Message] = [head]
    failed = FailedUpdate(host="h" * 64, outcome="interrupted", exit_code=-255)
    for wave in rollout.waves:
        events = dict.fromkeys(wave.domains, _ANY_ID)
        found.append(
            msgspec.structs.replace(
                wave_state(rollout.id, wave),
                status="cancelled",
                events=events,
                event_count=len(wave.vms),
                approved=tuple(events),
                approved_count=len(wave.vms),
                not_before=at,
                started_at=at,
                ended_at=at,
                reason="?" * 4096,
                codes=tuple(KNOWN),
                failed_updates=(failed,) * min(_FAILED_NAMED, len(wave.hosts)),
            )
        )
        documents = _largest_documents(rollout, wave, at)
        found += documents
        # The facts about events differ in names only.
        name, event = max(
            ((document.set, event) for document in documents for event in document.events),
            key=lambda each: len("---".join((*each[1].resources, each[0], each[1].host))),
        )
        found.append(
            EventChanged(
                event_id=_ANY_ID,
                set=name,
                event_type=rollout.event_type,
                status="cancelled",
                resources=event.resources,
                host=event.host,
                incarnation=INTEGER_MOST,
                rollout=rollout.id,
                wave=wave.index,
                not_before=at,
                approved_by="v" * 63,
                reason="?" * 4096,
                codes=tuple(KNOWN),
                approval_delay_s=0.123456789,
                at=at,
            )
        )
    return found


def largest_events(rollout: Rollout) -> dict[str, int]:
    """Maps each set to the most bytes that the rollout's events ever take in its document."""
    at = rollout.created_at.replace(microsecond=999999)
    most: dict[str, int] = {}
    for wave in rollout.waves:
        for document in _largest_documents(rollout, wave, at):
            most[document.set] = max(size_bytes(document), most.get(document.set, 0))
    return most


def _largest_documents(rollout: Rollout, wave: Wave, at: datetime) -> list[SetDocument]:
    """The documents of the wave's sets at their largest."""
    resources: dict[str, dict[str, list[str]]] = {}
    for vm in wave.vms:
        resources.setdefault(vm.set, {}).setdefault(vm.host, []).append(vm.vm)
    return [
        SetDocument(
            set=name,
            incarnation=INTEGER_MOST,
            revision=INTEGER_MOST,
            events=tuple(
                ScheduledEvent(
                    event_id=_ANY_ID,
                    event_type=rollout.event_type,
                    status="scheduled",
                    resources=tuple(vms),
                    host=host,
                    not_before=at,
                    description=DESCRIPTIONS[rollout.event_type],
                    source=rollout.policy.event_source,
                    duration_s=round(MAX_BUDGET_S),
                    approved=True,
                    rollout=rollout.id,
                    wave=wave.index,
                )
                for host, vms in of_host.items()
            ),
        )
        for name, of_host in resources.items()
    ]


def _failed_updates(wave: Wave) -> tuple[FailedUpdate, ...]:
    """Of the last attempt. Hosts usually fail alike, so the output of the first few is enough."""
    failed: list[FailedUpdate] = []
    for each in wave.operations:
        update = each.update
        # Not `in`: mypy would not see which outcomes are left.
        if update is None or update.outcome == "succeeded" or update.outcome == "not_run":  # noqa: PLR1714
            continue
        if len(failed) == _FAILED_NAMED:
            break
        tail = update.output_tail[-_OUTPUT_CHARACTERS:] if len(failed) < _OUTPUTS_SHOWN else ""
        failed.append(
            FailedUpdate(host=each.host, outcome=update.outcome, exit_code=update.exit_code, output_tail=tail)
        )
    return tuple(failed)
