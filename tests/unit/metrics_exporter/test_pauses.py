"""Open pauses and their age, the last pauses, domains that met, events and waves in time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Literal

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.parts import WholeRollout
from caesura_metrics_exporter.metrics.current_state import FleetMetricsView
from caesura_metrics_exporter.metrics.fleet_families import fleet_families
from caesura_testing.rollouts import wave_state, whole_rollout

AT = datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC)
WEB = ("web", "1", "freeze")
ON_HOST = ("web", "1", "host-1", "freeze")


def samples(fleet: FleetMetricsView, name: str, now_s: float = 0.0) -> dict[tuple[str, ...], float]:
    """Label values to value of one metric."""
    (family,) = [each for each in fleet_families(fleet, now_s) if each.name == name]
    return dict(family.values)


def fold(*messages: tuple[float, Message], fleet: FleetMetricsView | None = None) -> FleetMetricsView:
    """A fleet that heard these messages, each at its second."""
    fleet = fleet or FleetMetricsView()
    for now_s, message in messages:
        fleet.take(message, now_s, fresh=True)
    return fleet


def frozen(vm: str, domain: int = 1, operation: str = "op1", budget_s: float = 20) -> m.VmFrozen:
    return m.VmFrozen(
        vm=vm,
        host=f"host-{domain}",
        set="web",
        update_domain=domain,
        operation=operation,
        method="freeze",
        budget_s=budget_s,
        at=AT,
    )


def resumed(
    vm: str,
    pause_s: float,
    operation: str = "op1",
    *,
    host: str = "host-1",
    budget_s: float = 20,
    by: Literal["updater", "guard"] = "updater",
) -> m.VmResumed:
    return m.VmResumed(
        vm=vm,
        host=host,
        set="web",
        update_domain=1,
        operation=operation,
        method="freeze",
        pause_s=pause_s,
        budget_s=budget_s,
        within_budget=pause_s <= budget_s,
        resumed_by=by,
        at=AT,
    )


def inventory(domain: int, *vms: str, state: m.VmState = "running") -> m.HostInventory:
    records = tuple(
        m.VmRecord(vm=vm, set="web", update_domain=domain, fault_domain=0, state=state) for vm in vms
    )
    return m.HostInventory(host=f"host-{domain}", driver="process", epoch=1, vms=records, guard="ready")


def test_the_oldest_open_pause_speaks_and_ends_with_its_vm() -> None:
    fleet = fold((10.0, frozen("web-1")), (12.0, frozen("web-2")))
    assert samples(fleet, "caesura_pause_open_seconds", 15.0) == {WEB: 5.0}
    fold((16.0, resumed("web-1", 6)), fleet=fleet)
    assert samples(fleet, "caesura_pause_open_seconds", 17.0) == {WEB: 5.0}
    fold((18.0, resumed("web-2", 6)), fleet=fleet)
    assert samples(fleet, "caesura_pause_open_seconds", 19.0) == {WEB: 0.0}


def test_a_clock_that_went_back_makes_no_negative_age() -> None:
    assert samples(fold((10.0, frozen("web-1"))), "caesura_pause_open_seconds", 9.0) == {WEB: 0.0}


def test_an_inventory_ends_a_pause_whose_end_was_missed_and_no_other() -> None:
    fleet = fold((0.0, frozen("web-1")), (1.0, inventory(1, "web-1", state="paused")))
    assert samples(fleet, "caesura_pause_open_seconds", 2.0) == {WEB: 2.0}
    fold((3.0, inventory(1, "web-1")), fleet=fleet)
    assert samples(fleet, "caesura_pause_open_seconds", 4.0) == {WEB: 0.0}


def test_a_host_or_vm_that_is_gone_takes_its_pauses_along() -> None:
    fleet = fold((0.0, inventory(1, "web-1")), (0.0, frozen("web-1")))
    fold((1.0, inventory(1)), fleet=fleet)
    assert samples(fleet, "caesura_pause_open_seconds", 2.0) == {WEB: 0.0}
    fold((2.0, frozen("web-2")), (3.0, resumed("web-3", 3)), fleet=fleet)
    fleet.forget_host("host-1")
    assert samples(fleet, "caesura_pause_open_seconds", 3.0) == {}
    assert samples(fleet, "caesura_pause_last_seconds") == {}
    assert samples(fleet, "caesura_pause_budget_seconds") == {}
    # The histogram goes on with the set, and no quantile of it may be cut at another host's longest.
    assert samples(fleet, "caesura_pause_longest_seconds") == {WEB: 3.0}


def test_the_longest_pause_of_the_newest_operation_counts() -> None:
    fleet = fold((0.0, resumed("web-1", 3)), (0.0, resumed("web-2", 5)), (0.0, resumed("web-3", 4)))
    assert samples(fleet, "caesura_pause_last_seconds") == {WEB: 5.0}
    fold((1.0, resumed("web-1", 2, "op2")), fleet=fleet)
    assert samples(fleet, "caesura_pause_last_seconds") == {WEB: 2.0}
    assert samples(fleet, "caesura_pause_longest_seconds") == {WEB: 5.0}


def test_a_host_is_named_only_while_a_pause_of_it_is_open_with_its_own_budget() -> None:
    here, there = frozen("web-1", budget_s=8), msgspec.structs.replace(frozen("web-2"), host="host-9")
    fleet = fold((10.0, here), (12.0, there))
    far = ("web", "1", "host-9", "freeze")
    assert samples(fleet, "caesura_host_pause_open_seconds", 15.0) == {ON_HOST: 5.0, far: 3.0}
    assert samples(fleet, "caesura_host_pause_budget_seconds", 15.0) == {ON_HOST: 8.0, far: 20.0}
    assert samples(fleet, "caesura_pause_open_seconds", 15.0) == {WEB: 5.0}
    assert samples(fleet, "caesura_pause_budget_seconds", 15.0) == {WEB: 20.0}, "the most recent one"
    fold((16.0, resumed("web-1", 6)), fleet=fleet)
    assert samples(fleet, "caesura_host_pause_open_seconds", 17.0) == {far: 5.0}
    fleet.forget_host("host-9")
    assert samples(fleet, "caesura_host_pause_open_seconds", 17.0) == {}
    assert samples(fleet, "caesura_host_pause_budget_seconds", 17.0) == {}


def test_a_host_is_named_for_half_an_hour_after_it_overran_or_needed_its_guard() -> None:
    late, guarded = "caesura_host_pause_overrun_age_seconds", "caesura_host_guard_resume_age_seconds"
    fleet = fold((0.0, resumed("web-1", 5)))
    assert samples(fleet, late) == samples(fleet, guarded) == {}, "nothing is wrong with it"
    fold((10.0, resumed("web-2", 21)), (20.0, resumed("web-3", 3, host="host-2", by="guard")), fleet=fleet)
    far = ("web", "1", "host-2", "freeze")
    assert samples(fleet, late, 30.0) == {ON_HOST: 20.0}
    assert samples(fleet, guarded, 30.0) == {far: 10.0}
    fold((1000.0, resumed("web-2", 22, "op2")), fleet=fleet)
    assert samples(fleet, late, 1811.0) == {ON_HOST: 811.0}, "of the last one"
    assert samples(fleet, guarded, 1821.0) == {}
    assert samples(fleet, late, 2801.0) == {}
    fold((2900.0, resumed("web-2", 22, "op3")), fleet=fleet)
    fleet.forget_host("host-1")
    assert samples(fleet, late, 2901.0) == {}


def test_the_hosts_longest_pauses_do_not_hide_each_other() -> None:
    """Operations of one wave come mixed: each host's own last one counts, and of the hosts the longest."""
    near, far = resumed("web-1", 3), resumed("web-9", 5, "op2", host="host-2", budget_s=6)
    fleet = fold((0.0, near), (0.0, far), (1.0, resumed("web-2", 4)))
    assert samples(fleet, "caesura_pause_last_seconds") == {WEB: 5.0}
    assert samples(fleet, "caesura_pause_last_budget_seconds") == {WEB: 6.0}, "of that pause"
    fleet.forget_host("host-2")
    assert samples(fleet, "caesura_pause_last_seconds") == {WEB: 4.0}
    assert samples(fleet, "caesura_pause_last_budget_seconds") == {WEB: 20.0}


