"""The gauges of rollouts, their waves and their scheduled events, from ``FleetMetricsView``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import get_args

from caesura.contract import messages as m
from caesura_metrics_exporter.metrics.current_state import FleetMetricsView
from caesura_metrics_exporter.metrics.families import Family, gauge, states
from caesura_metrics_exporter.rollout_index import SetProgress

_WAVE_STATES: tuple[m.WaveStatus, ...] = get_args(m.WaveStatus)
_NONE = SetProgress()
WAVE_STATUS_NUMBERS: dict[m.WaveStatus, int] = {
    "pending": 1,
    "scheduled": 2,
    "started": 3,
    "verifying": 4,
    "soaking": 5,
    "completed": 6,
    "failed": 7,
    "cancelled": 8,
}
"""In the order in which a wave reaches them."""
_ROLLOUT_STATES: tuple[str, ...] = get_args(m.RolloutStatus)


def rollout_families(fleet: FleetMetricsView, now_s: float) -> Iterator[Family]:
    """As ``fleet_families``."""
    yield from _rollouts(fleet)
    yield from _waves(fleet)
    yield from _events(fleet, now_s)


def _rollouts(fleet: FleetMetricsView) -> Iterator[Family]:
    domains: list[tuple[tuple[str, ...], float]] = []
    counts: list[tuple[tuple[str, ...], float]] = []
    rollouts: list[tuple[tuple[str, ...], float]] = []
    waves: list[tuple[tuple[str, ...], float]] = []
    completed: list[tuple[tuple[str, ...], float]] = []
    for set_name, rollout in fleet.rollouts.of_sets().items():
        rollouts += states((set_name,), _ROLLOUT_STATES, rollout.status)
        progress = fleet.rollouts.progress(rollout).get(set_name, _NONE)
        waves.append(((set_name,), progress.waves))
        completed.append(((set_name,), progress.completed))
        for domain, status in progress.status.items():
            domains.append(((set_name, str(domain), status), WAVE_STATUS_NUMBERS[status]))
        by_wave_status = Counter(progress.status.values())
        counts += [((set_name, status), by_wave_status[status]) for status in _WAVE_STATES]
    yield gauge(
        "caesura_domain_wave_status",
        "Status of the wave that touches the domain: one series per domain, with the status as its label and as its number: "
        + ", ".join(f"{status} {number}" for status, number in WAVE_STATUS_NUMBERS.items())
        + ".",
        ("set", "update_domain", "status"),
        domains,
    )
    yield gauge("caesura_domains", "Domains of a set's rollout by status.", ("set", "status"), counts)
    yield gauge("caesura_rollout_status", "1 for the status of a set's rollout.", ("set", "status"), rollouts)
    yield gauge("caesura_rollout_waves", "Waves of a set's rollout that touch the set.", ("set",), waves)
    yield gauge(
        "caesura_rollout_waves_completed",
        "Waves of a set's rollout that touch the set and are completed.",
        ("set",),
        completed,
    )
    yield gauge(
        "caesura_rollout_halted",
        "1 for each rollout that is halted; it has no series otherwise.",
        ("rollout", "update"),
        [
            ((rollout.rollout, rollout.update or "freeze-on-demand"), 1.0)
            for rollout in fleet.rollouts.known.values()
            if rollout.status == "halted"
        ],
    )
    yield gauge(
        "caesura_rollouts_queued",
        "Rollouts that wait for others which hold one of their sets; they are running in caesura_rollouts.",
        (),
        [
            (
                (),
                float(
                    sum(
                        bool(each.queued_behind) and each.status == "running"
                        for each in fleet.rollouts.known.values()
                    )
                ),
            )
        ],
    )
    by_status = Counter[str](rollout.status for rollout in fleet.rollouts.known.values())
    yield gauge(
        "caesura_rollouts",
        "Known rollouts by status.",
        ("status",),
        [((status,), by_status[status]) for status in _ROLLOUT_STATES],
    )


def _waves(fleet: FleetMetricsView) -> Iterator[Family]:
    """When rollouts and waves began and ended, on the coordinator's wall clock: for durations and annotations."""
    begun: list[tuple[tuple[str, ...], float]] = []
    over: list[tuple[tuple[str, ...], float]] = []
    bounds: list[tuple[tuple[str, ...], float]] = []
    started: list[tuple[tuple[str, ...], float]] = []
    ended: list[tuple[tuple[str, ...], float]] = []
    for name, rollout in fleet.rollouts.of_sets().items():
        begun.append(((name,), rollout.created_at.timestamp()))
        bounds.append(((name,), rollout.policy.clock_bound_s))
        if rollout.ended_at is not None:
            over.append(((name,), rollout.ended_at.timestamp()))
        progress = fleet.rollouts.progress(rollout).get(name, _NONE)
        started += [((name, str(domain)), at) for domain, at in progress.started.items()]
        ended += [((name, str(domain), status), at) for domain, (at, status) in progress.ended.items()]
    yield gauge(
        "caesura_rollout_created_timestamp_seconds", "When a set's rollout was created.", ("set",), begun
    )
    yield gauge(
        "caesura_rollout_ended_timestamp_seconds",
        "When a set's rollout completed or was aborted.",
        ("set",),
        over,
    )
    yield gauge(
        "caesura_rollout_clock_bound_seconds",
        "How far a guest's clock may be off, by the policy of its set's rollout.",
        ("set",),
        bounds,
    )
    yield gauge(
        "caesura_wave_started_timestamp_seconds",
        "When the last wave began to pause the domain.",
        ("set", "update_domain"),
        started,
    )
    yield gauge(
        "caesura_wave_ended_timestamp_seconds",
        "When the last wave of the domain ended, and how.",
        ("set", "update_domain", "status"),
        ended,
    )


def _events(fleet: FleetMetricsView, now_s: float) -> Iterator[Family]:
    open_events: Counter[tuple[str, ...]] = Counter()
    ages: dict[tuple[str, ...], float] = {}
    due: dict[tuple[str, ...], float] = {}
    for document in fleet.documents.values():
        since = fleet.events_since.get(document.set, {})
        for event in document.events:
            labels = (document.set, event.event_type, event.status)
            open_events[labels] += 1
            age_s = now_s - since.get((event.event_id, event.status), now_s)
            ages[labels] = max(age_s, ages.get(labels, 0.0))
            if event.status == "scheduled":
                at = event.not_before.timestamp()
                due[labels[:2]] = min(at, due.get(labels[:2], at))
    yield gauge(
        "caesura_events_open", "Open scheduled events.", ("set", "type", "status"), open_events.items()
    )
    yield gauge(
        "caesura_event_open_seconds",
        "Seconds that the oldest open event has had its status, as seen by the exporter.",
        ("set", "type", "status"),
        ages.items(),
    )
    yield gauge(
        "caesura_event_not_before_timestamp_seconds",
        "The earliest NotBefore of the events that have not started, unix time.",
        ("set", "type"),
        due.items(),
    )
    yield gauge(
        "caesura_document_incarnation",
        "DocumentIncarnation of a set.",
        ("set",),
        [((document.set,), document.incarnation) for document in fleet.documents.values()],
    )
