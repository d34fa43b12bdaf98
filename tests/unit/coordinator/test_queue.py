"""A rollout that waits for others: announced at once, started when they have ended, never beside them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura.contract import messages as m
from caesura.lifecycle.document import version_of
from caesura_coordinator.authority import Authority
from caesura_coordinator.commands import due_operations
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Abort, Approve, Resume, Tick
from caesura_coordinator.not_before import expected_end, first_not_before, whole_second
from caesura_coordinator.plan import make_plan, sets_of
from caesura_coordinator.published_state import rollout_state, wave_state
from caesura_coordinator.records import Rollout, Wave, WaveEvent, new_rollout
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.store import CoordinatorStore
from caesura_testing.refold import refold

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)
_NOTICE_S = 100.0


class Desk:
    """A front rollout over web (w1 in domain 0 on h1, w2 in domain 1 on h2), and those that wait behind it."""

    def __init__(self, path: str, fleet: FleetLookup, authority: Authority) -> None:
        self.path = path
        self.fleet = fleet
        self.authority = authority
        self.now = T0
        self.repository = RolloutRepository(CoordinatorStore(path), T0)
        self.order("front")

    def order(self, name: str, *sets: str, notice_s: float = _NOTICE_S) -> Rollout:
        """As the service does it: a freeze on demand of these sets (web), queued behind what holds them."""
        policy = m.Policy(notice_s=notice_s, verify_timeout_s=20.0)
        plan = make_plan(
            self.fleet.snapshot(),
            update="",
            selection=m.Selection(sets=sets or ("web",)),
            policy=policy,
            hold_s=2.0,
        )
        assert not plan.refusals
        ahead = self.repository.holding_or_waiting(sets_of(plan))
        rollout = new_rollout(
            name,
            plan,
            policy=policy,
            fence_hosts=tuple(sorted(self.fleet.hosts_of(sets_of(plan)))),
            requested_by="ops",
            now=self.now,
            queued_behind=ahead[-1].id if ahead else "",
        )
        self.repository.add(rollout, "ops", m.RequestAnswered(request=name, accepted=True))
        return self.give(name, Tick())

    def rollout(self, name: str) -> Rollout:
        return self.repository.rollouts[name]

    def wave(self, name: str) -> Wave:
        wave = self.rollout(name).current
        assert wave is not None
        return wave

    def wave_is(self, name: str, status: m.WaveStatus) -> bool:
        return self.wave(name).status == status

    def status(self, name: str) -> str:
        return self.rollout(name).status

    def event(self, name: str) -> WaveEvent:
        (event,) = self.wave(name).events
        return event

    def give(self, name: str, *received: Any) -> Rollout:
        for each in received:
            self.repository.step(self.rollout(name), each, self.fleet, self.authority, self.now)
        return self.rollout(name)

    def tick(self, after_s: float = 0.0) -> None:
        """Time passes for every rollout, oldest first."""
        self.now += timedelta(seconds=after_s)
        for rollout in self.repository.active:
            self.give(rollout.id, Tick())

    def answer(self, name: str, *, ready: bool = True) -> None:
        """The agents of its wave answer."""
        for event in self.wave(name).events:
            for vm in event.resources:
                self.give(
                    name, m.VmReady(vm=vm, event_id=event.event_id, ready=ready, reason="" if ready else "no")
                )

    def approve(self, name: str) -> None:
        for event in self.wave(name).events:
            self.give(name, Approve(event_id=event.event_id, by=event.resources[0]))

    def started(self, name: str) -> None:
        self.answer(name)
        self.approve(name)
        assert self.wave_is(name, "started"), self.wave(name).waiting_for

    def finish_wave(self, name: str, status: m.OperationStatus = "completed") -> None:
        """The hosts of a started wave report, and the clocks are known."""
        wave = self.wave(name)
        for operation in wave.operations:
            mine = [vm for vm in wave.vms if vm.host == operation.host]
            results = tuple(
                m.VmResult(
                    vm=vm.vm,
                    set=vm.set,
                    update_domain=vm.update_domain,
                    state="running",
                    frozen=True,
                    pause_s=2.0,
                )
                for vm in mine
            )
            report = m.OperationReported(
                operation=operation.operation,
                host=operation.host,
                epoch=1,
                status=status,
                vms=results,
                at=self.now,
            )
            self.give(name, report)
            for vm in mine if status == "completed" else ():
                synced = m.VmClockSynced(
                    vm=vm.vm,
                    host=vm.host,
                    set=vm.set,
                    update_domain=vm.update_domain,
                    operation=operation.operation,
                    synced=True,
                    by="agent",
                    error_after_s=0.001,
                    at=self.now,
                )
                self.give(name, synced)

    def whole(self, name: str) -> None:
        """All waves of a rollout whose turn it is."""
        while self.status(name) == "running":
            self.started(name)
            self.finish_wave(name)
            self.tick()

    def restart(self) -> None:
        self.repository.store.database.close()
        self.repository = RolloutRepository(CoordinatorStore(self.path), self.now)

    def sent(self, *kinds: type) -> list[Any]:
        """What the outbox has of these types, taken out of it."""
        kept = self.repository.store.outbox.load()
        self.repository.store.outbox.remove([each.event_id for each in kept])
        return [each.read() for each in kept if each.payload and isinstance(each.read(), kinds)]

    def document(self) -> m.SetDocument:
        return self.repository.documents["web"]


@pytest.fixture
def desk(
    tmp_path: Path,
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> Desk:
    two = fleet(host("h1", build("w1")), host("h2", build("w2", domain=1)), host("h3", build("d1", "db")))
    return Desk(str(tmp_path / "c.sqlite"), two, authority)


def test_it_is_announced_at_once_with_a_not_before_after_the_expected_end_of_the_one_ahead(
    desk: Desk,
) -> None:
    end = expected_end(desk.rollout("front"), desk.now)
    assert end > T0 + timedelta(seconds=2 * _NOTICE_S), "two waves, each with its notice"
    desk.order("next")
    assert desk.rollout("next").queued_behind == "front"
    assert desk.wave_is("next", "scheduled")
    assert [each.rollout for each in desk.document().events] == ["front", "next"]
    shown = desk.document().events[1].not_before
    assert shown >= end
    assert shown.microsecond == 0
    state = wave_state("next", desk.wave("next"))
    assert (state.reason, state.codes) == ("queued behind rollout front", ("queued",))
    assert rollout_state(desk.rollout("next")).queued_behind == "front"


def test_approved_and_ready_it_still_waits_and_starts_when_the_one_ahead_has_ended(desk: Desk) -> None:
    desk.order("next")
    desk.approve("next")
    desk.answer("next")
    desk.tick(1)
    assert desk.wave_is("next", "scheduled")
    desk.whole("front")
    assert desk.status("front") == "completed"
    desk.tick()
    assert desk.rollout("next").queued_behind == ""
    desk.answer("next")
    assert desk.wave_is("next", "started")
    desk.finish_wave("next")
    desk.tick()
    desk.whole("next")
    assert desk.status("next") == "completed"


def test_not_approved_it_starts_at_its_not_before(desk: Desk) -> None:
    desk.order("next")
    desk.whole("front")
    desk.tick()
    desk.answer("next")
    not_before = desk.wave("next").not_before
    assert not_before is not None
    desk.tick((not_before - desk.now).total_seconds() - 1)
    assert desk.wave_is("next", "scheduled")
    desk.tick(1)
    assert desk.wave_is("next", "started")


def test_while_the_one_ahead_is_halted_not_before_moves_later_and_seldom(desk: Desk) -> None:
    desk.order("next")
    first = desk.wave("next").not_before
    assert first is not None
    desk.started("front")
    desk.finish_wave("front", "failed")
    assert desk.status("front") == "halted"
    desk.sent()
    seen = [first]
    for _ in range(1000):
        desk.tick(1)
        now = desk.wave("next").not_before
        assert now is not None
        seen.append(now)
        shown = {each.rollout: each.not_before for each in desk.document().events}
        assert shown == {"next": now}
        assert now > desk.now, "it never comes"
    assert seen == sorted(seen), "never earlier"
    moves = len(set(seen)) - 1
    assert 0 < moves <= 1000 / _NOTICE_S
    facts = desk.sent(m.EventChanged)
    assert [(each.status, each.codes) for each in facts] == [("scheduled", ("queued",))] * moves
    assert [each.incarnation for each in facts] == sorted({each.incarnation for each in facts})
    assert not list(due_operations(desk.rollout("next"), desk.authority))


def test_after_an_abort_of_the_one_ahead_it_starts_only_when_the_gates_are_open(desk: Desk) -> None:
    desk.order("next")
    desk.started("front")
    desk.give("front", Abort())
    assert desk.status("front") == "aborting"
    desk.tick(1)
    assert desk.rollout("next").queued_behind == "front", "its hosts may still be at work"
    desk.finish_wave("front", "failed")
    assert desk.status("front") == "aborted"
    whole = desk.fleet
    inventory = whole.inventories["h1"]
    paused = msgspec.structs.replace(
        inventory, vms=(msgspec.structs.replace(inventory.vms[0], state="paused"),)
    )
    desk.fleet = FleetLookup(refold(whole.state, paused))
    desk.approve("next")
    desk.tick(1)
    desk.answer("next")
    assert desk.wave_is("next", "scheduled")
    assert "w1 on h1 is paused" in desk.wave("next").waiting_for
    assert desk.rollout("next").queued_behind == "", "it holds its sets now"
    desk.fleet = whole
    desk.tick(1)
    assert desk.wave_is("next", "started")


def test_gates_that_stay_closed_after_the_one_ahead_halt_it(desk: Desk) -> None:
    desk.order("next")
    desk.give("front", Abort())
    desk.fleet = FleetLookup(refold(desk.fleet.state, m.HostPresence(host="h2", online=False, instance="i")))
    desk.tick(1)
    desk.tick(21)
    assert desk.status("next") == "halted"
    assert "h2" in desk.rollout("next").reason
    assert not desk.document().events


def test_a_queued_one_can_be_aborted_and_the_one_ahead_never_knows(desk: Desk) -> None:
    desk.order("next")
    front = desk.event("front").event_id
    desk.give("next", Abort())
    assert (desk.status("next"), desk.rollout("next").queued_behind) == ("aborted", "")
    assert [each.event_id for each in desk.document().events] == [front]
    desk.whole("front")
    assert desk.status("front") == "completed"


def test_several_wait_in_the_order_in_which_they_were_accepted(desk: Desk) -> None:
    desk.order("second")
    desk.order("third")
    desk.order("other", "db")
    assert desk.rollout("third").queued_behind == "second"
    assert desk.rollout("other").queued_behind == "", "it shares no set with them"
    second, third = desk.wave("second").not_before, desk.wave("third").not_before
    assert second is not None
    assert third is not None
    assert second < third
    desk.give("second", Abort())
    desk.tick()
    assert desk.rollout("third").queued_behind == "front", "who is in between has gone"
    desk.whole("front")
    desk.tick()
    assert desk.rollout("third").queued_behind == ""


def test_one_that_needs_two_sets_waits_for_both(desk: Desk) -> None:
    desk.order("other", "db")
    desk.order("both", "web", "db")
    desk.order("last", "db")
    desk.whole("front")
    desk.tick()
    assert desk.rollout("both").queued_behind == "other"
    assert desk.rollout("last").queued_behind == "both", "no later one overtakes"
    desk.whole("other")
    desk.tick()
    assert desk.rollout("both").queued_behind == ""
    assert desk.rollout("last").queued_behind == "both"


def test_a_restart_in_any_state_keeps_the_order_the_events_and_the_incarnations(desk: Desk) -> None:
    desk.order("second")
    desk.order("third")

    def facts() -> list[Any]:
        return [
            (each.id, each.queued_behind, each.status, each.current and each.current.events)
            for each in desk.repository.active
        ]

    for step in (
        lambda: desk.started("front"),
        lambda: desk.finish_wave("front", "failed"),
        lambda: desk.give("front", Resume()),
        lambda: desk.give("front", Abort()),
        lambda: desk.tick(1),
    ):
        step()
        before, document = facts(), desk.document()
        desk.restart()
        assert facts() == before
        assert desk.document() == document
        desk.tick(1)
        assert version_of(desk.document()) >= version_of(document)
    assert [each.id for each in desk.repository.active] == ["second", "third"]
    assert desk.rollout("second").queued_behind == ""
    assert desk.rollout("third").queued_behind == "second"


def test_answers_for_a_queued_event_count_only_after_the_event_ahead_of_the_same_vm(desk: Desk) -> None:
    """The end of that event undoes what the agent has prepared, so it prepares and answers again."""
    desk.order("next")
    desk.answer("next")
    desk.tick()
    assert not desk.wave("next").readiness, "front's event names w1, too"
    desk.started("front")
    desk.finish_wave("front")
    desk.answer("next")
    desk.tick()
    assert set(desk.wave("next").readiness) == {"w1"}


def test_an_agent_that_is_not_ready_halts_it_in_its_turn_only(desk: Desk) -> None:
    desk.order("next")
    desk.started("front")
    desk.finish_wave("front")
    desk.answer("next", ready=False)
    desk.tick(1)
    assert desk.status("next") == "running"
    desk.give("front", Abort())
    desk.tick(1)
    assert desk.status("next") == "halted"
    assert "is not ready" in desk.rollout("next").reason


def test_a_rollout_of_a_held_set_that_is_not_queued_is_never_stored(desk: Desk) -> None:
    bare = msgspec.structs.replace(desk.rollout("front"), id="other")
    with pytest.raises(AssertionError, match="I1"):
        desk.repository.add(bare, "ops", m.RequestAnswered(request="q", accepted=True))


@given(
    notices=st.lists(st.floats(0.5, 2000.0), min_size=1, max_size=4),
    steps=st.lists(st.floats(0.1, 500.0), max_size=30),
    halt_at=st.integers(0, 30),
)
def test_not_before_is_after_the_notice_and_never_moves_earlier(
    notices: list[float], steps: list[float], halt_at: int
) -> None:
    desk = Desk(":memory:", _FLEET[0], Authority(coordinator="c", epoch=1))
    names = [f"q{number}" for number in range(len(notices))]
    for name, notice_s in zip(names, notices, strict=True):
        desk.order(name, notice_s=notice_s)
        not_before = desk.wave(name).not_before
        assert not_before is not None
        assert not_before >= desk.now + timedelta(seconds=notice_s)
    seen = {name: desk.wave(name).not_before for name in names}
    for number, after_s in enumerate(steps):
        if number == halt_at and desk.wave_is("front", "scheduled"):
            desk.answer("front", ready=False)
        desk.tick(after_s)
        for name in names:
            now = desk.wave(name).not_before
            assert now is not None
            assert seen[name] is not None
            assert now >= seen[name]  # type: ignore[operator]
            seen[name] = now
            if desk.rollout(name).queued_behind:
                assert now > desk.now
                assert not desk.wave(name).operations
        shown = {each.rollout: each.not_before for each in desk.document().events}
        assert all(shown[name] == seen[name] for name in names if desk.wave_is(name, "scheduled"))


_FLEET: list[FleetLookup] = []


@pytest.fixture(autouse=True)
def _fleet(
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
) -> None:
    if not _FLEET:
        _FLEET.append(fleet(host("h1", build("w1")), host("h2", build("w2", domain=1))))


def test_estimates() -> None:
    policy = m.Policy(notice_s=0.25)
    assert first_not_before(policy, (), T0) == T0 + timedelta(seconds=1), "rounded up"
    assert whole_second(T0) == T0
