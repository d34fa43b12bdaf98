"""What is so now, and what is forgotten."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.parts import WholeRollout
from caesura_metrics_exporter.metrics.current_state import FleetMetricsView
from caesura_metrics_exporter.metrics.fleet_families import fleet_families
from caesura_testing.rollouts import wave_state, whole_rollout

AT = datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC)


def samples(fleet: FleetMetricsView, name: str, now_s: float = 0.0) -> dict[tuple[str, ...], float]:
    """Label values to value of one metric."""
    (family,) = [each for each in fleet_families(fleet, now_s) if each.name == name]
    return dict(family.values)


def fold(*messages: Message, fresh: bool = True, now_s: float = 0.0) -> FleetMetricsView:
    fleet = FleetMetricsView()
    for message in messages:
        fleet.take(message, now_s, fresh=fresh)
    return fleet


def inventory(host: str, *vms: str, state: m.VmState = "running") -> m.HostInventory:
    records = tuple(m.VmRecord(vm=vm, set="web", update_domain=1, state=state) for vm in vms)
    return m.HostInventory(host=host, driver="process", epoch=1, vms=records, guard="ready")


def frozen(vm: str = "web-1") -> m.VmFrozen:
    return m.VmFrozen(
        vm=vm, host="host-1", set="web", update_domain=1, operation="op1", method="freeze", budget_s=20, at=AT
    )


def resumed(vm: str = "web-1") -> m.VmResumed:
    return m.VmResumed(
        vm=vm,
        host="host-1",
        set="web",
        update_domain=1,
        operation="op1",
        method="freeze",
        pause_s=3,
        budget_s=20,
        within_budget=True,
        resumed_by="updater",
        at=AT,
    )


def synced(vm: str, *, ok: bool, before_s: float, after_s: float | None) -> m.VmClockSynced:
    return m.VmClockSynced(
        vm=vm,
        host="host-1",
        set="web",
        update_domain=1,
        synced=ok,
        by="agent",
        error_before_s=before_s,
        error_after_s=after_s,
        at=AT,
    )


def test_vms_are_counted_by_state_and_follow_pauses() -> None:
    fleet = fold(inventory("host-1", "web-1", "web-2"), frozen())
    assert samples(fleet, "caesura_vms") == {
        ("web", "1", "running"): 1,
        ("web", "1", "paused"): 1,
        ("web", "1", "stopped"): 0,
        ("web", "1", "unknown"): 0,
        ("web", "1", "impaired"): 0,
    }
    assert samples(fleet, "caesura_pause_budget_seconds") == {("web", "1", "freeze"): 20}
    fleet.take(resumed(), 0, fresh=True)
    assert samples(fleet, "caesura_vms")["web", "1", "paused"] == 0


def test_a_vm_whose_application_ended_does_not_count_as_running() -> None:
    (record,) = inventory("host-1", "web-1").vms
    dead = msgspec.structs.replace(record, state_detail="/bin/web was ended by SIGKILL")
    fleet = fold(msgspec.structs.replace(inventory("host-1", "web-1"), vms=(dead,)))
    assert samples(fleet, "caesura_vms")["web", "1", "running"] == 0
    assert samples(fleet, "caesura_vms")["web", "1", "impaired"] == 1
    fleet.take(frozen(), 0, fresh=True)
    assert samples(fleet, "caesura_vms")["web", "1", "paused"] == 1
    assert samples(fleet, "caesura_vms")["web", "1", "impaired"] == 0


def test_a_late_repetition_of_frozen_does_not_pause_anything() -> None:
    fleet = fold(inventory("host-1", "web-1"), frozen(), resumed())
    fleet.take(frozen(), 0, fresh=False)
    assert samples(fleet, "caesura_vms")["web", "1", "paused"] == 0


def test_a_vm_that_vanished_takes_its_series_with_it() -> None:
    fleet = fold(
        inventory("host-1", "web-1"),
        m.AgentPresence(vm="web-1", online=True, boot_id="b"),
        synced("web-1", ok=False, before_s=-9, after_s=None),
    )
    assert samples(fleet, "caesura_vms_unsynced") == {("web", "1"): 1}
    fleet.take(inventory("host-1"), 0, fresh=True)
    for name in ("caesura_vms", "caesura_vms_unsynced", "caesura_agents", "caesura_clock_error_last_seconds"):
        assert samples(fleet, name) == {}


def test_a_vm_that_moved_to_another_host_is_not_forgotten() -> None:
    fleet = fold(
        inventory("host-1", "web-1"),
        m.AgentPresence(vm="web-1", online=True, boot_id="b"),
        synced("web-1", ok=False, before_s=-9, after_s=None),
        inventory("host-2", "web-1"),
        inventory("host-1"),
    )
    assert samples(fleet, "caesura_agents") == {
        ("web", "online"): 1,
        ("web", "offline"): 0,
        ("web", "silent"): 0,
    }
    assert samples(fleet, "caesura_vms_unsynced") == {("web", "1"): 1}
    fleet.take(inventory("host-2"), 0, fresh=True)
    fleet.take(inventory("host-3", "web-1"), 0, fresh=True)
    assert samples(fleet, "caesura_agents")["web", "online"] == 0  # a new VM of the same name


def test_a_host_that_died_stays_until_what_the_broker_retains_of_it_is_removed() -> None:
    fleet = fold(
        inventory("host-1", "web-1"), m.HostPresence(host="host-1", online=False, instance="i"), frozen()
    )
    fleet.take(inventory("host-2", "web-2"), 500.0, fresh=True)
    assert samples(fleet, "caesura_host_online", 1e6) == {("host-1",): 0, ("host-2",): 0}
    assert samples(fleet, "caesura_pause_open_seconds", 1e6) == {("web", "1", "freeze"): 1e6}
    fleet.clear("caesura/v1/host/host-1/presence")
    assert set(samples(fleet, "caesura_host_online")) == {("host-1",), ("host-2",)}, "it may be back at once"
    fleet.clear("caesura/v1/host/host-1/inventory")
    assert set(samples(fleet, "caesura_host_online")) == {("host-2",)}
    assert samples(fleet, "caesura_pause_budget_seconds") == {}
    assert sum(samples(fleet, "caesura_vms").values()) == 1


def test_a_host_that_never_told_what_it_has_goes_with_its_presence() -> None:
    fleet = fold(m.HostPresence(host="host-1", online=False, instance="i"))
    fleet.clear("caesura/v1/host/host-1/presence")
    assert samples(fleet, "caesura_host_online") == {}


def test_the_worst_clock_speaks_for_the_domain_with_its_sign() -> None:
    fleet = fold(
        inventory("host-1", "web-1", "web-2", "web-3"),
        synced("web-1", ok=True, before_s=-9.1, after_s=0.001),
        synced("web-2", ok=True, before_s=-9.3, after_s=-0.002),
    )
    assert samples(fleet, "caesura_clock_error_last_seconds") == {
        ("web", "1", "after"): -0.002,
        ("web", "1", "before"): -9.3,
    }
    assert samples(fleet, "caesura_vms_unsynced") == {("web", "1"): 0}


def test_agents_by_presence() -> None:
    fleet = fold(inventory("host-1", "web-1", "web-2"), m.AgentPresence(vm="web-1", online=True, boot_id="b"))
    assert samples(fleet, "caesura_agents") == {
        ("web", "online"): 1,
        ("web", "offline"): 1,
        ("web", "silent"): 0,
    }


def wave(number: int, domain: int, status: m.WaveStatus) -> m.WaveState:
    return wave_state(wave=number, status=status, domains={"web": domain}, hosts=("host-1",), vms=("web-1",))


def rollout(name: str, status: m.RolloutStatus, *waves: m.WaveState, minute: int = 0) -> WholeRollout:
    return whole_rollout(
        rollout=name,
        update="kernel",
        status=status,
        policy=m.Policy(),
        sets=("web",),
        waves=waves,
        created_at=AT + timedelta(minutes=minute),
    )


def test_progress_of_the_rollout_that_holds_the_set() -> None:
    fleet = fold(
        rollout("new", "aborted", wave(0, 0, "cancelled"), minute=5),
        rollout(
            "held", "running", wave(0, 0, "completed"), wave(1, 1, "started"), wave(2, 2, "pending"), minute=1
        ),
        rollout("old", "completed", wave(0, 0, "completed")),
    )
    assert samples(fleet, "caesura_rollout_waves") == {("web",): 3}
    assert samples(fleet, "caesura_rollout_waves_completed") == {("web",): 1}
    status = samples(fleet, "caesura_rollout_status")
    assert {labels for labels, value in status.items() if value} == {("web", "running")}
    assert samples(fleet, "caesura_domain_wave_status") == {
        ("web", "0", "completed"): 6,
        ("web", "1", "started"): 3,
        ("web", "2", "pending"): 1,
    }
    counts = samples(fleet, "caesura_domains")
    assert (counts["web", "started"], counts["web", "failed"]) == (1, 0)
    assert samples(fleet, "caesura_rollouts")["running",] == 1


def test_two_waves_on_one_domain_show_the_more_telling_status() -> None:
    fleet = fold(
        rollout("r", "running", wave(0, 0, "completed"), wave(1, 0, "verifying"), wave(2, 0, "pending"))
    )
    assert samples(fleet, "caesura_domain_wave_status") == {("web", "0", "verifying"): 4}


def test_old_rollouts_do_not_pile_up() -> None:
    fleet = fold(*[rollout(f"r{i}", "completed", minute=i) for i in range(150)])
    assert samples(fleet, "caesura_rollouts")["completed",] == 100
    assert "r149" in fleet.rollouts.known


def document(incarnation: int, *statuses: str) -> m.SetDocument:
    events = tuple(
        m.ScheduledEvent(
            event_id=f"e{i}",
            event_type="Freeze",
            status="started" if status == "started" else "scheduled",
            resources=("web-1",),
            not_before=AT,
        )
        for i, status in enumerate(statuses)
    )
    return m.SetDocument(set="web", incarnation=incarnation, events=events)


def test_open_events_and_incarnation_of_the_newest_document() -> None:
    fleet = fold(document(4, "scheduled", "started"), document(3))
    assert samples(fleet, "caesura_events_open") == {
        ("web", "Freeze", "scheduled"): 1,
        ("web", "Freeze", "started"): 1,
    }
    assert samples(fleet, "caesura_document_incarnation") == {("web",): 4}


def test_a_replaced_coordinator_does_not_speak_for_the_new_one() -> None:
    fleet = fold(
        m.CoordinatorPresence(coordinator="new", epoch=2, online=True),
        m.CoordinatorPresence(coordinator="old", epoch=1, online=False),
    )
    assert samples(fleet, "caesura_coordinator_online") == {(): 1}
    assert samples(fleet, "caesura_coordinator_epoch") == {(): 2}


def test_the_last_will_of_a_coordinator_counts_though_it_knows_no_epoch() -> None:
    # The will is made before an epoch is claimed, and names the instance without what each start adds to it.
    will = m.CoordinatorPresence(coordinator="c", epoch=0, online=False)
    fleet = fold(m.CoordinatorPresence(coordinator="c-1f3a", epoch=2, online=True), will)
    assert samples(fleet, "caesura_coordinator_online") == {(): 0}
    assert samples(fleet, "caesura_coordinator_epoch") == {(): 2}, "nobody claimed another"
    fleet.take(m.CoordinatorPresence(coordinator="c-1f3a", epoch=2, online=True), 1.0, fresh=True)
    assert samples(fleet, "caesura_coordinator_online") == {(): 1}, "it was another one's: the leader says so"
    assert samples(fold(will), "caesura_coordinator_online") == {(): 0}


@pytest.mark.parametrize(
    ("topic", "metric"),
    [
        ("caesura/v1/host/host-1/inventory", "caesura_vms"),
        ("caesura/v1/metadata/m1/presence", "caesura_publisher_online"),
        ("caesura/v1/fleet/set/web/document", "caesura_document_incarnation"),
        ("caesura/v1/fleet/rollout/r/wave/0", ""),
        ("caesura/v1/fleet/rollout/r", "caesura_rollout_status"),
        ("not/ours", ""),
    ],
)
def test_a_cleared_topic_clears_its_series(topic: str, metric: str) -> None:
    fleet = fold(
        inventory("host-1", "web-1"),
        m.PublisherPresence(instance="m1", online=True),
        document(1),
        rollout("r", "running", wave(0, 0, "started")),
    )
    before = {family.name for family in fleet_families(fleet, 0.0) if family.values}
    fleet.clear(topic)
    after = {family.name for family in fleet_families(fleet, 0.0) if family.values}
    assert (metric in before - after) if metric else before == after


def test_an_event_that_nobody_starts_is_known_by_its_not_before() -> None:
    fleet = fold(document(1, "scheduled", "scheduled", "started"))
    assert samples(fleet, "caesura_event_not_before_timestamp_seconds") == {("web", "Freeze"): AT.timestamp()}
    fleet.take(document(2, "started"), 1.0, fresh=True)
    assert samples(fleet, "caesura_event_not_before_timestamp_seconds") == {}


def test_an_inventory_from_before_the_freeze_does_not_end_the_pause() -> None:
    """Facts and inventories go separate ways: this one was made when the operation had been accepted, not begun."""
    accepted = msgspec.structs.replace(inventory("host-1", "web-1"), operation="op1")
    fleet = fold(accepted, frozen(), accepted)
    assert samples(fleet, "caesura_pause_open_seconds", 5.0) == {("web", "1", "freeze"): 5.0}
    assert samples(fleet, "caesura_vms")[("web", "1", "paused")] == 1
    fleet.take(inventory("host-1", "web-1"), 6.0, fresh=True)
    assert samples(fleet, "caesura_vms")[("web", "1", "paused")] == 0
    assert not any(samples(fleet, "caesura_pause_open_seconds", 7.0).values())


def test_a_set_that_nobody_is_in_any_more_is_forgotten_but_not_at_once() -> None:
    fleet = fold(inventory("host-1", "web-1"), frozen(), resumed())
    assert samples(fleet, "caesura_pause_last_seconds")
    fleet.take(inventory("host-1"), 10.0, fresh=True)
    assert fleet.forget_empty_sets(900.0) == []
    fleet.take(inventory("host-2", "web-1"), 900.0, fresh=True)
    assert fleet.forget_empty_sets(1000.0) == [], "it moved"
    assert samples(fleet, "caesura_pause_last_seconds")
    fleet.take(inventory("host-2"), 1000.0, fresh=True)
    assert fleet.forget_empty_sets(1901.0) == ["web"]
    assert not samples(fleet, "caesura_pause_last_seconds")
    assert not samples(fleet, "caesura_pause_budget_seconds")


def test_coordinators_that_share_a_store_are_counted() -> None:
    one = m.CoordinatorStatus(coordinator="one", online=True, leads=True, epoch=2)
    two = m.CoordinatorStatus(
        coordinator="two", online=True, leads=False, waits_for="another coordinator leads"
    )
    gone = m.CoordinatorStatus(coordinator="three", online=False, leads=False)
    fleet = fold(one, two, gone)
    assert samples(fleet, "caesura_coordinators_standby") == {(): 1}
    assert samples(fleet, "caesura_coordinators_waiting") == {(): 0}
    fleet.take(msgspec.structs.replace(one, waits_for="the store"), 1.0, fresh=True)
    assert samples(fleet, "caesura_coordinators_waiting") == {(): 1}
    # Killed: its last will has the name of its settings, and no epoch.
    killed = m.CoordinatorPresence(coordinator="two", epoch=0, online=False)
    fleet.take(killed, 2.0, fresh=True)
    assert samples(fleet, "caesura_coordinators_standby") == {(): 0}
    fleet.take(two, 3.0, fresh=True)
    assert samples(fleet, "caesura_coordinators_standby") == {(): 1}, "it is back"
    known = {each.name for each in fleet_families(fold(), 0.0)}
    assert "caesura_coordinators_standby" not in known, "one with a store of its own says nothing of others"


def test_a_coordinator_that_is_not_announced_any_more_does_not_count() -> None:
    """Its status stays on the bus: it was killed before the exporter came, or together with the broker."""
    one = m.CoordinatorStatus(coordinator="one", online=True, leads=True, epoch=2)
    two = m.CoordinatorStatus(coordinator="two", online=True, leads=False, waits_for="the store, which hangs")
    fleet = fold(one, two)

    def counted(now_s: float) -> tuple[float, float]:
        standby, waiting = (
            samples(fleet, f"caesura_coordinators_{name}", now_s) for name in ("standby", "waiting")
        )
        return standby[()], waiting[()]

    assert counted(60.0) == (1, 1)
    fleet.take(one, 60.0, fresh=True)
    assert counted(80.0) == (0, 0)
    fleet.take(two, 81.0, fresh=True)
    assert counted(90.0) == (1, 1)
