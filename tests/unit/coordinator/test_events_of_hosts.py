"""A wave announces one event for each set and host: the smallest groups of VMs that can be acted on independently."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caesura.contract import messages as m
from caesura.contract.codec import MAX_PAYLOAD_BYTES, size_bytes
from caesura.lifecycle.document import version_of
from caesura_coordinator.authority import Authority
from caesura_coordinator.commands import command_for, due_operations
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Abort, Approve, Resume, Tick
from caesura_coordinator.plan import make_plan
from caesura_coordinator.plan_waves import MOST_EVENTS
from caesura_coordinator.published_state import largest_states, wave_state
from caesura_coordinator.records import Rollout, Wave, WaveEvent, new_rollout
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.store import CoordinatorStore
from caesura_testing.refold import refold

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)
_ENDS = {"completed", "cancelled", "failed"}


class Desk:
    """A rollout over two VMs of web on h1, one on h2, and one of db on h2: all in domain 0, so in one wave."""

    def __init__(self, path: str, fleet: FleetLookup, authority: Authority) -> None:
        self.path = path
        self.fleet = fleet
        self.authority = authority
        self.now = T0
        self.repository = RolloutRepository(CoordinatorStore(path), T0)
        policy = m.Policy(notice_s=60.0, verify_timeout_s=20.0)
        plan = make_plan(fleet.snapshot(), update="patch", selection=m.Selection(), policy=policy)
        assert len(plan.waves) == 1
        rollout = new_rollout("r", plan, policy=policy, fence_hosts=("h1", "h2"), requested_by="ops", now=T0)
        self.repository.add(rollout, "ops", m.RequestAnswered(request="q", accepted=True))

    @property
    def rollout(self) -> Rollout:
        return self.repository.rollouts["r"]

    @property
    def wave(self) -> Wave:
        return self.rollout.waves[0]

    def wave_is(self, status: m.WaveStatus) -> bool:
        return self.wave.status == status

    def event(self, set_name: str, host: str) -> WaveEvent:
        (found,) = (each for each in self.wave.events if (each.set, each.host) == (set_name, host))
        return found

    def give(self, *received: Any, after_s: float = 0.0) -> Desk:
        self.now += timedelta(seconds=after_s)
        for each in received:
            self.repository.step(self.rollout, each, self.fleet, self.authority, self.now)
        return self

    def announced(self) -> Desk:
        self.give(Tick())
        for event in self.wave.events:
            self.give(*(m.VmReady(vm=vm, event_id=event.event_id, ready=True) for vm in event.resources))
        return self

    def approve(self, *events: WaveEvent) -> Desk:
        return self.give(*(Approve(event_id=each.event_id, by=each.resources[0]) for each in events))

    def started(self) -> Desk:
        self.announced().approve(*self.wave.events)
        assert self.wave.status == "started"
        return self

    def report(self, host: str, status: m.OperationStatus = "completed") -> Desk:
        (operation,) = (each.operation for each in self.wave.operations if each.host == host)
        results = tuple(
            m.VmResult(vm=vm.vm, set=vm.set, update_domain=0, state="running", frozen=True, pause_s=2.0)
            for vm in self.wave.vms
            if vm.host == host
        )
        return self.give(
            m.OperationReported(
                operation=operation, host=host, epoch=1, status=status, vms=results, at=self.now
            )
        )

    def clocks(self, *vms: str) -> Desk:
        operations = {each.host: each.operation for each in self.wave.operations}
        for vm in (each for each in self.wave.vms if each.vm in vms):
            self.give(
                m.VmClockSynced(
                    vm=vm.vm,
                    host=vm.host,
                    set=vm.set,
                    update_domain=0,
                    operation=operations[vm.host],
                    synced=True,
                    by="agent",
                    error_after_s=0.001,
                    at=self.now,
                )
            )
        return self

    def statuses(self) -> dict[tuple[str, str], str]:
        return {(each.set, each.host): each.status for each in self.wave.events}

    def sent(self, *kinds: type) -> list[Any]:
        """What the outbox has of these types, taken out of it."""
        kept = self.repository.store.outbox.load()
        self.repository.store.outbox.remove([each.event_id for each in kept])
        return [each.read() for each in kept if each.payload and isinstance(each.read(), kinds)]


@pytest.fixture
def desk(
    tmp_path: Path,
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> Desk:
    both = fleet(host("h1", build("w1"), build("w2")), host("h2", build("w3"), build("d1", "db")))
    return Desk(str(tmp_path / "c.sqlite"), both, authority)


def test_each_host_of_a_set_has_an_event_with_its_own_id_and_vms(desk: Desk) -> None:
    desk.give(Tick())
    found = {(each.set, each.host): each.resources for each in desk.wave.events}
    assert found == {("web", "h1"): ("w1", "w2"), ("web", "h2"): ("w3",), ("db", "h2"): ("d1",)}
    assert len({each.event_id for each in desk.wave.events}) == 3
    (web,) = (each for each in desk.sent(m.SetDocument) if each.set == "web")
    assert web.incarnation == 2, "one change: the first document had 1"
    assert [(each.host, each.resources) for each in web.events] == [("h1", ("w1", "w2")), ("h2", ("w3",))]
    assert {each.not_before for each in web.events} == {T0 + timedelta(seconds=60)}


def test_the_wave_waits_for_the_approval_of_every_event(desk: Desk) -> None:
    desk.announced().approve(desk.event("web", "h1"), desk.event("db", "h2")).give(Tick())
    assert desk.wave_is("scheduled")
    assert not list(due_operations(desk.rollout, desk.authority))
    state = wave_state("r", desk.wave)
    assert (state.event_count, state.approved_count, state.approved) == (3, 2, ("db",))
    assert state.events == {
        "db": desk.event("db", "h2").event_id,
        "web": desk.event("web", "h1").event_id,
    }
    desk.give(Approve(event_id=desk.event("web", "h2").event_id, by="w1"))
    assert desk.wave_is("started"), "any VM of the set may approve"


def test_many_approvals_publish_the_wave_once(desk: Desk) -> None:
    desk.announced().sent()
    desk.approve(desk.event("web", "h1"), desk.event("db", "h2"))
    assert not desk.sent(m.WaveState, m.RolloutState)
    desk.give(Tick()).give(Tick())
    (state,) = desk.sent(m.WaveState)
    assert state.approved_count == 2
    before = desk.rollout
    desk.repository.store.database.close()
    desk.repository = RolloutRepository(CoordinatorStore(desk.path), desk.now)
    assert [each.approved_by for each in desk.wave.events] == [
        each.approved_by for each in before.waves[0].events
    ]


def test_a_command_names_the_event_of_its_own_host(desk: Desk) -> None:
    desk.started()
    due = [
        command_for(desk.rollout, each, desk.authority)
        for each in due_operations(desk.rollout, desk.authority)
    ]
    named = {
        target.vm: target.event_id
        for each in due
        if isinstance(each, m.StartOperation)
        for target in each.targets
    }
    assert named == {vm: each.event_id for each in desk.wave.events for vm in each.resources}


def test_workloads_see_all_events_of_a_wave_started_at_one_incarnation(desk: Desk) -> None:
    desk.announced().approve(desk.event("web", "h1"), desk.event("db", "h2"))
    desk.sent()
    desk.approve(desk.event("web", "h2"))
    facts = [each for each in desk.sent(m.EventChanged) if each.set == "web"]
    assert [(each.host, each.status, each.incarnation) for each in facts] == [
        ("h1", "started", 3),
        ("h2", "started", 3),
    ]


def test_a_host_that_is_verified_earlier_has_its_events_completed_earlier(desk: Desk) -> None:
    desk.started().report("h1").clocks("w1").give(Tick())
    assert set(desk.statuses().values()) == {"started"}, "the clock of w2 is not known yet"
    desk.clocks("w2").give(Tick())
    assert desk.statuses() == {("web", "h1"): "completed", ("web", "h2"): "started", ("db", "h2"): "started"}
    assert desk.wave_is("started"), "the wave waits for all"
    desk.report("h2").clocks("w3", "d1")
    assert desk.wave_is("completed")
    assert set(desk.statuses().values()) == {"completed"}
    ends = [each for each in desk.sent(m.EventChanged) if each.status in _ENDS]
    assert len(ends) == len({each.event_id for each in ends}) == 3, "each ends once"


@pytest.mark.parametrize("wrong", ["paused", "agent away"])
def test_an_event_does_not_complete_before_its_vms_are_healthy(wrong: str, desk: Desk) -> None:
    """Workloads take its removal for the end of the maintenance."""
    desk.started().report("h1").clocks("w1", "w2")
    whole = desk.fleet
    inventory = whole.inventories["h1"]
    changed: Any = m.AgentPresence(vm="w2", online=False, boot_id="b")
    if wrong == "paused":
        vms = (inventory.vms[0], msgspec.structs.replace(inventory.vms[1], state="paused"))
        changed = msgspec.structs.replace(inventory, vms=vms)
    desk.fleet = FleetLookup(refold(whole.state, changed))
    desk.give(Tick())
    assert desk.statuses()["web", "h1"] == "started"
    desk.fleet = whole
    desk.give(Tick())
    assert desk.statuses()["web", "h1"] == "completed"


def test_a_halt_fails_only_what_is_still_open_and_a_resume_announces_only_that(desk: Desk) -> None:
    desk.started().report("h1").clocks("w1", "w2").give(Tick()).report("h2", "failed")
    assert desk.rollout.status == "halted"
    assert desk.statuses() == {("web", "h1"): "completed", ("web", "h2"): "failed", ("db", "h2"): "failed"}
    assert not any(each.events for each in desk.repository.documents.values())
    before = {each.event_id for each in desk.wave.events}
    desk.give(Resume()).give(Tick())
    assert [(each.set, each.host) for each in desk.wave.events] == [("db", "h2"), ("web", "h2")]
    assert not before & {each.event_id for each in desk.wave.events}


def test_an_abort_ends_all_events(desk: Desk) -> None:
    desk.announced().give(Abort())
    assert set(desk.statuses().values()) == {"cancelled"}
    assert not any(each.events for each in desk.repository.documents.values())


def test_a_restart_in_the_middle_repeats_no_incarnation_and_loses_no_event(desk: Desk) -> None:
    desk.started().report("h1").clocks("w1", "w2").give(Tick())
    before = desk.repository.documents["web"]
    desk.repository.store.database.close()
    desk.repository = RolloutRepository(CoordinatorStore(desk.path), desk.now)
    assert desk.repository.documents["web"] == before
    assert [each.host for each in before.events] == ["h2"]
    desk.report("h2").clocks("w3", "d1")
    assert version_of(desk.repository.documents["web"]) > version_of(before)
    assert set(desk.statuses().values()) == {"completed"}


def test_a_wave_that_was_announced_before_events_had_hosts_is_finished_as_it_began(desk: Desk) -> None:
    """Version 0.1.0 had one event for all hosts of a set, and its store is read by this one."""
    desk.give(Tick())
    of_set = (
        WaveEvent(set="db", event_id="E-DB", resources=("d1",)),
        WaveEvent(set="web", event_id="E-WEB", resources=("w1", "w2", "w3")),
    )
    old = msgspec.structs.replace(desk.rollout, waves=(msgspec.structs.replace(desk.wave, events=of_set),))
    desk.repository.store.database.close()
    desk.repository = RolloutRepository(CoordinatorStore(":memory:"), desk.now)
    desk.repository.add(old, "ops", m.RequestAnswered(request="q", accepted=True))
    with desk.repository.store.transaction():
        for each in of_set:
            shown = m.ScheduledEvent(
                event_id=each.event_id,
                event_type="Freeze",
                status="scheduled",
                resources=each.resources,
                not_before=T0 + timedelta(seconds=60),
            )
            document = m.SetDocument(set=each.set, incarnation=5, events=(shown,))
            desk.repository._documents.replace(document)
    for each in of_set:
        desk.give(*(m.VmReady(vm=vm, event_id=each.event_id, ready=True) for vm in each.resources))
    desk.approve(*of_set)
    assert desk.wave_is("started")
    desk.report("h1").clocks("w1", "w2").give(Tick())
    assert set(desk.statuses().values()) == {"started"}, "it ends with the last of its hosts"
    desk.report("h2").clocks("w3", "d1")
    assert set(desk.statuses().values()) == {"completed"}


def test_a_wave_has_no_more_hosts_of_a_set_than_its_document_can_show(
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
) -> None:
    count = MOST_EVENTS + 3
    many = fleet(*(host(f"host-{number:04}", build(f"web-{number:04}")) for number in range(count)))
    policy = m.Policy()
    plan = make_plan(many.snapshot(), update="patch", selection=m.Selection(), policy=policy)
    assert [len(wave.hosts) for wave in plan.waves] == [MOST_EVENTS, 3]
    made = new_rollout("r", plan, policy=policy, fence_hosts=(), requested_by="ops", now=T0)
    documents = [each for each in largest_states(made) if isinstance(each, m.SetDocument)]
    assert [len(each.events) for each in documents] == [MOST_EVENTS, 3]
    assert all(size_bytes(each) <= MAX_PAYLOAD_BYTES / 4 for each in documents)
