"""Following a rollout comes to an end, whatever of it was seen; and what a session says when it cannot go on."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from rich.console import Console

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import BusStats
from caesura.contract import messages as m
from caesura.contract.examples import examples
from caesura.contract.parts import WholeRollout
from caesura.runtime.settings import Secret
from caesura_ctl import follow as following
from caesura_ctl import session as sessions
from caesura_ctl.commands import rollouts
from caesura_ctl.errors import NoBroker, NoCoordinatorAnswer, RefusedByCoordinator
from caesura_ctl.fleet_view import FleetView
from caesura_ctl.options import Context
from caesura_ctl.session import ConnectionNews, Session, connect
from caesura_ctl.settings import CtlSettings
from caesura_ctl.tables import live_view
from caesura_testing.patience import patient
from caesura_testing.rollouts import wave_state, whole_rollout

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)


class Seen:
    """What ``follow`` needs of a session."""

    def __init__(self) -> None:
        self.fleet_view = FleetView()
        self.changed = asyncio.Event()
        self.stats = BusStats(connected=True, connects=1)
        self.connection = ConnectionNews(self.stats, self.fleet_view.missed)

    def hear(self, message: Any) -> None:
        self.fleet_view.fold(message)
        self.changed.set()


def _state(status: m.RolloutStatus, name: str = "r") -> WholeRollout:
    wave = wave_state(
        wave=0,
        status="completed",
        domains={"web": 0},
        hosts=("h",),
        vms=("w1",),
        events={"web": "E"},
        reason=f"wave of {name}",
    )
    return whole_rollout(
        rollout=name,
        update="patch",
        status=status,
        policy=m.Policy(),
        sets=("web",),
        waves=(wave,),
        created_at=T0,
    )


async def _follow(
    seen: Seen, *, terminal: bool = False, as_json: bool = False, shown: io.StringIO | None = None
) -> WholeRollout:
    console = Console(file=io.StringIO() if shown is None else shown, width=140, force_terminal=terminal)
    context = Context(CtlSettings(), as_json, console)
    async with asyncio.timeout(patient(10)):
        return await following.follow(cast("Session", seen), context, "r")


async def test_one_that_was_over_before_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_LAST_FACTS_S", 60.0)
    seen = Seen()
    seen.hear(_state("completed"))
    assert (await _follow(seen)).status == "completed"


async def test_one_whose_first_pauses_were_not_seen_ends_soon_after_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "_LAST_FACTS_S", 0.1)
    seen = Seen()
    seen.hear(_state("running"))
    task = asyncio.create_task(_follow(seen))
    await asyncio.sleep(0)
    seen.hear(_state("completed"))
    assert (await task).status == "completed"


async def test_the_last_facts_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_LAST_FACTS_S", 60.0)
    seen = Seen()
    seen.hear(_state("running"))
    task = asyncio.create_task(_follow(seen))
    await asyncio.sleep(0)
    seen.hear(_state("completed"))
    done, _ = await asyncio.wait({task}, timeout=0.5)
    assert not done
    common: dict[str, Any] = {
        "vm": "w1",
        "host": "h",
        "set": "web",
        "update_domain": 0,
        "operation": "o",
        "at": T0,
    }
    seen.hear(m.OperationReported(operation="o", host="h", epoch=1, rollout="r", status="completed", at=T0))
    seen.hear(
        m.VmResumed(
            **common, method="freeze", pause_s=1, budget_s=9, within_budget=True, resumed_by="updater"
        )
    )
    assert (await task).status == "completed"


def test_the_live_view_shows_the_rollout_that_was_asked_for() -> None:
    seen = FleetView()
    seen.fold(_state("completed", "r"))
    seen.fold(_state("running", "other"))
    console = Console(file=io.StringIO(), width=140)
    console.print(live_view(seen, T0, "r"))
    assert isinstance(console.file, io.StringIO)
    assert "wave of r" in console.file.getvalue()
    assert "wave of other" not in console.file.getvalue()


# -- the broker goes away --


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(patient(10)):
        while not condition():  # noqa: ASYNC110 - what is written to a stream announces itself to nobody
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("as_json", [False, True])
async def test_a_lost_connection_is_said_once_and_its_return_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, as_json: bool
) -> None:
    monkeypatch.setattr(following, "REFRESH_S", 0.001)
    seen = Seen()
    seen.hear(_state("running"))
    said: list[str] = []

    def heard(words: str) -> Callable[[], bool]:
        def look() -> bool:
            said.append(capsys.readouterr().err)
            return words in "".join(said)

        return look

    task = asyncio.create_task(_follow(seen, as_json=as_json))
    seen.stats.connected = False
    await _until(heard("connection to the broker lost, trying again"))
    seen.stats.connected, seen.stats.connects = True, 2
    await _until(heard("connected to the broker again"))
    seen.hear(_state("aborted"))
    await task
    said.append(capsys.readouterr().err)
    lines = "".join(said).splitlines()
    assert len(lines) == 2, lines
    if as_json:
        assert [list(json.loads(line)) for line in lines] == [["note"], ["note"]]


async def test_a_terminal_shows_that_the_connection_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(following, "REFRESH_S", 0.001)
    monkeypatch.setenv("TERM", "xterm")
    seen, shown = Seen(), io.StringIO()
    seen.hear(_state("running"))
    task = asyncio.create_task(_follow(seen, terminal=True, shown=shown))
    await _until(lambda: "rollout" in shown.getvalue().lower())
    assert "lost" not in shown.getvalue()
    seen.stats.connected = False
    await _until(lambda: "connection to the broker lost, trying again" in shown.getvalue())
    seen.stats.connected, seen.stats.connects = True, 2
    await _until(lambda: seen.connection.up)
    shown.truncate(0)
    seen.hear(_state("aborted"))
    await task
    assert "lost" not in shown.getvalue()
    assert capsys.readouterr().err == "", "it would break the live view up"


def test_a_connection_that_was_back_before_one_looked_was_lost_all_the_same() -> None:
    missed: list[bool] = []
    stats = BusStats(connected=True, connects=1)
    connection = ConnectionNews(stats, lambda: missed.append(True))
    assert connection.news() == []
    stats.connects = 2
    assert len(connection.news()) == 2
    assert missed == [True]
    assert connection.news() == []


# -- what pauses are of --


async def test_json_says_whether_it_holds_every_pause(capsys: pytest.CaptureFixture[str]) -> None:
    seen = Seen()
    seen.hear(_state("completed"))
    context = Context(CtlSettings(), True, Console(file=io.StringIO()))
    following.conclude(cast("Session", seen), context, seen.fleet_view.rollouts["r"])
    told = json.loads(capsys.readouterr().out)
    assert (told["pauses"], told["pauses_complete"]) == ([], False)


# -- what is said when there is no answer, or a refusal --


@asynccontextmanager
async def _session() -> AsyncIterator[Session]:
    bus = MemoryBus(MemoryBroker(), filters=["caesura/v1/#"])
    session = Session(bus, "ops")
    running = asyncio.create_task(bus.run(session.post.deliver))
    try:
        assert await bus.wait_connected(patient(5))
        yield session
    finally:
        await bus.close()
        await running


@pytest.mark.parametrize(
    ("online", "words"),
    [
        (True, r"\(c-1\) is on the bus but silent\. Its log and its /ready say why"),
        (False, r"is not on the bus\. Is caesura-coordinator running\?"),
    ],
)
async def test_a_coordinator_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, words: str, *, online: bool
) -> None:
    monkeypatch.setattr(sessions, "ANSWER_S", 0.01)
    monkeypatch.setattr(sessions, "_REPEAT_S", 0.01)
    async with _session() as session:
        session.fleet_view.fold(m.CoordinatorPresence(coordinator="c-1", epoch=1, online=online))
        with pytest.raises(NoCoordinatorAnswer, match=words):
            await session.ask(m.AbortRequested(request="q"))


async def test_an_update_whose_file_a_host_refused_is_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inventory = next(each.message for each in examples() if isinstance(each.message, m.HostInventory))
    refused = (
        m.RefusedUpdate(file="three.toml", line=3, reason="no"),
        m.RefusedUpdate(file="a", reason="no"),
    )

    async def ask(request: Any) -> m.RequestAnswered:
        return m.RequestAnswered(request=request.request, accepted=False, reason="three: no host defines it")

    async with _session() as session:
        for host, files in (("host-1", refused), ("host-2", refused), ("host-3", ())):
            changes = {"host": host, "refused_updates": files}
            session.fleet_view.fold(m.HostInventory(**{**_fields(inventory), **changes}))
        monkeypatch.setattr(session, "ask", ask)
        context = Context(CtlSettings(), False, Console(file=io.StringIO()))
        request = m.RolloutRequested(request="q", update="three")
        words = "no host defines it; three.toml was refused by host-1, host-2: see caesura updates"
        with pytest.raises(RefusedByCoordinator, match=re.escape(words)):
            await rollouts._start(session, context, request, detach=False)
        other = m.RolloutRequested(request="q", update="four")
        with pytest.raises(RefusedByCoordinator, match=r"no host defines it$"):
            await rollouts._start(session, context, other, detach=False)


def _fields(message: m.HostInventory) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


# -- why the broker does not let us in --


async def _broker_that_answers(answer: bytes) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("username", "words"),
    [
        ("ops", "Check the password of user 'ops'"),
        ("", "CAESURA_CTL_BROKER_USERNAME and CAESURA_CTL_BROKER_PASSWORD_FILE"),
    ],
)
async def test_a_refused_user_is_told_about_users(username: str, words: str) -> None:
    not_authorized = bytes((0x20, 3, 0, 0x87, 0))  # CONNACK of MQTT 5 with reason 0x87
    server = await _broker_that_answers(not_authorized)
    url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    settings = CtlSettings(broker_url=url, broker_username=username, broker_password=Secret("wrong"))
    async with server:
        with pytest.raises(NoBroker) as told:
            async with connect(settings, connect_s=patient(1)):
                pass
    assert "Not authorized" in str(told.value)
    assert words in str(told.value)
    assert "Start" not in str(told.value)
    assert "cannot reach" not in str(told.value)


async def test_where_nothing_listens_the_advice_is_to_start_it() -> None:
    server = await _broker_that_answers(b"")
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    words = "cannot reach the broker at .*nothing listens.* Start the broker.*--broker"
    with pytest.raises(NoBroker, match=words):
        async with connect(CtlSettings(broker_url=f"mqtt://127.0.0.1:{port}"), connect_s=patient(1)):
            pass
