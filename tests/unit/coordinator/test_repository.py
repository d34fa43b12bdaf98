"""The book and its store: what is kept, what is forgotten, what a store older than the bus leads to."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caesura.contract import messages as m
from caesura.contract.codec import size_bytes
from caesura.contract.envelope import Message
from caesura.runtime.errors import StoreError
from caesura_coordinator.authority import Authority
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Abort, Approve, Resume, Tick
from caesura_coordinator.plan import make_plan
from caesura_coordinator.published_state import largest_states, rollout_state
from caesura_coordinator.records import Rollout, WaveEvent, new_rollout
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.retention import Removal
from caesura_coordinator.store import CoordinatorStore
from caesura_testing.damage import flip_bits
from caesura_testing.refold import refold

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)
_ANSWER = m.RequestAnswered(request="q", accepted=True)


class Desk:
    """A book with one rollout over w1 (domain 0) on h1 and w2 (domain 1) on h2, one second a step."""

    def __init__(self, folder: Path, fleet: FleetLookup, authority: Authority) -> None:
        self.path = str(folder / "c.sqlite")
        self.fleet = fleet
        self.authority = authority
        self.now = T0
        self.repository = RolloutRepository(CoordinatorStore(self.path), T0)
        self.policy = m.Policy(notice_s=60.0, verify_timeout_s=20.0)
        self.repository.add(self.fresh("r"), "ops", _ANSWER)

    def fresh(self, name: str, **selection: tuple[str, ...]) -> Rollout:
        plan = make_plan(
            self.fleet.snapshot(), update="patch", selection=m.Selection(**selection), policy=self.policy
        )
        assert not plan.refusals
        return new_rollout(
            name,
            plan,
            policy=self.policy,
            fence_hosts=tuple(self.fleet.inventories),
            requested_by="ops",
            now=T0,
        )

    def give(self, received: Any, after_s: float = 0.0, name: str = "r") -> Rollout:
        self.now += timedelta(seconds=after_s)
        return self.repository.step(
            self.repository.rollouts[name], received, self.fleet, self.authority, self.now
        )

    def event(self) -> WaveEvent:
        wave = self.repository.rollouts["r"].current
        assert wave is not None
        return wave.events[0]

    def status(self) -> str:
        return self.repository.rollouts["r"].status

    def scheduled(self) -> Desk:
        self.give(Tick())
        self.give(m.VmReady(vm="w1", event_id=self.event().event_id, ready=True))
        return self

    def sent(self) -> list[Message]:
        """Everything in the outbox, as a broker would take it."""
        kept = self.repository.store.outbox.load()
        self.repository.store.outbox.remove([each.event_id for each in kept])
        return [each.read() for each in kept if each.payload]

    def cleared(self) -> list[str]:
        """Topics from which the outbox removes what is retained, after ``/fleet/``."""
        return [
            each.topic.split("/fleet/")[1] for each in self.repository.store.outbox.load() if not each.payload
        ]

    def reopened(self) -> RolloutRepository:
        self.repository.store.database.close()
        self.repository = RolloutRepository(CoordinatorStore(self.path), self.now)
        return self.repository


@pytest.fixture
def desk(
    tmp_path: Path,
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> Desk:
    return Desk(tmp_path, fleet(host("h1", build("w1")), host("h2", build("w2", domain=1))), authority)


def test_what_was_decided_is_read_back_whole(desk: Desk) -> None:
    desk.scheduled().give(Approve(event_id=desk.event().event_id, by="w1"))
    before, documents = desk.repository.rollouts["r"], desk.repository.documents
    assert before.current is not None
    assert before.current.status == "started"
    again = desk.reopened()
    deadlines = {"report_by": None, "answers_by": None}

    def bare(rollout: Rollout) -> Rollout:
        waves = tuple(msgspec.structs.replace(wave, **deadlines) for wave in rollout.waves)
        return msgspec.structs.replace(rollout, waves=waves)

    assert bare(again.rollouts["r"]) == bare(before)
    assert again.documents == documents


@pytest.mark.parametrize("length", [4096, 100_000])
def test_the_longest_reason_can_be_announced_and_read_back(length: int, desk: Desk) -> None:
    desk.scheduled().give(Abort(reason="x" * length))
    states = [each for each in desk.sent() if isinstance(each, m.RolloutState)]
    assert states[-1].status == "aborted"
    assert states[-1].reason.startswith("aborted: xxx")
    assert desk.reopened().rollouts["r"].status == "aborted"


def test_a_report_with_the_longest_reason_can_be_announced(desk: Desk) -> None:
    desk.scheduled().give(Approve(event_id=desk.event().event_id, by="w1"))
    wave = desk.repository.rollouts["r"].current
    assert wave is not None
    (operation,) = wave.operations
    desk.give(
        m.OperationReported(
            operation=operation.operation, host="h1", epoch=1, status="failed", reason="y" * 4096, at=T0
        )
    )
    states = [each for each in desk.sent() if isinstance(each, m.RolloutState)]
    assert states[-1].status == "halted"
    assert "h1 failed: yyy" in states[-1].reason


def test_a_record_that_cannot_be_read_is_said_to_be(desk: Desk) -> None:
    desk.repository.store.database.run("UPDATE wave SET body = '{}'")
    desk.repository.store.database.close()
    with pytest.raises(StoreError, match=r"a wave of rollout r in the store .* cannot be read"):
        RolloutRepository(CoordinatorStore(desk.path), T0)


def test_only_waves_that_changed_are_written(desk: Desk) -> None:
    desk.give(Tick())
    desk.repository.store.database.run("UPDATE wave SET body = 'untouched' WHERE number = 1")
    desk.give(m.VmReady(vm="w1", event_id=desk.event().event_id, ready=True))
    rows = desk.repository.store.database.run("SELECT number, body FROM wave ORDER BY number")
    assert b"w1" in rows[0][1]
    assert rows[1] == (1, "untouched")


def test_a_rollout_that_holds_its_sets_is_never_forgotten(desk: Desk) -> None:
    desk.give(Tick())
    done = msgspec.structs.replace(desk.repository.rollouts["r"], status="completed")
    for number in range(520):
        desk.repository.add(msgspec.structs.replace(done, id=f"x{number}"), "ops", _ANSWER)
    cleared = [each.rollout for each in desk.repository.prune()]
    desk.repository.republish()
    assert "r" in desk.repository.rollouts
    assert "r" not in cleared
    assert any(isinstance(each, m.RolloutState) and each.rollout == "r" for each in desk.sent())
    assert len(desk.repository.rollouts) <= 500
    assert desk.reopened().rollouts["r"].status == "running"
    assert len(desk.repository.rollouts) <= 500


def test_of_ended_rollouts_the_bus_shows_the_newest_and_of_the_newest_the_waves(desk: Desk) -> None:
    done = msgspec.structs.replace(desk.repository.rollouts["r"], status="completed")
    removals: list[Removal] = []
    for number in range(60):
        desk.repository.add(msgspec.structs.replace(done, id=f"x{number}"), "ops", _ANSWER)
        removals += desk.repository.prune()
        if number == 59:
            topics = desk.cleared()
            assert any("x9/" in each for each in topics), "a kill must not leave it"
            assert any("x54/" in each for each in topics)
    waves = len(done.waves)
    assert [each for each in removals if not each.whole] == [
        Removal(f"x{number}", waves, whole=False) for number in range(55)
    ]
    assert [each for each in removals if each.whole] == [
        Removal(f"x{number}", waves, whole=True) for number in range(10)
    ]
    assert desk.repository.prune() == []
    desk.sent()
    desk.repository.republish()
    shown = {each.rollout: each for each in desk.sent() if isinstance(each, m.RolloutState)}
    assert list(shown) == ["r", *(f"x{number}" for number in range(10, 60))]
    assert [name for name, each in shown.items() if each.wave_etags] == [
        "r",
        *(f"x{number}" for number in range(55, 60)),
    ]


def test_of_a_rollout_whose_waves_are_no_longer_shown_the_state_of_each_vm_is_not_kept(desk: Desk) -> None:
    """Else a standby that takes over would read it, for years of rollouts."""
    running = desk.scheduled().repository.rollouts["r"]
    assert running.waves[0].readiness
    done = msgspec.structs.replace(running, status="completed")
    for number in range(8):
        desk.repository.add(msgspec.structs.replace(done, id=f"x{number}"), "ops", _ANSWER)
        desk.repository.prune()

    def with_parts() -> list[str]:
        rows = desk.repository.store.database.run("SELECT DISTINCT rollout FROM wave_part ORDER BY rollout")
        return [name for (name,) in rows]

    shown = ["r", *(f"x{number}" for number in range(3, 8))]
    assert with_parts() == shown
    assert [each.id for each in desk.repository.rollouts.values() if each.waves[0].readiness] == shown
    before = dict(desk.repository.rollouts)
    desk.reopened()
    assert {name: len(each.waves) for name, each in desk.repository.rollouts.items()} == {
        name: len(each.waves) for name, each in before.items()
    }
    # What an earlier version kept goes as well, a few at a time.
    desk.repository.store.database.run(
        "INSERT INTO wave_part (rollout, number, kind, name, body) SELECT 'x0', number, kind, name, body FROM wave_part WHERE rollout = 'x7'"
    )
    desk.reopened()
    desk.repository.prune()
    assert with_parts() == shown


def test_a_rollout_that_a_broker_brings_back_is_removed_again(desk: Desk) -> None:
    done = msgspec.structs.replace(desk.repository.rollouts["r"], status="completed")
    for number in range(60):
        desk.repository.add(msgspec.structs.replace(done, id=f"x{number}"), "ops", _ANSWER)
    desk.repository.prune()
    state, waves = rollout_state(done), len(done.waves)
    excess = {
        name: desk.repository.excess(msgspec.structs.replace(state, rollout=name))
        for name in ("r", "x59", "x54", "x9", "of-another")
    }
    assert excess == {
        "r": None,
        "x59": None,
        "x54": Removal("x54", waves, whole=False),
        "x9": Removal("x9", waves, whole=True),
        "of-another": None,
    }
    thin = msgspec.structs.replace(state, rollout="x54", wave_etags=())
    assert desk.repository.excess(thin) is None, "it is as it should be"


def test_a_document_ahead_of_the_store_halts_what_holds_the_set_and_nothing_ends_twice(desk: Desk) -> None:
    desk.scheduled()
    mine, sent = desk.event().event_id, desk.sent()
    assert any(isinstance(each, m.EventChanged) and each.event_id == mine for each in sent)
    ahead = m.SetDocument(set="web", incarnation=desk.repository.documents["web"].incarnation + 5, events=())
    desk.repository.adopt_document(ahead, desk.fleet, desk.authority, T0)
    assert desk.repository.rollouts["r"].status == "halted"
    assert "no record of" in desk.repository.rollouts["r"].reason
    assert not [each for each in desk.sent() if isinstance(each, m.EventChanged)], (
        "its end was told by another"
    )
    desk.give(Tick(), 70)
    desk.give(Resume())
    assert desk.event().event_id != mine
    assert desk.repository.documents["web"].incarnation > ahead.incarnation


def _report(desk: Desk, status: m.OperationStatus) -> m.OperationReported:
    wave = desk.repository.rollouts["r"].current
    assert wave is not None
    vm = m.VmResult(vm="w1", set="web", update_domain=0, state="running", frozen=True, pause_s=1.0)
    return m.OperationReported(
        operation=wave.operations[0].operation, host="h1", epoch=1, status=status, vms=(vm,), at=T0
    )


def test_a_document_ahead_of_the_store_halts_a_started_wave_when_its_hosts_are_done(desk: Desk) -> None:
    desk.scheduled().give(Approve(event_id=desk.event().event_id, by="w1"))
    ahead = m.SetDocument(set="web", incarnation=desk.repository.documents["web"].incarnation + 5, events=())
    desk.repository.adopt_document(ahead, desk.fleet, desk.authority, T0)
    assert desk.status() == "running"
    desk.give(_report(desk, "completed"))
    assert desk.status() == "halted"
    assert "no record of" in desk.repository.rollouts["r"].reason
    desk.give(Resume())
    wave = desk.repository.rollouts["r"].current
    assert wave is not None
    assert (wave.index, wave.status) == (0, "verifying"), "the operator has looked at the fleet"


@pytest.mark.parametrize("reported", ["failed", "cancelled"])
def test_an_event_that_another_ended_while_we_abort_does_not_end_again(
    reported: m.OperationStatus, desk: Desk
) -> None:
    """We were away in the middle of an abort, and the other one has ended what it had no record of (I7)."""
    desk.scheduled().give(Approve(event_id=desk.event().event_id, by="w1"))
    desk.give(Abort())
    assert desk.status() == "aborting"
    desk.sent()
    ahead = m.SetDocument(set="web", incarnation=desk.repository.documents["web"].incarnation + 5, events=())
    desk.repository.adopt_document(ahead, desk.fleet, desk.authority, T0)
    desk.give(_report(desk, reported))
    assert desk.status() == "aborted"
    assert not [each for each in desk.sent() if isinstance(each, m.EventChanged)]


def test_a_document_ahead_of_the_store_is_taken_up_together_with_the_halt(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the document stored without the halt, nobody would ever tell the rollout: it would wait for its event."""
    desk.scheduled()
    ahead = m.SetDocument(set="web", incarnation=desk.repository.documents["web"].incarnation + 5, events=())

    def full(*_: object) -> None:
        raise StoreError("disk full")

    monkeypatch.setattr(desk.repository.store, "save_rollout", full)
    with pytest.raises(StoreError):
        desk.repository.adopt_document(ahead, desk.fleet, desk.authority, T0)
    monkeypatch.undo()
    desk.reopened().adopt_document(ahead, desk.fleet, desk.authority, T0)
    assert desk.repository.rollouts["r"].status == "halted"
    assert desk.repository.documents["web"] == ahead


