"""The gauges of what is so now, from ``Fleet``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric

from caesura.contract import messages as m
from caesura_metrics_exporter.families import gauge, states
from caesura_metrics_exporter.fleet import Fleet

_WAVE_STATES: tuple[str, ...] = get_args(m.WaveStatus)
_ROLLOUT_STATES: tuple[str, ...] = get_args(m.RolloutStatus)
_VM_STATES: tuple[str, ...] = get_args(m.VmState)
_GUARD_STATES = ("ready", "armed", "absent")


def fleet_families(fleet: Fleet) -> Iterator[Metric]:
    """Every gauge of the fleet; what is not known has no series."""
    yield gauge(
        "caesura_pause_budget_seconds",
        "Budget of the last pause.",
        ("set", "update_domain", "host", "method"),
        fleet.budgets.items(),
    )
    yield from _vms(fleet)
    yield from _clocks(fleet)
    yield from _rollouts(fleet)
    yield from _events(fleet)
    yield from _hosts(fleet)
    yield from _others(fleet)


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


def _events(fleet: Fleet) -> Iterator[Metric]:
    open_events: Counter[tuple[str, ...]] = Counter()
    for document in fleet.documents.values():
        for event in document.events:
            open_events[document.set, event.event_type, event.status] += 1
    yield gauge(
        "caesura_events_open", "Open scheduled events.", ("set", "type", "status"), open_events.items()
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