def test_the_budget_used_is_that_of_the_pause_and_not_of_the_next_one() -> None:
    fleet = fold((0.0, frozen("web-1")), (3.0, resumed("web-1", 3)), (9.0, frozen("web-1", budget_s=4)))
    assert samples(fleet, "caesura_pause_budget_seconds") == {WEB: 4.0}
    assert samples(fleet, "caesura_pause_last_seconds") == {WEB: 3.0}
    assert samples(fleet, "caesura_pause_last_budget_seconds") == {WEB: 20.0}


FOUND = ("web", "1", "unknown")


def test_a_vm_that_is_found_paused_is_in_a_pause_since_then() -> None:
    # The exporter was started in mid-pause: the freeze was told before its time.
    fleet = fold((10.0, inventory(1, "web-1", state="paused")), (30.0, inventory(1, "web-1", state="paused")))
    assert samples(fleet, "caesura_pause_open_seconds", 45.0) == {FOUND: 35.0}
    assert samples(fleet, "caesura_pause_budget_seconds") == {FOUND: m.MAX_BUDGET_S}, "no pause may be longer"
    fold((46.0, rollout(budget_s=6.0)), fleet=fleet)
    assert samples(fleet, "caesura_pause_budget_seconds") == {FOUND: 6.0}
    fold((50.0, resumed("web-1", 50)), fleet=fleet)
    assert samples(fleet, "caesura_pause_open_seconds", 51.0) == {WEB: 0.0}
    assert samples(fleet, "caesura_pause_budget_seconds") == {WEB: 20.0}