def test_an_event_of_nobody_is_ended_when_its_document_is_taken_up(desk: Desk) -> None:
    foreign = m.ScheduledEvent(
        event_id="E", event_type="Freeze", status="started", resources=("d1",), not_before=T0
    )
    desk.sent()
    desk.repository.adopt_document(
        m.SetDocument(set="db", incarnation=9, events=(foreign,)), desk.fleet, desk.authority, T0
    )
    ends = [each for each in desk.sent() if isinstance(each, m.EventChanged)]
    assert [(each.event_id, each.status, each.incarnation) for each in ends] == [("E", "failed", 10)]
    assert desk.repository.rollouts["r"].status == "running", "it does not hold that set"


def test_a_rollout_of_nobody_is_ended_once(desk: Desk) -> None:
    desk.scheduled()
    mine = rollout_state(desk.repository.rollouts["r"])
    desk.sent()
    assert desk.repository.abort_orphan(mine, T0) is None
    assert desk.sent() == [], "it is known here"
    states: dict[m.WaveStatus, m.WaveStatus | None] = {
        "verifying": "failed",
        "scheduled": "cancelled",
        "pending": None,
        "failed": None,
    }
    for status, end in states.items():
        foreign = msgspec.structs.replace(
            mine, rollout=f"of-another-{status}", status="halted", current_wave=1, current_status=status
        )
        removal = desk.repository.abort_orphan(foreign, T0)
        waves = [f"rollout/{foreign.rollout}/wave/{wave}" for wave in range(mine.wave_count)]
        assert [topic.removesuffix("/state") for topic in desk.cleared()] == waves, (
            "a kill must not leave them"
        )
        sent = desk.sent()
        (ended,) = [each for each in sent if isinstance(each, m.RolloutState)]
        assert (ended.rollout, ended.status, ended.ended_at) == (foreign.rollout, "aborted", T0)
        assert "lost its record" in ended.reason
        assert removal == Removal(foreign.rollout, mine.wave_count, whole=False)
        assert not ended.wave_etags, "nobody waits for waves that are removed"
        changes = [(each.wave, each.status) for each in sent if isinstance(each, m.WaveChanged)]
        assert changes == ([(1, end)] if end else [])
        assert desk.repository.abort_orphan(ended, T0) is None
        assert desk.sent() == []


