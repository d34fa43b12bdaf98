"""How long ago hosts, coordinator and agents were heard: what a last will cannot tell when the broker was gone, too."""

from __future__ import annotations

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura_metrics_exporter.metrics.current_state import FleetMetricsView
from caesura_metrics_exporter.metrics.fleet_families import fleet_families


def samples(fleet: FleetMetricsView, name: str, now_s: float) -> dict[tuple[str, ...], float]:
    """Label values to value of one metric."""
    (family,) = [each for each in fleet_families(fleet, now_s) if each.name == name]
    return dict(family.values)


def fold(
    *messages: tuple[float, Message], fleet: FleetMetricsView | None = None, stored: bool = False
) -> FleetMetricsView:
    """A fleet that heard these messages, each at its second."""
    fleet = fleet or FleetMetricsView()
    for now_s, message in messages:
        fleet.take(message, now_s, fresh=True, stored=stored)
    return fleet


VM = m.VmRecord(vm="web-1", set="web", update_domain=1, state="running")
INVENTORY = m.HostInventory(host="host-1", driver="process", epoch=1, vms=(VM,), guard="ready")
AGENT = m.AgentPresence(vm="web-1", online=True, boot_id="b")
LEADER = m.CoordinatorPresence(coordinator="c-1f3a", epoch=2, online=True)


def test_a_host_is_heard_by_its_inventory_and_its_presence() -> None:
    fleet = fold((10.0, INVENTORY))
    assert samples(fleet, "caesura_host_heard_seconds", 15.0) == {("host-1",): 5.0}
    fold((20.0, m.HostPresence(host="host-1", online=True, instance="i")), fleet=fleet)
    assert samples(fleet, "caesura_host_heard_seconds", 21.0) == {("host-1",): 1.0}


def test_a_last_will_is_no_word_of_the_host() -> None:
    fleet = fold((10.0, INVENTORY), (50.0, m.HostPresence(host="host-1", online=False, instance="i")))
    assert samples(fleet, "caesura_host_heard_seconds", 51.0) == {("host-1",): 41.0}


def test_what_the_broker_had_stored_is_no_word_of_anybody_but_the_first() -> None:
    everything = (INVENTORY, m.HostPresence(host="host-1", online=True, instance="i"), LEADER, AGENT)
    fleet = fold(*((10.0, each) for each in everything), stored=True)
    fold(*((400.0, each) for each in everything), fleet=fleet, stored=True)
    assert samples(fleet, "caesura_host_heard_seconds", 401.0) == {("host-1",): 391.0}
    assert samples(fleet, "caesura_coordinator_heard_seconds", 401.0) == {(): 391.0}
    assert samples(fleet, "caesura_agents", 401.0)["web", "silent"] == 1


def test_the_coordinator_is_heard_by_what_it_says_of_itself() -> None:
    assert [
        each
        for each in fleet_families(FleetMetricsView(), 5.0)
        if each.name == "caesura_coordinator_heard_seconds"
    ] == []
    fleet = fold((10.0, LEADER), (25.0, LEADER))
    assert samples(fleet, "caesura_coordinator_heard_seconds", 30.0) == {(): 5.0}
    fold((40.0, m.CoordinatorPresence(coordinator="c", epoch=0, online=False)), fleet=fleet)
    fold((41.0, m.CoordinatorPresence(coordinator="old", epoch=1, online=True)), fleet=fleet)
    assert samples(fleet, "caesura_coordinator_heard_seconds", 45.0) == {(): 20.0}, "neither was the leader"


def test_an_agent_that_is_online_and_says_nothing_is_silent() -> None:
    fleet = fold((0.0, INVENTORY), (0.0, AGENT))
    assert samples(fleet, "caesura_agents", 300.0) == {
        ("web", "online"): 1,
        ("web", "offline"): 0,
        ("web", "silent"): 0,
    }
    assert samples(fleet, "caesura_agents", 301.0) == {
        ("web", "online"): 0,
        ("web", "offline"): 0,
        ("web", "silent"): 1,
    }
    fold((302.0, AGENT), fleet=fleet)
    assert samples(fleet, "caesura_agents", 303.0)["web", "online"] == 1
    fold((304.0, m.AgentPresence(vm="web-1", online=False, boot_id="b")), fleet=fleet)
    assert samples(fleet, "caesura_agents", 900.0)["web", "offline"] == 1


def test_a_clock_that_went_back_makes_no_negative_age() -> None:
    fleet = fold((10.0, INVENTORY), (10.0, LEADER))
    assert samples(fleet, "caesura_host_heard_seconds", 9.0) == {("host-1",): 0.0}
    assert samples(fleet, "caesura_coordinator_heard_seconds", 9.0) == {(): 0.0}