def test_what_is_known_only_from_an_inventory_is_not_held_against_a_fact() -> None:
    # Facts of the past come after the inventories of now, when the exporter was away.
    fleet = fold((0.0, inventory(1, "web-1")), (0.0, inventory(2, "web-9", state="paused")))
    fold((1.0, frozen("web-1")), fleet=fleet)
    assert samples(fleet, "caesura_domains_paused") == {("web",): 1.0}
    assert samples(fleet, "caesura_domain_clashes") == {("web",): 0.0}
    fold((2.0, frozen("web-9", domain=2)), fleet=fleet)
    assert samples(fleet, "caesura_domains_paused") == {("web",): 2.0}
    assert samples(fleet, "caesura_domain_clashes") == {("web",): 1.0}


def test_two_domains_that_are_found_paused_are_two() -> None:
    fleet = fold((0.0, inventory(1, "web-1", state="paused")), (0.0, inventory(2, "web-9", state="paused")))
    assert samples(fleet, "caesura_domains_paused") == {("web",): 2.0}


def test_two_domains_that_meet_are_counted_however_short_it_was() -> None:
    fleet = fold((0.0, inventory(1, "web-1", "web-2")), (0.0, inventory(2, "web-9")))
    assert samples(fleet, "caesura_domain_clashes") == {("web",): 0.0}, "known from zero on"
    fold((1.0, frozen("web-1")), (1.0, frozen("web-2")), fleet=fleet)
    assert samples(fleet, "caesura_domains_paused") == {("web",): 1.0}
    assert samples(fleet, "caesura_domain_clashes") == {("web",): 0.0}
    fold((2.0, frozen("web-9", domain=2)), fleet=fleet)
    assert samples(fleet, "caesura_domains_paused") == {("web",): 2.0}
    fold((2.1, resumed("web-1", 1)), (2.1, resumed("web-2", 1)), (2.2, resumed("web-9", 0.2)), fleet=fleet)
    assert samples(fleet, "caesura_domains_paused") == {("web",): 0.0}
    assert samples(fleet, "caesura_domain_clashes") == {("web",): 1.0}