def test_ids_of_one_attempt_differ_between_epochs(desk: Desk) -> None:
    """A store restored from an old copy must not use an id again whose event has ended meanwhile."""
    desk.give(Tick())
    first = desk.event().event_id
    desk.reopened().store.database.run("UPDATE wave SET body = json_replace(body, '$.status', 'pending')")
    desk.reopened()
    desk.authority = Authority(coordinator="c", epoch=2)
    for inventory in desk.fleet.inventories.values():
        desk.fleet = FleetLookup(refold(desk.fleet.state, msgspec.structs.replace(inventory, epoch=2)))
    desk.give(Tick())
    assert desk.event().event_id != first


def test_a_set_is_held_by_its_rollout_until_that_is_over(desk: Desk) -> None:
    """One rollout per set (I1): halted and aborting ones hold it too, since their hosts may still be at work."""
    repository = desk.repository
    assert repository.holder(["web"]) == ("web", "r")
    assert repository.holder(["db", "web"]) == ("web", "r")
    assert repository.holder(["db"]) is None
    desk.scheduled().give(Approve(event_id=desk.event().event_id, by="w1"))
    desk.give(Abort())
    assert desk.status() == "aborting"
    assert repository.holder(["web"]) == ("web", "r")
    desk.give(Tick(), 200)
    assert desk.status() == "aborted"
    assert repository.holder(["web"]) is None


