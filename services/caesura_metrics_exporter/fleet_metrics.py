"""The gauges of what is so now, from ``Fleet``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from caesura.contract import messages as m
from caesura_metrics_exporter.families import gauge, states
from caesura_metrics_exporter.fleet import Fleet

_WAVE_STATES: tuple[str, ...] = get_args(m.WaveStatus)
_ROLLOUT_STATES: tuple[str, ...] = get_args(m.RolloutStatus)
_VM_STATES: tuple[str, ...] = get_args(m.VmState)
_GUARD_STATES = ("ready", "armed", "absent")
_PAUSE = ("set", "update_domain", "host", "method")


def fleet_families(fleet: Fleet, now_s: float) -> Iterator[Metric]:
    """Every gauge of the fleet at ``now_s`` on the clock that it was fed with; what is not known has no series."""
    yield from _pauses(fleet, now_s)
    yield from _vms(fleet)
    yield from _clocks(fleet)
    yield from _rollouts(fleet)
    yield from _waves(fleet)
    yield from _events(fleet, now_s)
    yield from _hosts(fleet)
    yield from _others(fleet)


def _pauses(fleet: Fleet, now_s: float) -> Iterator[Metric]:
    yield gauge("caesura_pause_budget_seconds", "Budget of the last pause.", _PAUSE, fleet.budgets.items())
    yield gauge(
        "caesura_pause_last_seconds",
        "Longest pause of the last operation, host monotonic clock.",
        _PAUSE,
        [(labels, pause.seconds) for labels, pause in sorted(fleet.pauses.last.items())],
    )
    yield gauge(
        "caesura_pause_longest_seconds",
        "Longest pause since the exporter's start, host monotonic clock.",
        _PAUSE,
        fleet.pauses.longest.items(),
    )
    # An age and no time stamp: it then hangs on one monotonic clock, and not on two wall clocks that may jump.
    yield gauge(
        "caesura_pause_open_seconds",
        "Seconds since the exporter heard that a VM was frozen that is not known to run, of the oldest such pause; "
        "0 with none.",
        _PAUSE,
        (dict.fromkeys(fleet.budgets, 0.0) | dict(fleet.pauses.longest_open_s(now_s))).items(),
    )
    sets = sorted({record.set for _, record, _ in fleet.vms()} | set(fleet.pauses.clashes))
    yield gauge(
        "caesura_domains_paused",
        "Domains of a set in which a VM stands still, by the key of its rollout; more than 1 must never be.",
        ("set",),
        [((name,), fleet.pauses.domains(name)) for name in sets],
    )
    clashes = CounterMetricFamily(
        "caesura_domain_clashes",
        "VMs frozen while a VM of another domain of their set stood still; more than 0 must never be.",
        labels=("set",),
    )
    for name in sets:
        clashes.add_metric((name,), fleet.pauses.clashes[name])
    yield clashes


def _vms(fleet: Fleet) -> Iterator[Metric]:
    vms: Counter[tuple[str, ...]] = Counter()
    agents: Counter[tuple[str, ...]] = Counter()
    for _, record, state in fleet.vms():
        for each in _VM_STATES:
            vms[record.set, str(record.update_domain), each] += each == state
        if record.agent:
            online = fleet.agents.get(record.vm, False)
            agents[record.set, "online"] += online
            agents[record.set, "offline"] += not online
    yield gauge("caesura_vms", "VMs by state.", ("set", "update_domain", "state"), vms.items())
    yield gauge("caesura_agents", "VM agents by presence.", ("set", "state"), agents.items())


def _clocks(fleet: Fleet) -> Iterator[Metric]:
    unsynced: Counter[tuple[str, ...]] = Counter()
    worst: dict[tuple[str, ...], float] = {}
    for _, record, _state in fleet.vms():
        domain = (record.set, str(record.update_domain))
        verdict = fleet.clocks.get(record.vm)
        unsynced[domain] += verdict is not None and not verdict.synced
        if verdict is None:
            continue
        for when, error_s in (("before", verdict.error_before_s), ("after", verdict.error_after_s)):
            if error_s is not None and abs(error_s) >= abs(worst.get((*domain, when), 0.0)):
                worst[*domain, when] = error_s
    yield gauge(
        "caesura_vms_unsynced",
        "VMs whose clock could not be put right after their last pause.",
        ("set", "update_domain"),
        unsynced.items(),
    )
    # A VM's name is no label: the worst VM speaks for its domain, with its sign.
    yield gauge(
        "caesura_clock_error_last_seconds",
        "Guest minus host clock at the last sync, of the VM of the domain that was off most.",
        ("set", "update_domain", "when"),
        worst.items(),
    )


def _rollouts(fleet: Fleet) -> Iterator[Metric]:
    domains: list[tuple[tuple[str, ...], float]] = []
    counts: list[tuple[tuple[str, ...], float]] = []
    rollouts: list[tuple[tuple[str, ...], float]] = []
    waves: list[tuple[tuple[str, ...], float]] = []
    completed: list[tuple[tuple[str, ...], float]] = []
    for set_name, rollout in sorted(fleet.rollout_of_sets().items()):
        rollouts += states((set_name,), _ROLLOUT_STATES, rollout.status)
        mine = [wave for wave in rollout.waves if set_name in wave.domains]
        waves.append(((set_name,), len(mine)))
        completed.append(((set_name,), sum(wave.status == "completed" for wave in mine)))
        now = fleet.domain_states(rollout, set_name)
        for domain, status in sorted(now.items()):
            domains += states((set_name, str(domain)), _WAVE_STATES, status)
        by_wave_status = Counter(now.values())
        counts += [((set_name, status), by_wave_status[status]) for status in _WAVE_STATES]
    yield gauge(
        "caesura_domain_status",
        "1 for the status of the wave that touches the domain.",
        ("set", "update_domain", "status"),
        domains,
    )
    yield gauge("caesura_domains", "Domains of a set's rollout by status.", ("set", "status"), counts)
    yield gauge("caesura_rollout_status", "1 for the status of a set's rollout.", ("set", "status"), rollouts)
    yield gauge("caesura_rollout_waves", "Waves of a set's rollout that touch the set.", ("set",), waves)
    yield gauge("caesura_rollout_waves_completed", "The completed ones of these waves.", ("set",), completed)
    by_status = Counter[str](rollout.status for rollout in fleet.rollouts.values())
    yield gauge(
        "caesura_rollouts",
        "Known rollouts by status.",
        ("status",),
        [((status,), by_status[status]) for status in _ROLLOUT_STATES],
    )


def _waves(fleet: Fleet) -> Iterator[Metric]:
    """When rollouts and waves began and ended, on the coordinator's wall clock: for durations and annotations."""
    begun: list[tuple[tuple[str, ...], float]] = []
    over: list[tuple[tuple[str, ...], float]] = []
    bounds: list[tuple[tuple[str, ...], float]] = []
    started: dict[tuple[str, ...], float] = {}
    ended: dict[tuple[str, ...], tuple[float, str]] = {}
    for name, rollout in sorted(fleet.rollout_of_sets().items()):
        begun.append(((name,), rollout.created_at.timestamp()))
        bounds.append(((name,), rollout.policy.clock_bound_s))
        if rollout.ended_at is not None:
            over.append(((name,), rollout.ended_at.timestamp()))
        for wave in rollout.waves:
            if name not in wave.domains:
                continue
            domain = (name, str(wave.domains[name]))
            if wave.started_at is not None:
                at = wave.started_at.timestamp()
                started[domain] = max(at, started.get(domain, at))
            if wave.ended_at is not None:
                last = (wave.ended_at.timestamp(), wave.status)
                ended[domain] = max(last, ended.get(domain, last))
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
        started.items(),
    )
    yield gauge(
        "caesura_wave_ended_timestamp_seconds",
        "When the last wave of the domain ended, and how.",
        ("set", "update_domain", "status"),
        [((*domain, status), at) for domain, (at, status) in ended.items()],
    )


