"""The coordinator's store in a real PostgreSQL: what SQLite keeps it keeps, one writes, and what must not be used is refused by name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest

from caesura.contract import messages as m
from caesura.fleet.fold import apply
from caesura.fleet.state import FleetState
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura.runtime.errors import NewerStore, StoreError
from caesura.runtime.group_commit import GroupCommit
from caesura.runtime.settings import Secret
from caesura.runtime.shared_rows import StoreLost, WorkingCopy, WrongStore
from caesura_coordinator.authority import Authority
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Approve, Tick
from caesura_coordinator.plan import make_plan
from caesura_coordinator.records import Rollout, new_rollout
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.shared_store import SharedStore, working_copy
from caesura_coordinator.store import MIGRATIONS, CoordinatorStore
from caesura_coordinator.store_options import tables_of
from caesura_coordinator.takeover import LEFT_OUT
from caesura_testing.patience import patient
from caesura_testing.postgresql import PostgresServer, programs
from caesura_testing.proxy import TcpProxy

psycopg = pytest.importorskip("psycopg")
pytestmark = pytest.mark.skipif(programs() is None, reason="postgresql is not installed")

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)
_AUTHORITY = Authority(coordinator="c", epoch=1)
_LEASE_S = 30.0  # none of these tests waits for it


@pytest.fixture
async def server() -> AsyncIterator[PostgresServer]:
    async with PostgresServer() as running:
        yield running


def rows_of(url: str, copy: WorkingCopy, **changes: Any) -> Callable[[], Any]:
    from caesura.runtime.postgresql import PostgresRows  # noqa: PLC0415
    from caesura.runtime.postgresql_options import PostgresOptions  # noqa: PLC0415

    version = changes.pop("version", len(MIGRATIONS))
    clock = changes.pop("clock", time.time)
    options = PostgresOptions(**{"url": url, "fleet": "default", "name": "c", "lease_s": _LEASE_S, **changes})
    return lambda: PostgresRows(options, copy.columns, version, tables_of, clock)


@asynccontextmanager
async def coordinator_of(url: str, **changes: Any) -> AsyncIterator[SharedStore]:
    """The store of one coordinator, which does not ask for the lead yet."""
    lease_s = changes.get("lease_s", _LEASE_S)
    store, copy = working_copy()
    shared = SharedStore(
        store,
        copy,
        rows_of(url, copy, **changes),
        name=changes.get("name", "c"),
        lease_s=lease_s,
        poll_s=0.02,
        retry_s=0.05,
    )
    running = asyncio.create_task(shared.run())
    try:
        yield shared
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def lead(shared: SharedStore) -> CoordinatorStore:
    async with asyncio.timeout(patient(20)):
        await shared.lead()
    shared.store.write_as("/caesura/default/coordinator")
    return shared.store


class Home(Protocol):
    """A place where a store is kept."""

    def opened(self) -> Any:
        """An ``async with`` that gives the store and its commits; later ones give what earlier ones kept."""


class SqliteHome:
    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "coordinator.sqlite")

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[tuple[CoordinatorStore, Any]]:
        store = CoordinatorStore(self._path)
        store.write_as("/caesura/default/coordinator")
        commits = GroupCommit(store.database)
        running = asyncio.create_task(commits.run())
        try:
            yield store, commits
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            commits.close()


class PostgresHome:
    def __init__(self, server: PostgresServer) -> None:
        self._url = server.url

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[tuple[CoordinatorStore, Any]]:
        async with coordinator_of(self._url) as shared:
            yield await lead(shared), shared


@pytest.fixture(params=["sqlite", "postgresql"])
async def home(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Home]:
    async with AsyncExitStack() as stack:
        if request.param == "sqlite":
            yield SqliteHome(tmp_path)
        else:
            yield PostgresHome(await stack.enter_async_context(PostgresServer()))


def fleet_of(vms: int = 2) -> FleetLookup:
    state = FleetState()
    for number in range(vms):
        record = m.VmRecord(
            vm=f"w{number}",
            set="web",
            update_domain=number % 5,
            state="running",
            methods=("freeze",),
            clock="simulated",
            proofs={"freeze": ("digest_equal",)},
        )
        patch = m.UpdateRecord(
            update="patch", version="1", impact="pause", scope="host", expected_s=2.0, timeout_s=9.0
        )
        host = m.HostInventory(
            host=f"h{number}", driver="process", epoch=1, coordinator="c", vms=(record,), updates=(patch,),
            guard="ready", commands=COMMANDS,
        )  # fmt: skip
        apply(state, host, 0.0)
        apply(state, m.HostPresence(host=host.host, online=True, instance="i"), 0.0)
        apply(state, m.AgentPresence(vm=record.vm, online=True, boot_id="b"), 0.0)
    return FleetLookup(state)


def started(store: CoordinatorStore, fleet: FleetLookup, name: str = "r") -> RolloutRepository:
    """A repository with a rollout whose first wave is announced, approved and started."""
    repository = RolloutRepository(store, T0)
    policy = m.Policy(notice_s=60.0, verify_timeout_s=20.0)
    plan = make_plan(fleet.snapshot(), update="patch", selection=m.Selection(), policy=policy)
    assert not plan.refusals
    fresh = new_rollout(
        name, plan, policy=policy, fence_hosts=tuple(fleet.inventories), requested_by="ops", now=T0
    )
    repository.add(fresh, "ops", m.RequestAnswered(request="q", accepted=True))
    step(repository, Tick(), name)
    wave = repository.rollouts[name].current
    assert wave is not None
    step(repository, m.VmReady(vm=wave.vms[0].vm, event_id=wave.events[0].event_id, ready=True), name)
    step(repository, Approve(event_id=wave.events[0].event_id, by=wave.vms[0].vm), name)
    return repository


def step(repository: RolloutRepository, received: Any, name: str = "r", after_s: float = 1.0) -> Rollout:
    at = T0 + timedelta(seconds=after_s)
    return repository.step(repository.rollouts[name], received, fleet_of(), _AUTHORITY, at)


def everything(store: CoordinatorStore) -> Any:
    """What a store has, to be compared."""
    return (
        store.epoch(),
        store.rollouts(),
        store.documents(),
        store.owners(),
        store.answer("ops", "q"),
        store.outbox.load(),
    )


# -- both ------------------------------------------------------------------------------------------------


async def test_what_is_stored_is_read_back_whole_by_the_next(home: Home) -> None:
    async with home.opened() as (store, commits):
        repository = started(store, fleet_of())
        with store.transaction():
            store.save_owner("w0", "h0", 3)
            store.save_owner("w1", "h1", 3)
        with store.transaction():
            store.save_owner("w1", None, 3)
        store.save_epoch(7)
        await commits.reached()
        before = everything(store)
        assert repository.rollouts["r"].current is not None
    async with home.opened() as (store, _):
        assert everything(store) == before
        assert store.left_over == len(before[-1]) > 0


async def test_a_transaction_that_fails_leaves_nothing(home: Home) -> None:
    async with home.opened() as (store, commits):
        started(store, fleet_of())
        await commits.reached()
        before = everything(store)
        with pytest.raises(ZeroDivisionError), store.transaction():  # noqa: PT012 - all of it is the transaction
            store.save_owner("w9", "h9", 3)
            store.enqueue(m.SetDocument(set="other", incarnation=1, events=()), set="other")
            raise ZeroDivisionError
        with store.transaction():
            store.save_owner("w0", "h0", 3)
        await commits.reached()
    async with home.opened() as (store, _):
        after = everything(store)
        assert after[3] == {"w0": ("h0", 3)}
        assert (after[1:3], after[4:]) == (before[1:3], before[4:])


async def test_what_the_broker_has_is_not_published_again(home: Home) -> None:
    async with home.opened() as (store, commits):
        started(store, fleet_of())
        await commits.reached()
        waiting = store.outbox.load()
        store.outbox.remove([each.event_id for each in waiting[:2]])
        await commits.reached()
    async with home.opened() as (store, commits):
        assert store.outbox.load() == waiting[2:]
        # A retained message replaces the one that waits on its topic, and keeps its place in the order.
        store.enqueue(m.SetDocument(set="web", incarnation=99, events=()), set="web")
        await commits.reached()
    async with home.opened() as (store, _):
        kept = [each.read() for each in store.outbox.load()]
        documents = [each for each in kept if isinstance(each, m.SetDocument)]
        assert [each.incarnation for each in documents] == [99]
        assert kept[-1] == documents[0]


async def test_dropped_rollouts_and_old_answers_are_gone(home: Home) -> None:
    async with home.opened() as (store, commits):
        started(store, fleet_of())
        await commits.reached()
        store.forget(["r"])
        with store.transaction():
            for number in range(1003):
                store.save_answer("ops", m.RequestAnswered(request=f"q{number}", accepted=True))
        await commits.reached()
    async with home.opened() as (store, _):
        assert not store.rollouts()
        assert store.answer("ops", "q2") is None
        assert store.answer("ops", "q3") is not None


async def test_nothing_counts_as_durable_before_it_is(home: Home) -> None:
    async with home.opened() as (store, commits):
        await commits.reached()
        durable = commits.on_disk
        assert commits.settled
        store.save_epoch(5)
        assert not commits.settled
        assert commits.on_disk == durable
        heard = asyncio.Event()
        commits.listeners.append(heard.set)
        assert await commits.reached() == commits.committed
        assert heard.is_set()


# -- one leads -------------------------------------------------------------------------------------------


async def test_one_leads_and_the_other_takes_over_what_was_stored(server: PostgresServer) -> None:
    async with coordinator_of(server.url, name="two") as second:
        async with coordinator_of(server.url, name="one") as first:
            store = await lead(first)
            waiting = asyncio.create_task(lead(second))
            await until(lambda: second.waits_for == "another coordinator leads")
            assert second.ping() == ""
            started(store, fleet_of())
            await first.reached()
            before = everything(store)
            assert not waiting.done()
        taken = await waiting
        # The epoch that is read is the one before this lead: a claim is above it.
        assert everything(taken)[1:] == before[1:]
        assert taken.epoch() == 1


async def test_the_database_ends_a_leader_and_no_write_of_it_comes_later(server: PostgresServer) -> None:
    async with (
        coordinator_of(server.url, name="one") as first,
        coordinator_of(server.url, name="two") as second,
    ):
        store = await lead(first)
        store.save_epoch(1)
        await first.reached()
        await server.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%one'"
        )
        await lead(second)
        with store.transaction():
            store.save_owner("w0", "h0", 1)
        with pytest.raises(StoreLost):
            await first.reached()
        assert not first.leads
        assert await server.sql("SELECT count(*) FROM caesura.owner") == "0"


async def test_an_epoch_in_the_store_fences_a_leader_that_still_has_the_lock(server: PostgresServer) -> None:
    """The lock is not what is relied on: whoever raised the epoch, by whatever way, ends the others' writes."""
    async with coordinator_of(server.url) as first:
        store = await lead(first)
        store.save_epoch(1)
        await first.reached()
        await server.sql("UPDATE caesura.store SET epoch = 9")
        with store.transaction():
            store.save_owner("w0", "h0", 1)
        with pytest.raises(StoreLost, match="another coordinator has claimed a higher epoch than 1"):
            await first.reached()
        assert await server.sql("SELECT count(*) FROM caesura.owner") == "0"
        assert await server.sql("SELECT epoch FROM caesura.store") == "9"


