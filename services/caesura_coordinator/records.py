"""The durable state of a rollout: frozen records that the store writes as JSON. Pure."""

from __future__ import annotations

import uuid
from bisect import bisect_left
from datetime import datetime
from typing import Literal

import msgspec

from caesura.contract.envelope import Message
from caesura.contract.fitting import fits
from caesura.contract.messages import (
    EPOCH_MOST,
    EventChanged,
    EventStatus,
    EventType,
    FailedUpdate,
    Plan,
    PlannedVm,
    Policy,
    ProofCode,
    RolloutState,
    RolloutStatus,
    UpdateOutcome,
    VmResult,
    WaveState,
    WaveStatus,
)
from caesura.contract.parts import etag_of
from caesura.contract.reasons import KNOWN

_NAMESPACE = uuid.UUID("6f1d4e52-6f0b-5e0a-9a51-0c1f3a7f3f0e")
"""Namespace of the ids of events and operations, which are derived from what they are for; the store keeps them."""

OperationProgress = Literal["planned", "accepted", "refused", "completed", "failed", "cancelled", "lost"]
FINAL: frozenset[OperationProgress] = frozenset({"refused", "completed", "failed", "cancelled", "lost"})


_FAILED_NAMED = 16
"""How many hosts of a wave are published with their failed update."""
_OUTPUTS_SHOWN = 3
"""How many of those hosts are published with the output."""
_OUTPUT_CHARACTERS = 2048
_NO_ETAG = "0" * 12


class StateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the records."""


class WaveEvent(StateRecord, frozen=True, kw_only=True):
    """The scheduled event of one set in one wave. Its id never changes."""

    set: str
    event_id: str
    resources: tuple[str, ...]
    status: EventStatus = "scheduled"
    approved_by: str = ""
    approved_at: datetime | None = None


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
    answers_by: datetime | None = None
    """An agent that has not answered by this time is silent: NotBefore, or later if the coordinator was down then."""
    events: tuple[WaveEvent, ...] = ()
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
        """Whether the rollout still holds its sets."""
        return self.status in {"running", "aborting", "halted"}


def new_rollout(
    rollout_id: str,
    plan: Plan,
    *,
    policy: Policy,
    fence_hosts: tuple[str, ...],
    requested_by: str,
    now: datetime,
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
        created_at=now,
    )


def event_id(rollout: Rollout, wave: Wave, set_name: str, epoch: int) -> str:
    """The id of a wave's event for one set: a GUID, upper case as Azure's are.

    The epoch is part of the name: a coordinator with a store restored from an old copy must not reuse the id
    of an event that has ended in the meantime.
    """
    name = f"event/{rollout.id}/{wave.index}/{wave.attempt}/{epoch}/{set_name}"
    return str(uuid.uuid5(_NAMESPACE, name)).upper()


def operation_id(rollout: Rollout, wave: Wave, host: str, epoch: int) -> str:
    """The id of a wave's operation on one host."""
    name = f"operation/{rollout.id}/{wave.index}/{wave.attempt}/{epoch}/{host}"
    return str(uuid.uuid5(_NAMESPACE, name))


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


def without_waves(rollout: Rollout) -> Rollout:
    """The rollout without its waves, which are stored and published separately."""
    return msgspec.structs.replace(rollout, waves=())


def _published_state_changed(one: Wave, two: Wave) -> bool:
    """Without the VMs, which never change: most messages do not change the published state."""
    same_vms = one.vms is two.vms or one.vms == two.vms
    same_events = one.events is two.events or [
        (each.set, each.event_id, bool(each.approved_by)) for each in one.events
    ] == [(each.set, each.event_id, bool(each.approved_by)) for each in two.events]
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
        events={each.set: each.event_id for each in wave.events},
        not_before=wave.not_before,
        approved=tuple(each.set for each in wave.events if each.approved_by),
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
        reason="?" * 4096,
        codes=tuple(KNOWN),
        ended_at=at,
    )
    found: list[Message] = [head]
    failed = FailedUpdate(host="h" * 64, outcome="interrupted", exit_code=-255)
    for wave in rollout.waves:
        events = {name: str(_NAMESPACE) for name in wave.domains}
        found.append(
            msgspec.structs.replace(
                wave_state(rollout.id, wave),
                status="cancelled",
                events=events,
                approved=tuple(events),
                not_before=at,
                started_at=at,
                ended_at=at,
                reason="?" * 4096,
                codes=tuple(KNOWN),
                failed_updates=(failed,) * min(_FAILED_NAMED, len(wave.hosts)),
            )
        )
        resources: dict[str, list[str]] = {}
        for vm in wave.vms:
            resources.setdefault(vm.set, []).append(vm.vm)
        found += [
            EventChanged(
                event_id=str(_NAMESPACE),
                set=name,
                event_type=rollout.event_type,
                status="cancelled",
                resources=tuple(vms),
                incarnation=EPOCH_MOST,
                rollout=rollout.id,
                wave=wave.index,
                not_before=at,
                approved_by="v" * 63,
                reason="?" * 4096,
                codes=tuple(KNOWN),
                approval_delay_s=0.123456789,
                at=at,
            )
            for name, vms in resources.items()
        ]
    return found


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