def test_a_halted_rollout_holds_its_sets(desk: Desk) -> None:
    desk.give(Tick())
    desk.give(m.VmReady(vm="w1", event_id=desk.event().event_id, ready=False))
    assert desk.status() == "halted"
    assert desk.repository.holder(["web"]) == ("web", "r")
    assert desk.reopened().holder(["web"]) == ("web", "r")


def test_two_rollouts_that_share_a_host_take_turns(
    tmp_path: Path,
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> None:
    everybody = fleet(host("h1", build("w1", agent=False), build("d1", "db", agent=False)))
    repository = RolloutRepository(CoordinatorStore(str(tmp_path / "c.sqlite")), T0)
    policy = m.Policy(notice_s=1.0)
    for name in ("web", "db"):
        plan = make_plan(
            everybody.snapshot(), update="", selection=m.Selection(sets=(name,)), policy=policy, hold_s=1.0
        )
        made = new_rollout(name, plan, policy=policy, fence_hosts=("h1",), requested_by="ops", now=T0)
        repository.add(made, "ops", _ANSWER)
    for seconds in (0, 2):
        for name in ("web", "db"):
            # The inventory does not show yet what was commanded a moment ago.
            repository.step(
                repository.rollouts[name], Tick(), everybody, authority, T0 + timedelta(seconds=seconds)
            )
    one, two = (repository.rollouts[name].current for name in ("web", "db"))
    assert one is not None
    assert two is not None
    assert (one.status, two.status) == ("started", "scheduled")
    assert "h1 is busy with operation" in two.waiting_for


def test_the_largest_state_is_at_least_what_is_ever_announced(desk: Desk) -> None:
    largest: dict[type[Message], int] = {}
    for each in largest_states(desk.repository.rollouts["r"]):
        largest[type(each)] = max(largest.get(type(each), 0), size_bytes(each))
    desk.scheduled().give(Approve(event_id=desk.event().event_id, by="w1"))
    desk.give(Abort(reason="z" * 4096))
    desk.give(Tick(), 200)
    assert desk.repository.rollouts["r"].status == "aborted"
    announced = [each for each in desk.sent() if type(each) in largest]
    assert {type(each) for each in announced} == {m.RolloutState, m.WaveState, m.EventChanged, m.SetDocument}
    for each in announced:
        assert largest[type(each)] >= size_bytes(each)


def test_a_store_with_a_flipped_bit_is_a_store_error_and_no_other(
    ram_path: Path,
    fleet: Callable[..., FleetLookup],
    host: Callable[..., Any],
    build: Callable[..., Any],
    authority: Authority,
) -> None:
    desk = Desk(ram_path, fleet(host("h1", build("w1")), host("h2", build("w2", domain=1))), authority)
    desk.scheduled()
    desk.repository.store.save_epoch(7)
    desk.repository.store.database.close()
    path = Path(desk.path)

    def read_all() -> None:
        store = CoordinatorStore(str(path))
        try:
            store.epoch()
            store.rollouts()
            store.documents()
            store.answer("ops", "q")
            store.outbox.load()
        finally:
            store.database.close()

    refused = flip_bits(path, read_all)
    assert "cannot be read" in " ".join(refused)
    assert all(str(path) in each for each in refused), "the file is named"
