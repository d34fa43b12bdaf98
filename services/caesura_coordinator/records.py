"""The durable state of a rollout: frozen records that the store writes as JSON. Pure."""

from __future__ import annotations

import uuid
from bisect import bisect_left
from datetime import datetime
from typing import Literal

import msgspec

from caesura.contract.messages import (
    EventStatus,
    EventType,
    Plan,
    PlannedVm,
    Policy,
    ProofCode,
    RolloutStatus,
    UpdateOutcome,
    VmResult,
    WaveStatus,
)

_NAMESPACE = uuid.UUID("6f1d4e52-6f0b-5e0a-9a51-0c1f3a7f3f0e")
"""Namespace of the ids of events and operations, which are derived from what they are for; the store keeps them."""

OperationProgress = Literal["planned", "accepted", "refused", "completed", "failed", "cancelled", "lost"]
FINAL: frozenset[OperationProgress] = frozenset({"refused", "completed", "failed", "cancelled", "lost"})


class StateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the records."""


class WaveEvent(StateRecord, frozen=True, kw_only=True):
    """The scheduled event of one set on one host in one wave. Its id never changes."""

    set: str
    host: str = ""
    """Empty: written by a version that had one event for all hosts of the set."""
    event_id: str
    resources: tuple[str, ...]
    status: EventStatus = "scheduled"
    approved_by: str = ""
    approved_at: datetime | None = None


def event_order(event: WaveEvent) -> tuple[str, str]:
    """The order of a wave's events."""
    return event.set, event.host


class HostOperation(StateRecord, frozen=True, kw_only=True):
    """The command to one host in one wave, and its answer."""

    host: str
    operation: str
    status: OperationProgress = "planned"
    reason: str = ""
    codes: tuple[str, ...] = ()
    vms: tuple[VmResult, ...] = ()
    update: UpdateOutcome | None = None


class ClockVerdict(StateRecord, frozen=True, kw_only=True):
    """The host's verdict on one VM's clock after the resume, and what was shown about its memory from inside the guest."""

    synced: bool
    error_after_s: float | None = None
    memory_ok: bool | None = None
    """Written by a coordinator that had no codes."""
    held: tuple[ProofCode, ...] = ()
    broken: tuple[ProofCode, ...] = ()
    memory_detail: str = ""
    reason: str = ""


class AgentReadiness(StateRecord, frozen=True, kw_only=True):
    """An agent's answer to the event."""

    ready: bool
    reason: str = ""


class Wave(StateRecord, frozen=True, kw_only=True):
    """One wave and everything that happened in it. ``attempt`` rises when a halted rollout is resumed."""

    index: int
    domains: dict[str, int]
    vms: tuple[PlannedVm, ...]
    etag: str = ""
    """Etag of its published state; empty before there is one."""
    attempt: int = 0
    status: WaveStatus = "pending"
    reason: str = ""
    codes: tuple[str, ...] = ()
    waiting_since: datetime | None = None
    """Since when a gate has been blocking it."""
    waiting_for: str = ""
    waiting_codes: tuple[str, ...] = ()
    published_at: datetime | None = None
    not_before: datetime | None = None
    queued: bool = False
    """Whether it was announced while another rollout held its sets, and has not had its turn yet."""
    answers_by: datetime | None = None
    """An agent that has not answered by this time is silent: NotBefore, or later if the coordinator was down then."""
    events: tuple[WaveEvent, ...] = ()
    """In the order of their sets' names, then of their hosts' names."""
    approvals_shown: int = 0
    """How many approvals are to be published: a wave of many hosts gets many at once, and each would publish the whole wave."""
    readiness: dict[str, AgentReadiness] = {}
    operations: tuple[HostOperation, ...] = ()
    completed_operations: tuple[HostOperation, ...] = msgspec.field(default=(), name="done")
    """Completed operations of earlier attempts: not repeated, and verified together with this attempt's."""
    fence_epoch: int = 0
    """The epoch under which the fence was last found open since the wave started; freezes are only commanded under it."""
    superseded_reason: str = msgspec.field(default="", name="outdated")
    """Why the rollout will halt once the hosts have finished their commands; empty if there is no reason yet."""
    started_at: datetime | None = None
    not_after: datetime | None = None
    """Hosts refuse the wave's commands after this time."""
    report_by: datetime | None = None
    """A host that has not reported by this time counts as lost for this wave."""
    clocks: dict[str, ClockVerdict] = {}
    verify_by: datetime | None = None
    """The end of the verification; None before it began."""
    acknowledged_findings: tuple[str, ...] = msgspec.field(default=(), name="accepted")
    """The findings for which the verification halted the rollout: an operator who resumes accepts these, and nothing else."""
    soak_until: datetime | None = None
    ended_at: datetime | None = None

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts of the wave, each once."""
        return tuple(dict.fromkeys(vm.host for vm in self.vms))

    @property
    def pending_vms(self) -> tuple[PlannedVm, ...]:
        """The VMs that this attempt acts on: those whose host has not completed its part in an earlier one."""
        done = {each.host for each in self.completed_operations}
        return tuple(vm for vm in self.vms if vm.host not in done)

    def event_place(self, set_name: str, host: str) -> int | None:
        """The index of the event of this set's VMs on this host; None if there is none."""
        for of_host in (host, ""):
            place = bisect_left(self.events, (set_name, of_host), key=event_order)
            if place < len(self.events) and event_order(self.events[place]) == (set_name, of_host):
                return place
        return None


