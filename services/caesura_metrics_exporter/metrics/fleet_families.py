"""The gauges of the current state, from ``FleetMetricsView``; those of rollouts are in ``rollout_metrics``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from caesura_metrics_exporter.metrics.agents import AGENT_SILENT_S
from caesura_metrics_exporter.metrics.current_state import FleetMetricsView
from caesura_metrics_exporter.metrics.families import Family, gauge, number
from caesura_metrics_exporter.metrics.rollout_families import rollout_families

_GUARD_STATES = ("ready", "armed", "absent")
_PAUSE = ("set", "update_domain", "method")
_HOST_PAUSE = ("set", "update_domain", "host", "method")

Values = dict[tuple[str, ...], float]


def fleet_families(
    fleet: FleetMetricsView, now_s: float, foreign: Mapping[str, int] | None = None
) -> Iterator[Family]:
    """Every gauge of the fleet at ``now_s`` on the clock that the view was fed with; unknown values have no series.

    Args:
        foreign: maps a host to the number of VMs that it names without owning them; hosts without such VMs may be left out.
    """
    fleet.settle(now_s)
    yield from _pauses(fleet, now_s)
    yield from _pauses_by_host(fleet, now_s)
    yield from _vms(fleet)
    yield from _clocks(fleet)
    yield from rollout_families(fleet, now_s)
    yield from _hosts(fleet, now_s, foreign or {})
    yield from _others(fleet, now_s)


def _pauses(fleet: FleetMetricsView, now_s: float) -> Iterator[Family]:
    opened = fleet.pauses.open_s(now_s)
    budgets = fleet.pauses.budgets()
    found = {labels: fleet.budget_of(labels[0]) for labels in opened if labels not in budgets}
    last = fleet.pauses.last()
    yield gauge(
        "caesura_pause_budget_seconds",
        "Budget of the open pause, else of the last one; if hosts differ, the most recent one.",
        _PAUSE,
        budgets | found,
    )
    yield gauge(
        "caesura_pause_last_seconds",
        "Longest pause of the last operation of each host, host monotonic clock; the maximum over the hosts.",
        _PAUSE,
        [(labels, pause.seconds) for labels, pause in last.items()],
    )
    yield gauge(
        "caesura_pause_last_budget_seconds",
        "Budget of the pause that caesura_pause_last_seconds reports.",
        _PAUSE,
        [(labels, pause.budget_s) for labels, pause in last.items()],
    )
    yield gauge(
        "caesura_pause_longest_seconds",
        "Longest pause since the exporter's start, host monotonic clock.",
        _PAUSE,
        fleet.pauses.longest(),
    )
    # An age rather than a time stamp: it depends on one monotonic clock, not on two wall clocks that may jump.
    yield gauge(
        "caesura_pause_open_seconds",
        "Seconds since the exporter received the start of the oldest pause whose end it has not received; "
        "0 if there is none. The method is unknown if the freeze itself was not received.",
        _PAUSE,
        dict.fromkeys(budgets, 0.0) | opened,
    )
    sets = sorted(fleet.census.sets.keys() | fleet.pauses.clashes.keys())
    yield gauge(
        "caesura_domains_paused",
        "Domains of a set in which a VM is paused, by the key of its rollout; must never exceed 1.",
        ("set",),
        [((name,), fleet.pauses.domains(name)) for name in sets],
    )
    yield Family(
        "caesura_domain_clashes",
        "VMs frozen while a VM of another domain of their set was paused; must never exceed 0.",
        "counter",
        ("set",),
        {(name,): fleet.pauses.clashes[name] for name in sets},
    )


def _pauses_by_host(fleet: FleetMetricsView, now_s: float) -> Iterator[Family]:
    """There are as many hosts times domains as VMs: only those that need attention are exported."""
    opened = fleet.pauses.on_hosts(now_s)
    yield gauge(
        "caesura_host_pause_open_seconds",
        "As caesura_pause_open_seconds, by host: only while a pause is open.",
        _HOST_PAUSE,
        [(labels, pause.open_s) for labels, pause in opened.items()],
    )
    yield gauge(
        "caesura_host_pause_budget_seconds",
        "Budget of the pause that caesura_host_pause_open_seconds reports.",
        _HOST_PAUSE,
        [
            (labels, fleet.budget_of(labels[0]) if pause.budget_s is None else pause.budget_s)
            for labels, pause in opened.items()
        ],
    )
    yield gauge(
        "caesura_host_pause_overrun_age_seconds",
        "Seconds since the exporter received the host's last pause that was longer than its budget; exported for half an hour.",
        _HOST_PAUSE,
        fleet.pauses.overran_s(now_s),
    )
    yield gauge(
        "caesura_host_guard_resume_age_seconds",
        "Seconds since the exporter received the last pause that the host's pause guard ended; exported for half an hour.",
        _HOST_PAUSE,
        fleet.pauses.guarded_s(now_s),
    )


def _vms(fleet: FleetMetricsView) -> Iterator[Family]:
    yield gauge(
        "caesura_vms",
        "VMs by state; impaired: running, but its host reports a problem with it.",
        ("set", "update_domain", "state"),
        fleet.census.states,
    )
    yield gauge(
        "caesura_agents",
        f"VM agents by presence; silent: should be online, but nothing received for {AGENT_SILENT_S:g} s.",
        ("set", "state"),
        fleet.census.agents,
    )


def _clocks(fleet: FleetMetricsView) -> Iterator[Family]:
    yield gauge(
        "caesura_vms_unsynced",
        "VMs whose clock could not be corrected, after their last pause or by their agent since.",
        ("set", "update_domain"),
        fleet.census.unsynced,
    )
    yield gauge(
        "caesura_vms_clock_step_refused",
        "VMs whose clock is so far off that their agent does not step it outside a resume.",
        ("set", "update_domain"),
        fleet.census.refused,
    )
    # A VM's name is not a label: the VM with the largest error represents its domain, with its sign.
    yield gauge(
        "caesura_clock_error_last_seconds",
        "Guest minus host clock at the last sync, of the VM of the domain that was off most.",
        ("set", "update_domain", "when"),
        fleet.census.worst_errors(),
    )
    yield gauge(
        "caesura_clock_bound_last_seconds",
        "How far the clock of caesura_clock_error_last_seconds after the sync might be off, by the rollout of its pause.",
        ("set", "update_domain"),
        fleet.census.bounds(),
    )


def _hosts(fleet: FleetMetricsView, now_s: float, foreign: Mapping[str, int]) -> Iterator[Family]:
    online: Values = {}
    silence_s: Values = {}
    guards: Values = {}
    busy: Values = {}
    installed: Values = {}
    foreign_vms: Values = {}
    for host, state in fleet.hosts.items():
        label = (host,)
        online[label] = 1.0 if state.online else 0.0
        silence_s[label] = now_s - state.received_s if now_s > state.received_s else 0.0
        foreign_vms[label] = foreign.get(host, 0)
        inventory = state.inventory
        if inventory is None:
            continue
        for each in _GUARD_STATES:
            guards[host, each] = 1.0 if each == inventory.guard else 0.0
        busy[label] = 1.0 if inventory.operation else 0.0
        for update in inventory.installed:
            if not update.vms:
                installed[host, update.update, update.version] = 1.0
    yield gauge("caesura_host_online", "1 while the host updater is on the bus, else 0.", ("host",), online)
    # A last will needs a broker: one that died with the host, or before it, does not publish it after its restart.
    yield gauge(
        "caesura_host_heard_seconds",
        "Seconds since the exporter last received a message of the host updater itself, which sends one every 20 s.",
        ("host",),
        silence_s,
    )
    yield gauge(
        "caesura_host_guard_state", "1 for the state of the host's pause guard.", ("host", "state"), guards
    )
    yield gauge(
        "caesura_update_info",
        "1 for an update that the whole host has in the defined version.",
        ("host", "update", "version"),
        installed,
    )
    yield gauge(
        "caesura_host_foreign_vms",
        "VMs that the host names in its inventory although they are not on record as its own.",
        ("host",),
        foreign_vms,
    )
    yield gauge("caesura_host_busy", "1 while an operation is under way on the host.", ("host",), busy)


def _others(fleet: FleetMetricsView, now_s: float) -> Iterator[Family]:
    yield gauge(
        "caesura_publisher_online",
        "1 while the metadata publisher is on the bus, else 0.",
        ("publisher",),
        [((name,), float(online)) for name, online in fleet.publishers.items()],
    )
    coordinator = fleet.coordinator
    yield number(
        "caesura_coordinator_online",
        "1 while the coordinator is on the bus, else 0.",
        float(coordinator is not None and coordinator.online),
    )
    if fleet.shares_store:
        coordinators = fleet.coordinators(now_s).values()
        yield number(
            "caesura_coordinators_standby",
            "Coordinators on the bus that share the leader's store and would take over from it.",
            sum(each.online and not each.leads for each in coordinators),
        )
        yield number(
            "caesura_coordinators_waiting",
            "Coordinators that wait for something else than their turn, such as their store: no rollout moves if the leader is one.",
            sum(
                each.online and bool(each.waits_for) and each.waits_for != "another coordinator leads"
                for each in coordinators
            ),
        )
    if fleet.coordinator_received_s is not None:
        yield number(
            "caesura_coordinator_heard_seconds",
            "Seconds since the exporter last received a message of the coordinator itself, which sends one every 20 s.",
            max(0.0, now_s - fleet.coordinator_received_s),
        )
    if coordinator is not None:
        yield number("caesura_coordinator_epoch", "Epoch of the coordinator.", coordinator.epoch)
