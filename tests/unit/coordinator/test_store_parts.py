"""What the store writes of a wave: always enough to read the whole back, and of a message no more than it changed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caesura.contract import messages as m
from caesura.fleet.state import FleetState
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura.lifecycle.errors import IllegalStatusChange
from caesura.runtime.errors import StoreError
from caesura_coordinator.authority import Authority
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Abort, Approve, Resume, Tick
from caesura_coordinator.plan import make_plan, sets_of
from caesura_coordinator.records import Rollout, Wave, new_rollout
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.request_refusals import RequestRefused
from caesura_coordinator.store import CoordinatorStore, newer_entries
from caesura_testing.refold import refold

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)
_AUTHORITY = Authority(coordinator="c", epoch=1)
_PATCH = m.UpdateRecord(
    update="patch", version="1", impact="pause", scope="host", expected_s=2.0, timeout_s=9.0
)


def fleet_of(hosts: int, per_host: int, sets: int = 2) -> FleetLookup:
    """Hosts of domain 0, and one more of domain 1 of each set."""
    messages: list[Any] = []
    for number in range(hosts + 1):
        vms = tuple(
            m.VmRecord(
                vm=f"v{number}-{each}",
                set=f"s{each % sets}",
                update_domain=int(number == hosts),
                state="running",
                methods=("freeze",),
                clock="simulated",
                proofs={"freeze": ("digest_equal",)},
            )
            for each in range(per_host)
        )
        host = f"h{number:04}"
        messages.append(
            m.HostInventory(
                host=host,
                driver="process",
                epoch=1,
                coordinator="c",
                vms=vms,
                updates=(_PATCH,),
                guard="ready",
                commands=COMMANDS,
            )
        )
        messages.append(m.HostPresence(host=host, online=True, instance="i"))
        messages += [m.AgentPresence(vm=each.vm, online=True, boot_id="b") for each in vms]
    return FleetLookup(refold(FleetState(), *messages))


class Desk:
    """A book with a real store and one rollout over a fleet."""

    def __init__(self, fleet: FleetLookup, path: str = ":memory:") -> None:
        self.fleet = fleet
        self.now = T0
        self.repository = RolloutRepository(CoordinatorStore(path), T0)
        policy = m.Policy(notice_s=60.0, verify_timeout_s=50.0)
        plan = make_plan(fleet.snapshot(), update="patch", selection=m.Selection(), policy=policy)
        assert not plan.refusals
        rollout = new_rollout(
            "r",
            plan,
            policy=policy,
            fence_hosts=tuple(sorted(fleet.hosts_of(sets_of(plan)))),
            requested_by="ops",
            now=T0,
        )
        self.repository.add(rollout, "ops", m.RequestAnswered(request="q", accepted=True))

    @property
    def rollout(self) -> Rollout:
        return self.repository.rollouts["r"]

    @property
    def wave(self) -> Wave:
        return self.rollout.current or self.rollout.waves[-1]

    def give(self, received: Any) -> None:
        self.repository.step(self.rollout, received, self.fleet, _AUTHORITY, self.now)

    def stored(self) -> list[Rollout]:
        return self.repository.store.rollouts()

    # -- what hosts and guests say --

    def ready(self, vm: m.PlannedVm, *, ready: bool = True) -> m.VmReady:
        event = next((each.event_id for each in self.wave.events if vm.vm in each.resources), "none")
        return m.VmReady(vm=vm.vm, event_id=event, ready=ready)

    def report(self, host: str, status: m.OperationStatus) -> m.OperationReported:
        operation = next((each.operation for each in self.wave.operations if each.host == host), "none")
        results = tuple(
            m.VmResult(
                vm=vm.vm,
                set=vm.set,
                update_domain=vm.update_domain,
                state="running",
                frozen=True,
                pause_s=2.0,
            )
            for vm in self.wave.vms
            if vm.host == host and status == "completed"
        )
        return m.OperationReported(operation=operation, host=host, epoch=1, status=status, vms=results, at=T0)

    def clock(self, vm: m.PlannedVm, *, synced: bool = True) -> m.VmClockSynced:
        known = (*self.wave.completed_operations, *self.wave.operations)
        operation = next((each.operation for each in known if each.host == vm.host), "none")
        return m.VmClockSynced(
            vm=vm.vm,
            host=vm.host,
            set=vm.set,
            update_domain=vm.update_domain,
            operation=operation,
            synced=synced,
            by="agent",
            error_after_s=0.001,
            at=T0,
        )

    def scheduled(self) -> Desk:
        self.give(Tick())
        return self

    def started(self) -> Desk:
        self.scheduled()
        for vm in self.wave.vms:
            self.give(self.ready(vm))
        for event in self.wave.events:
            self.give(Approve(event_id=event.event_id, by=event.resources[0]))
        assert self.wave.status == "started"
        return self


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "tick",
                "ready",
                "refuse",
                "approve",
                "accepted",
                "completed",
                "failed",
                "clock",
                "unsynced",
                "all ready",
                "all approve",
                "all completed",
                "all clock",
                "abort",
                "resume",
                "wait",
            ]
        ),
        st.integers(0, 5),
    ),
    max_size=25,
)


def _inputs(desk: Desk, what: str, number: int) -> Iterator[Any]:
    vms, events = desk.wave.vms, desk.wave.events
    some = vms if what.startswith("all") else (vms[number % len(vms)],)
    match what.removeprefix("all "):
        case "ready" | "refuse":
            yield from (desk.ready(vm, ready=what != "refuse") for vm in some)
        case "approve":
            chosen = events if what.startswith("all") else events[number % 2 : number % 2 + 1]
            yield from (Approve(event_id=each.event_id, by=each.resources[0]) for each in chosen)
        case "accepted" | "completed" | "failed" as status:
            yield from (desk.report(host, status) for host in dict.fromkeys(vm.host for vm in some))
        case "clock" | "unsynced":
            yield from (desk.clock(vm, synced=what != "unsynced") for vm in some)
        case "abort":
            yield Abort()
        case "resume":
            yield Resume()
        case _:
            yield Tick()


@settings(max_examples=120, deadline=None)
@given(_STEPS)
def test_what_is_stored_is_always_what_is_known(steps: list[tuple[str, int]]) -> None:
    desk = Desk(fleet_of(2, 2))
    for what, number in steps:
        desk.now += timedelta(seconds=30 if what == "wait" else 1)
        for received in _inputs(desk, what, number):
            with contextlib.suppress(IllegalStatusChange, RequestRefused):
                desk.give(received)
            assert desk.stored() == [desk.rollout]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers()), max_size=8),
    st.lists(st.tuples(st.integers(0, 4), st.integers()), max_size=8),
)
def test_newer_entries_make_the_one_into_the_other(
    first: list[tuple[int, int]], then: list[tuple[int, int]]
) -> None:
    before: dict[str, tuple[int]] = {}
    for name, value in first:
        before.pop(str(name), None)
        before[str(name)] = (value,)
    now = before.copy()
    for name, value in then:
        now.pop(str(name), None)
        now[str(name)] = (value,)
    newer = newer_entries(before, now)
    assert newer is not None
    assert {**before, **newer} == now
    assert set(newer) == {str(name) for name, _ in then}
    assert newer_entries(None, now) is None
    if before:
        assert newer_entries(before, {}) is None


class _Written:
    """Bytes and rows that are written from now on."""

    def __init__(self, store: CoordinatorStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size_bytes = 0
        self.rows = 0
        self.statements: list[str] = []
        run = store.database.run

        def counted(sql: str, *values: Any) -> Any:
            if not sql.lstrip().startswith("SELECT"):
                self.rows += 1
                self.statements.append(sql.strip())
                self.size_bytes += sum(len(each) for each in values if isinstance(each, bytes))
            return run(sql, *values)

        monkeypatch.setattr(store.database, "run", counted)


@pytest.mark.parametrize("what", ["ready", "accepted", "clock"])
def test_a_message_writes_the_same_whatever_the_size_of_its_wave(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for hosts in (3, 60):
        desk = Desk(fleet_of(hosts, 4))
        if what == "ready":
            desk.scheduled()
        else:
            desk.started()
        counted = _Written(desk.repository.store, monkeypatch)
        (received,) = _inputs(desk, what, 0)
        before = desk.rollout
        desk.give(received)
        assert desk.rollout is not before
        written.append((counted.rows, counted.size_bytes))
    assert written[0] == written[1]
    assert written[0][1] < 2000


def test_an_approval_writes_its_event_and_the_document_and_not_the_wave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(fleet_of(60, 4)).scheduled()
    counted = _Written(desk.repository.store, monkeypatch)
    for event in desk.wave.events[:3]:
        desk.give(Approve(event_id=event.event_id, by=event.resources[0]))
    assert not any(each.startswith("INSERT OR REPLACE INTO wave ") for each in counted.statements)
    assert sum("INTO wave_part" in each for each in counted.statements) == 3
    assert desk.stored() == [desk.rollout]
    desk.give(Tick())
    assert desk.stored() == [desk.rollout]


def test_a_wave_that_an_older_version_wrote_in_one_piece_is_read_and_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sqlite")
    desk = Desk(fleet_of(2, 2), path).started()
    desk.give(desk.clock(desk.wave.vms[0]))
    whole = desk.rollout
    database = desk.repository.store.database
    for wave in whole.waves:
        database.run("UPDATE wave SET body = ? WHERE number = ?", msgspec.json.encode(wave), wave.index)
    database.run("DELETE FROM wave_vms")
    database.run("DELETE FROM wave_part")
    assert desk.stored() == [whole]
    desk.give(desk.clock(desk.wave.vms[1]))
    assert desk.rollout.waves[0].clocks.keys() == {vm.vm for vm in whole.waves[0].vms[:2]}
    assert desk.stored() == [desk.rollout]
    database.close()


def test_a_step_that_could_not_be_stored_leaves_the_documents_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(fleet_of(2, 2))
    held = dict(desk.repository.documents)

    def full(*_: object, **__: object) -> None:
        raise StoreError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(desk.repository.store, "enqueue", _after(2, desk.repository.store.enqueue, full))
        with pytest.raises(StoreError):
            desk.give(Tick())
    assert desk.repository.documents == held
    assert desk.stored() == [desk.rollout]
    desk.give(Tick())
    assert desk.wave.status == "scheduled"


def _after(count: int, first: Any, then: Any) -> Any:
    calls = 0

    def made(*words: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return (first if calls <= count else then)(*words, **named)

    return made


def _calls(work: Callable[[], object]) -> int:
    """How many Python functions it calls, each step of a generator included: its cost, however busy the machine is."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def test_to_announce_an_event_costs_the_same_whatever_the_size_of_its_wave() -> None:
    """The event loop waits for a wave of 1,000 VMs to be announced."""
    cost = {}
    for hosts in (8, 64):
        desk = Desk(fleet_of(hosts, per_host=8, sets=8))
        tick = partial(desk.give, Tick())
        calls = _calls(tick)
        assert len(desk.wave.events) == 8 * hosts
        cost[hosts] = calls / len(desk.wave.events)
    assert cost[64] < 1.3 * cost[8], cost