class Rollout(StateRecord, frozen=True, kw_only=True):
    """A rollout: the request, the waves, and its progress."""

    id: str
    update: str
    hold_s: float
    event_type: EventType
    policy: Policy
    waves: tuple[Wave, ...]
    sets: tuple[str, ...]
    fence_hosts: tuple[str, ...] = msgspec.field(name="set_hosts")
    """Every host that held a VM of these sets when the plan was made: all are checked before every pause."""
    status: RolloutStatus = "running"
    queued_behind: str = ""
    """The youngest of the rollouts that it waits for; empty: it holds its sets."""
    reason: str = ""
    codes: tuple[str, ...] = ()
    expected_pause_s: float = 0.0
    work_outside_pause_s: float = msgspec.field(default=0.0, name="outside_pause_s")
    """Seconds that a host may work before its first pause, beyond the budget."""
    estimate_s: float = 0.0
    requested_by: str = ""
    created_at: datetime
    ended_at: datetime | None = None

    @property
    def current(self) -> Wave | None:
        """The first wave that is not completed, or None when all are. They complete in order."""
        place = bisect_left(self.waves, True, key=lambda wave: wave.status != "completed")
        return self.waves[place] if place < len(self.waves) else None

    @property
    def stage(self) -> tuple[RolloutStatus, int, WaveStatus, int]:
        """The stage of the rollout, on which the commands to its hosts depend."""
        wave = self.current
        if wave is None:
            return self.status, len(self.waves), "completed", 0
        return self.status, wave.index, wave.status, wave.attempt

    @property
    def active(self) -> bool:
        """Whether the rollout holds its sets, or waits for them."""
        return self.status in {"running", "aborting", "halted"}


def new_rollout(
    rollout_id: str,
    plan: Plan,
    *,
    policy: Policy,
    fence_hosts: tuple[str, ...],
    requested_by: str,
    now: datetime,
    queued_behind: str = "",
) -> Rollout:
    """A new rollout."""
    waves = tuple(Wave(index=wave.wave, domains=wave.domains, vms=wave.vms) for wave in plan.waves)
    return Rollout(
        id=rollout_id,
        update=plan.update,
        hold_s=plan.hold_s,
        event_type=plan.event_type,
        policy=policy,
        waves=waves,
        sets=tuple(dict.fromkeys(vm.set for wave in waves for vm in wave.vms)),
        fence_hosts=fence_hosts,
        expected_pause_s=plan.expected_pause_s,
        work_outside_pause_s=plan.outside_pause_s,
        estimate_s=plan.estimate_s,
        requested_by=requested_by,
        queued_behind=queued_behind,
        created_at=now,
    )


def event_id(rollout: Rollout, wave: Wave, set_name: str, host: str, epoch: int) -> str:
    """The id of a wave's event for one set on one host: a GUID, upper case as Azure's are.

    The epoch is part of the name: a coordinator with a store restored from an old copy must not reuse the id
    of an event that has ended in the meantime.
    """
    name = f"event/{rollout.id}/{wave.index}/{wave.attempt}/{epoch}/{set_name}/{host}"
    return str(uuid.uuid5(_NAMESPACE, name)).upper()


def operation_id(rollout: Rollout, wave: Wave, host: str, epoch: int) -> str:
    """The id of a wave's operation on one host."""
    name = f"operation/{rollout.id}/{wave.index}/{wave.attempt}/{epoch}/{host}"
    return str(uuid.uuid5(_NAMESPACE, name))


def has_parts(rollout: Rollout) -> bool:
    """Whether anything is known of single VMs and hosts in its waves."""
    return any(each.readiness or each.clocks or each.operations for each in rollout.waves)


def without_parts(rollout: Rollout) -> Rollout:
    """Without what is known of single VMs and hosts in its waves."""
    waves = (msgspec.structs.replace(each, readiness={}, clocks={}, operations=()) for each in rollout.waves)
    return msgspec.structs.replace(rollout, waves=tuple(waves))


def without_waves(rollout: Rollout) -> Rollout:
    """The rollout without its waves, which are stored and published separately."""
    return msgspec.structs.replace(rollout, waves=())