async def test_a_silent_leader_is_ended_by_the_server(server: PostgresServer) -> None:
    async with (
        TcpProxy("127.0.0.1", server.port) as proxy,
        coordinator_of(
            server.url.replace(str(server.port), str(proxy.port)), name="one", lease_s=2.0
        ) as first,
        coordinator_of(server.url, name="two") as second,
    ):
        await lead(first)
        proxy.stall()
        await lead(second)
        await until(lambda: not first.leads)
        with pytest.raises(StoreLost):
            first.start()


async def test_of_two_that_are_started_at_once_one_leads(server: PostgresServer) -> None:
    for _ in range(5):
        async with (
            coordinator_of(server.url, name="one") as first,
            coordinator_of(server.url, name="two") as second,
        ):
            both = {asyncio.create_task(lead(first)), asyncio.create_task(lead(second))}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            assert first.leads != second.leads
            for each in both:
                each.cancel()
            await asyncio.gather(*both, return_exceptions=True)


# -- what is refused -------------------------------------------------------------------------------------


async def test_the_store_of_a_newer_version_is_refused(server: PostgresServer) -> None:
    async with coordinator_of(server.url) as first:
        await lead(first)
    await server.sql("UPDATE caesura.store SET version = 99")
    async with coordinator_of(server.url) as second:
        with pytest.raises(NewerStore, match="schema version 99"):
            await lead(second)


