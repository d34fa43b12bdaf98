"""The gauges of what is so now, from ``Fleet``; those of rollouts are in ``rollout_metrics``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from caesura.contract import messages as m
from caesura_metrics_exporter.families import gauge, states
from caesura_metrics_exporter.fleet import Fleet
from caesura_metrics_exporter.rollout_metrics import rollout_families

_VM_STATES: tuple[str, ...] = (*get_args(m.VmState), "impaired")
"""``impaired``: it runs, and its host says what is wrong with it, such as that its application has ended."""
_GUARD_STATES = ("ready", "armed", "absent")
_AGENT_STATES = ("online", "offline", "silent")
_PAUSE = ("set", "update_domain", "host", "method")

AGENT_SILENT_S = 300.0
"""s: an agent says every 30 s that it is there, and is frozen for 30 s at most."""


def fleet_families(fleet: Fleet, now_s: float) -> Iterator[Metric]:
    """Every gauge of the fleet at ``now_s`` on the clock that it was fed with; what is not known has no series."""
    yield from _pauses(fleet, now_s)
    yield from _vms(fleet, now_s)
    yield from _clocks(fleet)
    yield from rollout_families(fleet, now_s)
    yield from _hosts(fleet, now_s)
    yield from _others(fleet, now_s)


def _pauses(fleet: Fleet, now_s: float) -> Iterator[Metric]:
    opened = dict(fleet.pauses.longest_open_s(now_s))
    found = {labels: fleet.budget_of(labels[0]) for labels in opened if labels not in fleet.budgets}
    yield gauge(
        "caesura_pause_budget_seconds",
        "Budget of the pause that is open, else of the last one.",
        _PAUSE,
        (fleet.budgets | found).items(),
    )
    yield gauge(
        "caesura_pause_last_seconds",
        "Longest pause of the last operation, host monotonic clock.",
        _PAUSE,
        [(labels, pause.seconds) for labels, pause in sorted(fleet.pauses.last.items())],
    )
    yield gauge(
        "caesura_pause_last_budget_seconds",
        "Budget of the pause that caesura_pause_last_seconds tells of.",
        _PAUSE,
        [(labels, pause.budget_s) for labels, pause in sorted(fleet.pauses.last.items())],
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
        "Seconds since the exporter was notified of the pause of a VM that is not known to run, of the oldest such pause; "
        "0 with none. The method is unknown where its freeze was not received.",
        _PAUSE,
        (dict.fromkeys(fleet.budgets, 0.0) | opened).items(),
    )
    sets = sorted({record.set for _, record, _ in fleet.vms()} | set(fleet.pauses.clashes))
    yield gauge(
        "caesura_domains_paused",
        "Domains of a set in which a VM is paused, by the key of its rollout; more than 1 must never be.",
        ("set",),
        [((name,), fleet.pauses.domains(name)) for name in sets],
    )
    clashes = CounterMetricFamily(
        "caesura_domain_clashes",
        "VMs frozen while a VM of another domain of their set was paused; more than 0 must never be.",
        labels=("set",),
    )
    for name in sets:
        clashes.add_metric((name,), fleet.pauses.clashes[name])
    yield clashes


def _vms(fleet: Fleet, now_s: float) -> Iterator[Metric]:
    vms: Counter[tuple[str, ...]] = Counter()
    agents: Counter[tuple[str, ...]] = Counter()
    for _, record, state in fleet.vms():
        shown = "impaired" if state == "running" and record.state_detail else state
        for each in _VM_STATES:
            vms[record.set, str(record.update_domain), each] += each == shown
        if record.agent:
            known = fleet.agents.get(record.vm)
            presence = "offline"
            if known is not None and known.online:
                presence = "silent" if now_s - known.heard_s > AGENT_SILENT_S else "online"
            for name in _AGENT_STATES:
                agents[record.set, name] += name == presence
    yield gauge(
        "caesura_vms",
        "VMs by state; impaired: running, and its host says what is wrong with it.",
        ("set", "update_domain", "state"),
        vms.items(),
    )
    yield gauge(
        "caesura_agents",
        f"VM agents by presence; silent: should be online, and said nothing for {AGENT_SILENT_S:g} s.",
        ("set", "state"),
        agents.items(),
    )


def _clocks(fleet: Fleet) -> Iterator[Metric]:
    unsynced: Counter[tuple[str, ...]] = Counter()
    worst: dict[tuple[str, ...], float] = {}
    bounds: dict[tuple[str, ...], float | None] = {}
    for _, record, _state in fleet.vms():
        domain = (record.set, str(record.update_domain))
        verdict = fleet.clocks.get(record.vm)
        unsynced[domain] += verdict is not None and not verdict.synced
        if verdict is None:
            continue
        for when, error_s in (("before", verdict.before_s), ("after", verdict.after_s)):
            if error_s is not None and abs(error_s) >= abs(worst.get((*domain, when), 0.0)):
                worst[*domain, when] = error_s
                if when == "after":
                    bounds[domain] = verdict.bound_s
    yield gauge(
        "caesura_vms_unsynced",
        "VMs whose clock could not be corrected, after their last pause or by their agent since.",
        ("set", "update_domain"),
        unsynced.items(),
    )
    refused: Counter[tuple[str, ...]] = Counter()
    for _, record, _state in fleet.vms():
        refused[record.set, str(record.update_domain)] += fleet.clocks.refused(record.vm)
    yield gauge(
        "caesura_vms_clock_step_refused",
        "VMs whose clock is so far off that their agent does not step it outside a resume.",
        ("set", "update_domain"),
        refused.items(),
    )
    # A VM's name is no label: the worst VM speaks for its domain, with its sign.
    yield gauge(
        "caesura_clock_error_last_seconds",
        "Guest minus host clock at the last sync, of the VM of the domain that was off most.",
        ("set", "update_domain", "when"),
        worst.items(),
    )
    yield gauge(
        "caesura_clock_bound_last_seconds",
        "How far the clock of caesura_clock_error_last_seconds after the sync might be off, by the rollout of its pause.",
        ("set", "update_domain"),
        [(domain, bound_s) for domain, bound_s in bounds.items() if bound_s is not None],
    )


def _hosts(fleet: Fleet, now_s: float) -> Iterator[Metric]:
    online = [((host,), float(state.online)) for host, state in fleet.hosts.items()]
    yield gauge("caesura_host_online", "1 while the host updater is on the bus, else 0.", ("host",), online)
    # A last will needs a broker: one that died with the host, or before it, tells nothing when it is back.
    yield gauge(
        "caesura_host_heard_seconds",
        "Seconds since the exporter heard the host updater itself, which speaks every 20 s.",
        ("host",),
        [((host,), max(0.0, now_s - state.heard_s)) for host, state in fleet.hosts.items()],
    )
    guards: list[tuple[tuple[str, ...], float]] = []
    busy: list[tuple[tuple[str, ...], float]] = []
    for host, state in fleet.hosts.items():
        if state.inventory is not None:
            guards += states((host,), _GUARD_STATES, state.inventory.guard)
            busy.append(((host,), float(bool(state.inventory.operation))))
    yield gauge(
        "caesura_host_guard_state", "1 for the state of the host's pause guard.", ("host", "state"), guards
    )
    yield gauge(
        "caesura_update_info",
        "1 for an update that the whole host has, in the version that it defines.",
        ("host", "update", "version"),
        [
            ((host, each.update, each.version), 1.0)
            for host, state in fleet.hosts.items()
            for each in (state.inventory.installed if state.inventory is not None else ())
            if not each.vms
        ],
    )
    yield gauge(
        "caesura_host_foreign_vms",
        "VMs that the host names in its inventory although they are not on record as its own.",
        ("host",),
        [((host,), float(fleet.foreign_vms.get(host, 0))) for host in fleet.hosts],
    )
    yield gauge("caesura_host_busy", "1 while an operation is under way on the host.", ("host",), busy)


def _others(fleet: Fleet, now_s: float) -> Iterator[Metric]:
    yield gauge(
        "caesura_publisher_online",
        "1 while the metadata publisher is on the bus, else 0.",
        ("publisher",),
        [((name,), float(online)) for name, online in fleet.publishers.items()],
    )
    coordinator = fleet.coordinator
    yield GaugeMetricFamily(
        "caesura_coordinator_online",
        "1 while the coordinator is on the bus, else 0.",
        value=float(coordinator is not None and coordinator.online),
    )
    if fleet.coordinator_heard_s is not None:
        yield GaugeMetricFamily(
            "caesura_coordinator_heard_seconds",
            "Seconds since the exporter heard the coordinator itself, which speaks every 20 s.",
            value=max(0.0, now_s - fleet.coordinator_heard_s),
        )
    if coordinator is not None:
        yield GaugeMetricFamily(
            "caesura_coordinator_epoch", "Epoch of the coordinator.", value=coordinator.epoch
        )
