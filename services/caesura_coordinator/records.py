"""The durable state of a rollout: frozen records that the store writes as JSON. Pure."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Literal

import msgspec

from caesura.contract.messages import (
    EventStatus,
    EventType,
    Plan,
    PlannedVm,
    Policy,
    RolloutState,
    RolloutStatus,
    UpdateOutcome,
    VmResult,
    WaveState,
    WaveStatus,
)

_NAMESPACE = uuid.UUID("6f1d4e52-6f0b-5e0a-9a51-0c1f3a7f3f0e")
"""Ids of events and operations are named after what they are for, so a restart makes the same ones again."""

OperationProgress = Literal["planned", "accepted", "refused", "completed", "failed", "cancelled", "lost"]
FINAL: frozenset[OperationProgress] = frozenset({"refused", "completed", "failed", "cancelled", "lost"})


class Frozen(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the records."""


class WaveEvent(Frozen, frozen=True, kw_only=True):
    """The scheduled event of one set in one wave. Its id never changes."""

    set: str
    event_id: str
    resources: tuple[str, ...]
    status: EventStatus = "scheduled"
    approved_by: str = ""
    approved_at: datetime | None = None


class HostOperation(Frozen, frozen=True, kw_only=True):
    """What one host was commanded in one wave, and what it said."""

    host: str
    operation: str
    status: OperationProgress = "planned"
    reason: str = ""
    vms: tuple[VmResult, ...] = ()
    update: UpdateOutcome | None = None


class ClockVerdict(Frozen, frozen=True, kw_only=True):
    """The host's verdict on one VM's clock after the resume."""

    synced: bool
    error_after_s: float | None = None
    memory_ok: bool | None = None
    reason: str = ""


class Readiness(Frozen, frozen=True, kw_only=True):
    """An agent's answer to the event."""

    ready: bool
    reason: str = ""


class Wave(Frozen, frozen=True, kw_only=True):
    """One wave and everything that happened in it. ``attempt`` rises when a halted rollout is resumed."""

    index: int
    domains: dict[str, int]
    vms: tuple[PlannedVm, ...]
    attempt: int = 0
    status: WaveStatus = "pending"
    reason: str = ""
    waiting_since: datetime | None = None
    """Since when a gate has been in the way."""
    waiting_for: str = ""
    published_at: datetime | None = None
    not_before: datetime | None = None
    events: tuple[WaveEvent, ...] = ()
    readiness: dict[str, Readiness] = {}
    operations: tuple[HostOperation, ...] = ()
    started_at: datetime | None = None
    not_after: datetime | None = None
    """Hosts refuse the wave's commands after this."""
    report_by: datetime | None = None
    """A host that has not reported by then is lost to this wave."""
    clocks: dict[str, ClockVerdict] = {}
    verify_by: datetime | None = None
    soak_until: datetime | None = None
    ended_at: datetime | None = None

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts of the wave, each once."""
        return tuple(dict.fromkeys(vm.host for vm in self.vms))


class Rollout(Frozen, frozen=True, kw_only=True):
    """A rollout: what was asked, the waves, and where it is."""

    id: str
    update: str
    hold_s: float
    event_type: EventType
    policy: Policy
    waves: tuple[Wave, ...]
    sets: tuple[str, ...]
    set_hosts: tuple[str, ...]
    """Every host that held a VM of these sets when the plan was made: all are asked before every pause."""
    status: RolloutStatus = "running"
    reason: str = ""
    expected_pause_s: float = 0.0
    estimate_s: float = 0.0
    requested_by: str = ""
    created_at: datetime
    ended_at: datetime | None = None

    @property
    def current(self) -> Wave | None:
        """The first wave that is not completed, or None when all are."""
        return next((wave for wave in self.waves if wave.status != "completed"), None)

    @property
    def active(self) -> bool:
        """Whether the rollout still holds its sets."""
        return self.status in {"running", "aborting", "halted"}


def new_rollout(
    rollout_id: str,
    plan: Plan,
    *,
    policy: Policy,
    set_hosts: tuple[str, ...],
    requested_by: str,
    now: datetime,
) -> Rollout:
    """A rollout at its beginning."""
    waves = tuple(Wave(index=wave.wave, domains=wave.domains, vms=wave.vms) for wave in plan.waves)
    return Rollout(
        id=rollout_id,
        update=plan.update,
        hold_s=plan.hold_s,
        event_type=plan.event_type,
        policy=policy,
        waves=waves,
        sets=tuple(dict.fromkeys(vm.set for wave in waves for vm in wave.vms)),
        set_hosts=set_hosts,
        expected_pause_s=plan.expected_pause_s,
        estimate_s=plan.estimate_s,
        requested_by=requested_by,
        created_at=now,
    )


def event_id(rollout: Rollout, wave: Wave, set_name: str) -> str:
    """The id of a wave's event for one set: a GUID, upper case as Azure's are."""
    return str(uuid.uuid5(_NAMESPACE, f"event/{rollout.id}/{wave.index}/{wave.attempt}/{set_name}")).upper()


def operation_id(rollout: Rollout, wave: Wave, host: str) -> str:
    """The id of a wave's operation on one host."""
    return str(uuid.uuid5(_NAMESPACE, f"operation/{rollout.id}/{wave.index}/{wave.attempt}/{host}"))


def rollout_state(rollout: Rollout) -> RolloutState:
    """The rollout as it is published."""
    return RolloutState(
        rollout=rollout.id,
        update=rollout.update,
        hold_s=rollout.hold_s,
        status=rollout.status,
        reason=rollout.reason,
        policy=rollout.policy,
        sets=rollout.sets,
        waves=tuple(_wave_state(wave) for wave in rollout.waves),
        estimate_s=rollout.estimate_s,
        requested_by=rollout.requested_by,
        created_at=rollout.created_at,
        ended_at=rollout.ended_at,
    )


def _wave_state(wave: Wave) -> WaveState:
    return WaveState(
        wave=wave.index,
        status=wave.status,
        domains=wave.domains,
        hosts=wave.hosts,
        vms=tuple(vm.vm for vm in wave.vms),
        events={each.set: each.event_id for each in wave.events},
        not_before=wave.not_before,
        approved=tuple(each.set for each in wave.events if each.approved_by),
        started_at=wave.started_at,
        ended_at=wave.ended_at,
        reason=wave.reason or wave.waiting_for,
    )