async def test_the_store_of_another_fleet_is_refused(server: PostgresServer) -> None:
    async with coordinator_of(server.url) as first:
        await lead(first)
    async with coordinator_of(server.url, fleet="other") as second:
        with pytest.raises(
            WrongStore, match="store of fleet 'default', and this coordinator is of fleet 'other'"
        ):
            await lead(second)


@pytest.mark.parametrize(
    ("name", "value"), [("synchronous_commit", "off"), ("synchronous_commit", "local"), ("fsync", "off")]
)
async def test_a_server_that_may_lose_commits_is_refused(
    name: str, value: str, server: PostgresServer
) -> None:
    await server.sql(f"ALTER SYSTEM SET {name} = {value}")
    await server.stop()
    await server.start()
    async with coordinator_of(server.url) as first:
        with pytest.raises(WrongStore, match=f"{name} = {value}: it may lose"):
            await lead(first)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("REVOKE SELECT ON caesura.rollout FROM caesura", "permission denied for table rollout"),
        ("ALTER TABLE caesura.rollout OWNER TO postgres", "permission denied for table rollout"),
        ("DROP TABLE caesura.rollout", "lacks the table caesura.rollout, unlike schema version"),
        ("CREATE TABLE caesura.note (x integer)", "has a table caesura.note, unlike schema version"),
    ],
)
async def test_a_store_that_cannot_be_read_whole_is_not_led_and_takes_no_epoch(
    damage: str, why: str, server: PostgresServer
) -> None:
    async with coordinator_of(server.url) as first:
        started(await lead(first), fleet_of())
        await first.reached()
    before = await server.sql("SELECT epoch FROM caesura.store")
    await server.sql(damage)
    async with coordinator_of(server.url) as second:
        waiting = asyncio.create_task(lead(second))
        await until(lambda: why in second.waits_for)
        assert not second.leads
        assert await server.sql("SELECT epoch FROM caesura.store") == before
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_large_store_is_read_in_chunks_and_not_led_if_somebody_wrote_meanwhile(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from caesura.runtime import postgresql  # noqa: PLC0415

    monkeypatch.setattr(postgresql, "_CHUNK_ROWS", 2)
    async with coordinator_of(server.url) as first:
        store = await lead(first)
        with store.transaction():
            for number in range(7):
                store.save_owner(f"w{number}", "h", 1)
        await first.reached()
        owners = store.owners()
    _, copy = working_copy()
    rows = rows_of(server.url, copy)()
    content = await asyncio.to_thread(rows.try_lead, "two")
    assert content is not None
    assert len(content.rows["owner"][1]) == len(owners) == 7
    rows.close()
    epoch = await server.sql("SELECT epoch FROM caesura.store")
    real = rows._table

    def written(table: str, *more: Any) -> Any:
        with psycopg.connect(server.url) as other:
            other.execute("UPDATE caesura.store SET beat = beat + 1")
        return real(table, *more)

    monkeypatch.setattr(rows, "_table", written)
    with pytest.raises(StoreError, match="another coordinator wrote to it while it was read"):
        await asyncio.to_thread(rows.try_lead, "two")
    assert await server.sql("SELECT epoch FROM caesura.store") == epoch


async def test_who_may_not_lead_any_more_when_everything_is_read_leaves_the_lead_to_others(
    server: PostgresServer,
) -> None:
    _, copy = working_copy()
    first, second = rows_of(server.url, copy, name="one")(), rows_of(server.url, copy, name="two")()
    assert await asyncio.to_thread(first.try_lead, "one", lambda _: False) is None
    assert await server.sql("SELECT epoch FROM caesura.store") == "0"
    assert await asyncio.to_thread(second.try_lead, "two") is not None
    first.close()
    second.close()


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_that_is_not_in_utf8_is_refused(encoding: str, server: PostgresServer) -> None:
    await server.sql(
        f"CREATE DATABASE other OWNER caesura ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0",
        database="postgres",
    )
    async with coordinator_of(server.url.removesuffix("/caesura") + "/other") as shared:
        with pytest.raises(WrongStore, match=f"has the encoding {encoding}, not UTF8: .* ENCODING 'UTF8'"):
            await lead(shared)


async def test_a_coordinator_whose_clock_is_wrong_does_not_lead(server: PostgresServer) -> None:
    off = [0.0]
    _, copy = working_copy()
    rows = rows_of(server.url, copy, clock=lambda: time.time() + off[0])()
    for seconds, why in ((60.0, "60 s ahead of that of the database"), (-60.0, "60 s behind that of")):
        off[0] = seconds
        with pytest.raises(StoreError, match=why):
            await asyncio.to_thread(rows.try_lead, "c")
    off[0] = 0.0
    assert await asyncio.to_thread(rows.try_lead, "c") is not None
    rows.close()


async def test_a_schema_of_an_older_version_is_migrated_by_the_leader(server: PostgresServer) -> None:
    from caesura.runtime.database import Database  # noqa: PLC0415
    from caesura.runtime.postgresql import PostgresRows  # noqa: PLC0415
    from caesura.runtime.postgresql_options import PostgresOptions  # noqa: PLC0415
    from caesura.runtime.shared_rows import TableChanges, columns_of  # noqa: PLC0415

    older = Database(":memory:", MIGRATIONS[:3])
    options = PostgresOptions(url=server.url, fleet="default", name="old", lease_s=_LEASE_S)
    rows = PostgresRows(options, columns_of(older, LEFT_OUT), 3)
    assert rows.try_lead("old") is not None
    rows.write(4, [TableChanges(table="owner", rows=[(1, "w0", "h0", 4)], removed=[])])
    rows.close()
    async with coordinator_of(server.url) as shared:
        store = await lead(shared)
        assert store.owners() == {"w0": ("h0", 4)}
        assert store.epoch() == 4
        started(store, fleet_of())
        await shared.reached()
    assert await server.sql("SELECT version FROM caesura.store") == str(len(MIGRATIONS))
    assert await server.sql("SELECT count(*) FROM caesura.wave_vms") != "0"
    with pytest.raises(NewerStore):
        rows.open()


async def test_a_wrong_password_is_waited_out_and_never_shown() -> None:
    async with PostgresServer(password="correct horse") as server:  # noqa: S106
        async with coordinator_of(server.url, password=Secret("battery staple")) as first:
            waiting = asyncio.create_task(lead(first))
            await until(lambda: "password authentication failed" in first.waits_for)
            assert "battery" not in first.waits_for
            assert first.ping()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        async with coordinator_of(server.url, password=Secret("correct horse")) as first:
            await lead(first)


async def test_the_event_loop_is_not_held_while_the_database_does_not_answer(server: PostgresServer) -> None:
    async with (
        TcpProxy("127.0.0.1", server.port) as proxy,
        coordinator_of(server.url.replace(str(server.port), str(proxy.port))) as shared,
    ):
        store = await lead(shared)
        proxy.stall()
        store.save_epoch(3)
        waiting = asyncio.ensure_future(shared.reached())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not waiting.done()
        await until(lambda: "has not answered" in shared.waiting())
        assert shared.ping()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_the_work_is_done_in_another_thread(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = threading.current_thread()
    for each in ("connect",):
        real = getattr(psycopg, each)

        def checked(*args: Any, real: Any = real, **more: Any) -> Any:
            assert threading.current_thread() is not loops
            return real(*args, **more)

        monkeypatch.setattr(psycopg, each, checked)
    async with coordinator_of(server.url) as shared:
        await lead(shared)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - a state, no event
            await asyncio.sleep(0.01)


async def test_a_leader_that_is_silent_in_the_middle_of_a_query_does_not_keep_the_lock(
    server: PostgresServer,
) -> None:
    """There the server waits without a time limit: a session with the lock, stopped between the messages of one query."""
    async with coordinator_of(server.url, name="two", lease_s=2.0) as second:
        async with coordinator_of(server.url, name="zero", lease_s=2.0) as first:
            await lead(first)
        stuck = psycopg.connect(server.url, autocommit=True, options="-c idle_session_timeout=0")
        try:
            stuck.execute("SELECT pg_advisory_lock(%s)", (0x0CAE_5CA0,))
            await lead(second)
            with pytest.raises(psycopg.OperationalError):
                stuck.execute("SELECT 1")
        finally:
            stuck.close()


async def test_a_standby_goes_by_the_lease_of_the_leader(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from caesura.runtime import postgresql  # noqa: PLC0415

    now = [1000.0]
    monkeypatch.setattr(postgresql, "time", SimpleNamespace(monotonic=lambda: now[0]))
    _, copy = working_copy()
    leader = rows_of(server.url, copy, name="one", lease_s=30.0)()
    hasty = rows_of(server.url, copy, name="two", lease_s=5.0)()
    assert await asyncio.to_thread(leader.try_lead, "one") is not None
    assert await asyncio.to_thread(hasty.try_lead, "two") is None
    now[0] += 20.0
    assert await asyncio.to_thread(hasty.try_lead, "two") is None
    await asyncio.to_thread(leader.beat)
    assert await asyncio.to_thread(hasty.try_lead, "two") is None
    now[0] += 31.0
    await asyncio.to_thread(hasty.try_lead, "two")
    with pytest.raises(StoreError):
        await asyncio.to_thread(leader.beat)
    hasty.close()
    leader.close()


async def test_a_leader_in_a_long_transaction_is_not_ended_while_it_does_something(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a take-over that migrates the store: its signs of life in the row come with the end of the transaction."""
    from caesura.runtime import postgresql  # noqa: PLC0415

    now = [1000.0]
    monkeypatch.setattr(postgresql, "time", SimpleNamespace(monotonic=lambda: now[0]))
    _, copy = working_copy()
    busy, rows = rows_of(server.url, copy, name="one")(), rows_of(server.url, copy, name="two")()
    assert await asyncio.to_thread(busy.try_lead, "one") is not None

    def ended() -> bool:
        now[0] += 10 * _LEASE_S
        assert rows.try_lead("two") is None
        return bool(busy._made.closed)

    with contextlib.suppress(psycopg.Error), busy._made.transaction():
        for _ in range(3):
            assert not await asyncio.to_thread(ended)
            busy._made.execute("UPDATE caesura.store SET beat = beat + 1")
        await asyncio.to_thread(ended)
        await asyncio.to_thread(ended)
        with pytest.raises(psycopg.OperationalError):
            busy._made.execute("SELECT 1")
    rows.close()
    busy.close()


async def test_tls_is_checked_against_the_ca_and_the_name(server: PostgresServer, tmp_path: Path) -> None:
    own = tmp_path / "ca.pem"
    own.write_bytes((await server.with_tls()).read_bytes())
    async with coordinator_of(server.url, ca_file=str(own)) as shared:
        await lead(shared)
        used = "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name LIKE 'caesura%'"
        assert await server.sql(used) == "t"
    async with PostgresServer() as stranger:
        other = tmp_path / "other.pem"
        other.write_bytes((await stranger.with_tls()).read_bytes())
    wrong_name = server.url.replace("127.0.0.1", "localhost")
    for url, ca_file, why in (
        (server.url, other, "certificate verify failed"),
        (wrong_name, own, "does not match host name"),
    ):
        async with coordinator_of(url, ca_file=str(ca_file)) as refused:
            waiting = asyncio.create_task(lead(refused))
            await until(lambda refused=refused, why=why: why in refused.waits_for)  # type: ignore[misc]
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


async def test_a_server_without_a_free_connection_is_waited_for(server: PostgresServer) -> None:
    await server.sql("ALTER ROLE caesura CONNECTION LIMIT 1")
    async with coordinator_of(server.url, name="one") as first:
        await lead(first)
        async with coordinator_of(server.url, name="two") as second:
            waiting = asyncio.create_task(lead(second))
            await until(lambda: "too many connections" in second.waits_for)
            assert second.ping()
            await server.sql("ALTER ROLE caesura CONNECTION LIMIT 2")
            await until(lambda: second.waits_for == "another coordinator leads")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own needs root")
async def test_a_database_whose_disk_is_full_ends_the_lead_and_keeps_what_it_had(
    server: PostgresServer,
) -> None:
    async with coordinator_of(server.url, name="one") as first:
        started(await lead(first), fleet_of())
        await first.reached()
    async with server.small_disk(16 * 1024 * 1024) as disk:
        async with coordinator_of(server.url, name="one") as first:
            store = await lead(first)
            before = everything(store)
            with contextlib.suppress(OSError), (disk / "fills").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with store.transaction():
                for number in range(5000):
                    store.save_owner(f"w{number}", "h0", 3)
            with pytest.raises(StoreLost, match="No space left on device"):
                await first.reached()
            assert not first.leads
        # Nobody keeps the others from the lead, and nothing of what failed is there.
        async with coordinator_of(server.url, name="two") as second:
            assert everything(await lead(second))[1:] == before[1:]
            (disk / "fills").unlink()
            with second.store.transaction():
                for number in range(5000):
                    second.store.save_owner(f"w{number}", "h0", 3)
            await second.reached()
        async with coordinator_of(server.url, name="one") as first:
            assert len((await lead(first)).owners()) == 5000