def _events(fleet: Fleet, now_s: float) -> Iterator[Metric]:
    open_events: Counter[tuple[str, ...]] = Counter()
    ages: dict[tuple[str, ...], float] = {}
    for document in fleet.documents.values():
        since = fleet.events_since.get(document.set, {})
        for event in document.events:
            labels = (document.set, event.event_type, event.status)
            open_events[labels] += 1
            age_s = now_s - since.get((event.event_id, event.status), now_s)
            ages[labels] = max(age_s, ages.get(labels, 0.0))
    yield gauge(
        "caesura_events_open", "Open scheduled events.", ("set", "type", "status"), open_events.items()
    )
    yield gauge(
        "caesura_event_open_seconds",
        "Seconds that an open event has had its status, as far as the exporter saw, of the oldest.",
        ("set", "type", "status"),
        ages.items(),
    )
    yield gauge(
        "caesura_document_incarnation",
        "DocumentIncarnation of a set.",
        ("set",),
        [((document.set,), document.incarnation) for document in fleet.documents.values()],
    )


def _hosts(fleet: Fleet) -> Iterator[Metric]:
    online = [((host,), float(state.online)) for host, state in fleet.hosts.items()]
    yield gauge("caesura_host_online", "1 while the host updater is on the bus, else 0.", ("host",), online)
    guards: list[tuple[tuple[str, ...], float]] = []
    busy: list[tuple[tuple[str, ...], float]] = []
    for host, state in fleet.hosts.items():
        if state.inventory is not None:
            guards += states((host,), _GUARD_STATES, state.inventory.guard)
            busy.append(((host,), float(bool(state.inventory.operation))))
    yield gauge(
        "caesura_host_guard_state", "1 for the state of the host's pause guard.", ("host", "state"), guards
    )
    yield gauge("caesura_host_busy", "1 while an operation is under way on the host.", ("host",), busy)


def _others(fleet: Fleet) -> Iterator[Metric]:
    yield gauge(
        "caesura_publisher_online",
        "1 while the metadata publisher is on the bus, else 0.",
        ("instance",),
        [((name,), float(online)) for name, online in fleet.publishers.items()],
    )
    coordinator = fleet.coordinator
    yield GaugeMetricFamily(
        "caesura_coordinator_online",
        "1 while the coordinator is on the bus, else 0.",
        value=float(coordinator is not None and coordinator.online),
    )
    if coordinator is not None:
        yield GaugeMetricFamily(
            "caesura_coordinator_epoch", "Epoch of the coordinator.", value=coordinator.epoch
        )
