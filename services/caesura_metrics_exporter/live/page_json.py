"""The JSON of ``/live/state`` and ``/live/events``. Pure. New members may be added; existing ones keep their meaning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura.runtime.visible import visible
from caesura_metrics_exporter.live.activity import LogEntry
from caesura_metrics_exporter.live.alarms import Alarm
from caesura_metrics_exporter.live.timelines import LaneView

_SETS_NAMED = 8


class PausedVm(msgspec.Struct, frozen=True, omit_defaults=True):
    """A paused VM. ``since`` is when the pause was received; null: known only from its host's inventory."""

    vm: str
    set: str
    domain: int
    host: str
    method: str = ""
    since: float | None = None
    budget: float | None = None
    or_earlier: bool = False
    """By its host's clock the pause began before it was received: that clock is behind, or the exporter received it late."""


class WaveView(msgspec.Struct, frozen=True, omit_defaults=True):
    """One wave of a rollout."""

    wave: int
    status: str
    domains: dict[str, int]
    """For the first sets by name; ``sets`` counts all."""
    sets: int
    hosts: int
    vms: int
    standing: int = 0
    """The VMs of it that are paused now."""
    events: int = 0
    """Scheduled events that workloads may approve, and how many are approved."""
    approved: int = 0
    not_before: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    reason: str = ""


class OutputView(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the update failed on one host; ``output`` with control characters escaped."""

    host: str
    outcome: str
    exit_code: int | None = None
    output: str = ""


class RolloutView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A rollout. Times are unix seconds."""

    rollout: str
    update: str
    """Empty: a freeze on demand, ``hold_s`` long."""
    hold_s: float
    status: str
    sets: int
    waves: tuple[WaveView, ...]
    counts: dict[str, int]
    """Waves by status."""
    budget_s: float
    notice_s: float
    created_at: float
    reason: str = ""
    queued_behind: str = ""
    """The rollout that it waits for."""
    requested_by: str = ""
    ended_at: float | None = None
    key: str = "update_domain"
    failed_updates: tuple[OutputView, ...] = ()


class FleetSummary(msgspec.Struct, frozen=True, omit_defaults=True):
    """The fleet in a few numbers, and its problems."""

    broker: str
    """Empty while the exporter is connected, else what is wrong."""
    broker_since: float
    """Since when that is so."""
    coordinator: str
    hosts: int
    vms: int
    sets: int
    domains: int
    paused: int
    standby: str = ""
    """Of coordinators that share a store: what the leader waits for, or which others stand by; empty: there are no others."""
    hosts_offline: tuple[str, ...] = ()
    offline_since: dict[str, float] = {}
    """When each of these was last received."""
    full: bool = False
    """There are more domains than the exporter keeps for this page."""
    alarms: tuple[Alarm, ...] = ()
    alarms_by_rule: dict[str, int] = {}
    """The number of alarms of each rule, including those not sent."""
    alarms_more: int = 0
    """The number of further ones."""


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """The changes since a revision, or everything (``whole``). A null member did not change.

    ``lanes`` replace those with the same id, ``log`` adds lines; in a snapshot both are complete.
    """

    whole: bool
    revision: int
    kept_s: float
    now: float | None = None
    """The exporter's wall clock when this was sent, unix seconds, like all times here."""
    fleet: FleetSummary | None = None
    rollouts: tuple[RolloutView, ...] | None = None
    paused: tuple[PausedVm, ...] | None = None
    lanes: tuple[LaneView, ...] = ()
    log: tuple[LogEntry, ...] = ()


def rollout_view(rollout: WholeRollout, standing: Callable[[Iterable[str]], int]) -> RolloutView:
    """A rollout as it is sent. ``standing`` counts paused VMs."""
    return RolloutView(
        rollout=rollout.rollout,
        update=rollout.update,
        hold_s=rollout.hold_s,
        status=rollout.status,
        sets=len(rollout.sets),
        waves=tuple(_wave(wave, standing(wave.vms)) for wave in rollout.waves),
        counts=dict(Counter(wave.status for wave in rollout.waves)),
        budget_s=rollout.policy.budget_s,
        notice_s=rollout.policy.notice_s,
        created_at=rollout.created_at.timestamp(),
        reason=rollout.reason,
        queued_behind=rollout.queued_behind if rollout.status == "running" else "",
        requested_by=rollout.requested_by,
        ended_at=rollout.ended_at.timestamp() if rollout.ended_at else None,
        key=rollout.policy.domain_key,
        failed_updates=tuple(
            OutputView(each.host, each.outcome, each.exit_code, visible(each.output_tail))
            for wave in rollout.waves
            for each in wave.failed_updates
        ),
    )


def _wave(wave: m.WaveState, standing: int) -> WaveView:
    return WaveView(
        wave=wave.wave,
        status=wave.status,
        domains=dict(sorted(wave.domains.items())[:_SETS_NAMED]),
        sets=len(wave.domains),
        hosts=len(wave.hosts),
        vms=len(wave.vms),
        standing=standing,
        events=max(wave.event_count, len(wave.events)),
        approved=max(wave.approved_count, len(wave.approved)),
        not_before=wave.not_before.timestamp() if wave.not_before else None,
        started_at=wave.started_at.timestamp() if wave.started_at else None,
        ended_at=wave.ended_at.timestamp() if wave.ended_at else None,
        reason=wave.reason,
    )