def rollout(
    *waves: m.WaveState,
    key: m.DomainKey = "update_domain",
    ended_at: datetime | None = None,
    budget_s: float = m.MAX_BUDGET_S,
) -> WholeRollout:
    return whole_rollout(
        rollout="r1",
        update="patch",
        status="running" if ended_at is None else "completed",
        policy=m.Policy(domain_key=key, clock_bound_s=0.25, budget_s=budget_s),
        sets=("web",),
        waves=waves,
        created_at=AT,
        ended_at=ended_at,
    )


def test_a_rollout_by_fault_domain_may_pause_two_update_domains_of_one_fault_domain() -> None:
    fleet = fold((0.0, rollout(key="fault_domain")))
    fold((0.0, inventory(1, "web-1")), (0.0, inventory(2, "web-9")), fleet=fleet)
    fold((1.0, frozen("web-1")), (1.0, frozen("web-9", domain=2)), fleet=fleet)
    assert samples(fleet, "caesura_domains_paused") == {("web",): 1.0}
    assert samples(fleet, "caesura_domain_clashes") == {("web",): 0.0}


def document(incarnation: int, status: Literal["scheduled", "started"], *events: str) -> m.SetDocument:
    return m.SetDocument(
        set="web",
        incarnation=incarnation,
        events=tuple(
            m.ScheduledEvent(
                event_id=each, event_type="Freeze", status=status, resources=("web-1",), not_before=AT
            )
            for each in events
        ),
    )


def test_an_event_ages_in_its_status_whatever_else_changes_in_the_document() -> None:
    fleet = fold((0.0, document(1, "scheduled", "e1")), (5.0, document(2, "scheduled", "e1", "e2")))
    assert samples(fleet, "caesura_event_open_seconds", 8.0) == {("web", "Freeze", "scheduled"): 8.0}
    fold((9.0, document(3, "started", "e1")), fleet=fleet)
    assert samples(fleet, "caesura_event_open_seconds", 11.0) == {("web", "Freeze", "started"): 2.0}
    fold((12.0, document(4, "started")), fleet=fleet)
    assert samples(fleet, "caesura_event_open_seconds", 13.0) == {}


def wave(
    number: int, domain: int, status: m.WaveStatus, begun_s: float, ended_s: float | None
) -> m.WaveState:
    return wave_state(
        wave=number,
        status=status,
        domains={"web": domain},
        hosts=("host-1",),
        vms=("web-1",),
        started_at=AT + timedelta(seconds=begun_s),
        ended_at=None if ended_s is None else AT + timedelta(seconds=ended_s),
    )


def test_when_rollout_and_waves_began_and_ended() -> None:
    waves = (wave(0, 0, "completed", 1, 9), wave(1, 1, "failed", 10, 19), wave(2, 1, "started", 30, None))
    at = AT.timestamp()
    running = fold((0.0, rollout(*waves)))
    assert samples(running, "caesura_rollout_created_timestamp_seconds") == {("web",): at}
    assert samples(running, "caesura_rollout_ended_timestamp_seconds") == {}
    assert samples(running, "caesura_rollout_clock_bound_seconds") == {("web",): 0.25}
    assert samples(running, "caesura_wave_started_timestamp_seconds") == {
        ("web", "0"): at + 1,
        ("web", "1"): at + 30,
    }
    assert samples(running, "caesura_wave_ended_timestamp_seconds") == {
        ("web", "0", "completed"): at + 9,
        ("web", "1", "failed"): at + 19,
    }
    over = fold((0.0, rollout(*waves, ended_at=AT + timedelta(seconds=60))))
    assert samples(over, "caesura_rollout_ended_timestamp_seconds") == {("web",): at + 60}