def test_to_store_an_answer_costs_the_same_whatever_the_size_of_those_that_are_kept() -> None:
    """A plan of 10,000 VMs has megabytes, and some twenty of them are kept."""
    small = m.RequestAnswered(request="small", accepted=True)

    def cost_s(body: bytes) -> float:
        store = CoordinatorStore(":memory:")
        with store.transaction():
            for number in range(30):
                store.database.run(
                    "INSERT INTO answer (client, request, body) VALUES ('ops', ?, ?)", f"q{number}", body
                )
        took = []
        for _ in range(5):
            began = time.thread_time()
            with store.transaction():
                store.save_answer("ops", small)
            took.append(time.thread_time() - began)
        ((count,),) = store.database.run("SELECT count(*) FROM answer")
        assert count == 31
        store.database.close()
        return min(took)

    # Each of them read and copied would be a thousand times as much.
    assert cost_s(b"x" * 2_000_000) < 30 * cost_s(b"x")


def test_the_oldest_answers_are_dropped_beyond_their_number_and_size() -> None:
    store = CoordinatorStore(":memory:")
    body = b"x" * (20 * 1024 * 1024)
    with store.transaction():
        for number in range(5):
            store.database.run(
                "INSERT INTO answer (client, request, body) VALUES ('ops', ?, ?)", f"large{number}", body
            )
        store.save_answer("ops", m.RequestAnswered(request="new", accepted=True))
    kept = [name for (name,) in store.database.run("SELECT request FROM answer ORDER BY number")]
    assert kept == ["large1", "large2", "large3", "large4", "new"], "those with at most 64 MiB of newer ones"
    with store.transaction():
        for number in range(1001):
            store.save_answer("ops", m.RequestAnswered(request=f"q{number}", accepted=True))
    ((count, oldest),) = store.database.run("SELECT count(*), min(number) FROM answer")
    ((first,),) = store.database.run("SELECT request FROM answer WHERE number = ?", oldest)
    assert (count, first) == (1000, "q1")
