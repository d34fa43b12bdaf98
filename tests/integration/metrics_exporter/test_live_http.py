"""The live page's HTTP side, over real sockets: what streams, resumes, is slow, is too many, and ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import msgspec
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from caesura.bus.local_broker import free_port
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.port import Delivery
from caesura.contract import messages as m
from caesura.runtime.health import serve_health
from caesura.runtime.listen import own_host
from caesura.runtime.settings import SettingsError, read_settings
from caesura_metrics_exporter import __main__ as command
from caesura_metrics_exporter.live.page import SECURITY_HEADERS, LivePage
from caesura_metrics_exporter.live.stream import LiveStream
from caesura_metrics_exporter.metrics.scrape import Scrape
from caesura_metrics_exporter.service import MetricsExporter, filters
from caesura_metrics_exporter.settings import MetricsExporterSettings
from caesura_testing.collector import eventually
from caesura_testing.patience import patient
from caesura_testing.rollouts import announce, whole_rollout


class Event(msgspec.Struct):
    """One server-sent event."""

    name: str
    id: str
    data: dict[str, Any]


class Stream:
    """Reads a stream as a browser does."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.beats: list[float] = []
        self.again = False
        self.retry_ms = 0

    async def next(self) -> Event | None:
        """The next event; None at the end of the stream."""
        event = Event("message", "", {})
        async with asyncio.timeout(patient(10)):
            while line := (await self.response.content.readline()).decode():
                name, _, text = line.rstrip("\n").partition(": ")
                match name:
                    case "event":
                        event.name = text
                    case "id":
                        event.id = text
                    case "data":
                        event.data = json.loads(text)
                    case "retry":
                        self.retry_ms = int(text)
                    case "" if event.name == "beat":
                        self.beats.append(event.data["now"])
                        event = Event("message", "", {})
                    case "" if event.name == "again":
                        self.again = True
                    case "" if event.id:
                        return event
        return None

    async def until_paused(self, count: int) -> Event:
        """Read on until so many VMs stand still."""
        while True:
            event = await self.next()
            assert event is not None, "the stream ended"
            if (event.data.get("fleet") or {}).get("paused") == count:
                return event


class Scene:
    """An exporter on a bus in memory, its page on a real port, and somebody who speaks."""

    def __init__(
        self, session: aiohttp.ClientSession, port: int, exporter: MetricsExporter, post: MessageClient
    ) -> None:
        self.session = session
        self.port = port
        self.exporter = exporter
        self.post = post

    @asynccontextmanager
    async def stream(self, **headers: str) -> AsyncIterator[Stream]:
        async with self.session.get("/live/events", headers=headers) as response:
            assert response.status == 200, await response.text()
            yield Stream(response)

    async def freeze(self, number: int, **more: Any) -> None:
        given: dict[str, Any] = {"set": "web", "update_domain": 0, "vm": f"web-{number}", **more}
        message = m.VmFrozen(
            host="host-1", operation="op", method="freeze", budget_s=5, at=datetime.now(UTC), **given
        )
        where: dict[str, Any] = {
            "host": message.host,
            "set": message.set,
            "ud": message.update_domain,
            "vm": message.vm,
        }
        await self.post.send(message, **where)


async def silent(_: Delivery) -> None:
    """The speaker hears nothing."""


@asynccontextmanager
async def scenery(
    *, readers: int = 8, wall: Callable[[], float] = time.time, **page: Any
) -> AsyncIterator[Scene]:
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="exporter", filters=filters())
    speaker = MemoryBus(broker, client_id="speaker")
    exporter = MetricsExporter(MetricsExporterSettings(), bus, wall=wall)
    exporter.stream = LiveStream(
        exporter.live, wall, time.monotonic, exporter.broker_ping, readers=readers, least_s=0.05
    )
    live_page = LivePage(exporter.stream, **page)
    port = free_port()
    tasks = [
        asyncio.create_task(each) for each in (exporter.run_bus(), exporter.stream.run(), speaker.run(silent))
    ]
    try:
        assert await bus.wait_connected(patient(5))
        assert await speaker.wait_connected(patient(5))
        async with (
            serve_health(f"127.0.0.1:{port}", {}, CollectorRegistry(), extend=live_page.extend),
            aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
        ):
            yield Scene(session, port, exporter, MessageClient(speaker, "/caesura/test"))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with scenery() as made:
        yield made


async def test_a_snapshot_then_what_changes(scene: Scene) -> None:
    await scene.freeze(1)
    async with scene.stream() as stream:
        first = await stream.next()
        assert first is not None
        assert (first.name, first.data["whole"], stream.retry_ms) == ("snapshot", True, 1000)
        await scene.freeze(2)
        second = await stream.until_paused(2)
        assert (second.name, second.data["whole"]) == ("change", False)
        assert [lane["lane"] for lane in second.data["lanes"]] == ["web/ud/0"]
        assert {each["vm"] for each in second.data["paused"]} == {"web-1", "web-2"}
        assert [line["vm"] for line in second.data["log"]] == ["web-2"], "only what is new"
        assert second.data.get("rollouts") is None, "what did not change is not sent"


async def test_who_comes_back_gets_what_it_missed(scene: Scene) -> None:
    async with scene.stream() as stream:
        await scene.freeze(1)
        last = (await stream.until_paused(1)).id
    await scene.freeze(2)
    async with scene.stream(**{"Last-Event-ID": last}) as stream:
        missed = await stream.until_paused(2)
    assert missed.name == "change"
    assert [line["vm"] for line in missed.data["log"]] == ["web-2"]


@pytest.mark.parametrize("last", ["", "nonsense", "00000000-1", "-5", "x-²", "x-" + "9" * 400, "same-999999"])
async def test_who_comes_with_another_id_starts_anew(scene: Scene, last: str) -> None:
    await scene.freeze(1)
    async with scene.stream() as stream:
        boot = (await stream.until_paused(1)).id.partition("-")[0]
    async with scene.stream(
        **{"Last-Event-ID": last.replace("x-", f"{boot}-").replace("same", boot)}
    ) as stream:
        event = await stream.next()
    assert event is not None
    assert event.name == "snapshot"


async def test_a_storm_is_few_events(scene: Scene) -> None:
    async with scene.stream() as stream:
        began = time.monotonic()
        for number in range(3000):
            await scene.freeze(number)
        events = 0
        while True:
            event = await stream.next()
            assert event is not None
            events += 1
            if (event.data.get("fleet") or {}).get("paused") == 3000:
                break
        assert events <= (time.monotonic() - began) / 0.05 + 2
        assert len(event.data["paused"]) == 200, "the rest is a number"


def _is_held(port: int, peer: int) -> bool:
    """Whether a process has the connection open, by the kernel's table: what is only being flushed has no inode."""
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, local, remote, *_, inode = line.split()[:10]
        if (int(local[-4:], 16), int(remote[-4:], 16)) == (port, peer) and inode != "0":
            return True
    return False


async def test_a_reader_that_takes_nothing_slows_nobody_and_is_cut() -> None:
    async with scenery(stall_s=1.0) as scene:
        for number in range(2000):
            await scene.freeze(number, set=f"set-{number}")
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", scene.port))
        stuck.sendall(b"GET /live/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        try:
            async with scene.stream() as stream:
                await stream.until_paused(2000)
                await eventually(lambda: scene.exporter.stream.readers == 2)
                number = 2000
                async with asyncio.timeout(patient(30)):
                    while scene.exporter.stream.readers == 2:
                        # Every lane changes again and again: more than the kernel takes for a reader that is stuck.
                        for lane in range(2000):
                            await scene.freeze(number + lane, set=f"set-{lane}", vm=f"again-{number}-{lane}")
                        number += 2000
                        await stream.until_paused(number)
            # It is still there, but what was to be sent to it is not kept.
            await eventually(lambda: not _is_held(scene.port, stuck.getsockname()[1]))
        finally:
            stuck.close()


async def test_too_many_readers_are_told_so_and_room_is_given_back() -> None:
    async with scenery(readers=2) as scene:
        async with scene.stream() as one, scene.stream() as two:
            assert await one.next()
            assert await two.next()
            async with scene.session.get("/live/events") as third:
                assert third.status == 503
                assert third.headers["Retry-After"] == "10"
                assert "2 live streams are open" in await third.text()
            assert (await scene.session.get("/live/state")).status == 200
        await eventually(lambda: scene.exporter.stream.readers == 0)
        async with scene.stream() as again:
            assert await again.next()


async def test_a_silent_stream_shows_signs_of_life_and_the_clock() -> None:
    clock = [1_790_000_000.0]
    async with scenery(heartbeat_s=0.02, wall=lambda: clock[0]) as scene, scene.stream() as stream:
        first = await stream.next()
        assert first is not None
        assert first.data["now"] == clock[0]
        clock[0] += 1.0  # no jump, and no news
        async with asyncio.timeout(patient(10)):
            while clock[0] not in stream.beats:  # a change during the start may come first
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await stream.next()
        async with scene.stream() as later:
            event = await later.next()
            assert event is not None
            assert event.data["now"] == clock[0], "what is shared is sent with the time of sending"


async def test_who_goes_gives_its_place_back_at_once() -> None:
    async with scenery(heartbeat_s=60.0) as scene:
        async with scene.stream() as stream:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    while await stream.next():
                        pass
            assert scene.exporter.stream.readers == 1
        # Nothing is written to it that would fail.
        await eventually(lambda: scene.exporter.stream.readers == 0)


async def test_who_is_gone_before_the_answer_is_no_error(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", scene.port)
        writer.write(b"GET /live/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        writer.transport.abort()
    async with scene.stream() as stream:
        assert await stream.next()
    await eventually(lambda: scene.exporter.stream.readers == 0)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_stream_ends_after_a_while_and_says_come_again() -> None:
    async with scenery(lifetime_s=0.1, heartbeat_s=0.02) as scene, scene.stream() as stream:
        while await stream.next():
            pass
        assert stream.again


async def test_a_head_request_takes_no_stream(scene: Scene) -> None:
    assert (await scene.session.head("/live/events")).status == 405
    assert (await scene.session.head("/")).status == 200


async def test_pages_of_other_sites_take_no_streams(scene: Scene) -> None:
    for path in ("/live/events", "/live/state"):
        foreign = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        assert (await scene.session.get(path, headers=foreign)).status == 403
        async with scene.session.get(path, headers={"Sec-Fetch-Site": "same-origin"}) as own:
            assert own.status == 200
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert (await scene.session.get("/", headers=linked)).status == 200, "a link to the page works"


async def test_many_polls_share_one_encoding(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Mock(wraps=scene.exporter.live.snapshot)
    monkeypatch.setattr(scene.exporter.live, "snapshot", snapshot)
    scene.exporter.stream._least_s = 5.0
    answers = await asyncio.gather(*(scene.session.get("/live/state") for _ in range(20)))
    assert len({(await answer.json())["revision"] for answer in answers}) == 1
    snapshot.assert_called_once()


async def test_where_encoding_takes_long_changes_come_more_seldom(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = scene.exporter.stream._encode
    monkeypatch.setattr(scene.exporter.stream, "_encode", lambda change: (encode(change)[0], 0.05))

    async def speak() -> None:
        for number in range(10_000):
            await scene.freeze(number)
            await asyncio.sleep(0.01)

    speaking = asyncio.create_task(speak())
    try:
        async with scene.stream() as stream:
            heard = []
            for _ in range(4):
                assert await stream.next()
                heard.append(time.monotonic())
    finally:
        speaking.cancel()
    assert heard[-1] - heard[-2] > 0.9, "0.05 s of work, one twentieth of the time"


async def test_the_end_of_the_exporter_ends_the_streams() -> None:
    async with aiohttp.ClientSession() as session:
        async with scenery() as scene:
            stream = Stream(await session.get(f"http://127.0.0.1:{scene.port}/live/events"))
            assert await stream.next()
            began = time.monotonic()
        assert time.monotonic() - began < patient(1.5), "nothing waited for the open stream"
        assert await stream.next() is None


async def test_the_state_is_the_snapshot(scene: Scene) -> None:
    await scene.freeze(1)
    async with scene.stream() as stream:
        event = await stream.until_paused(1)
    answer = await scene.session.get("/live/state")
    state = await answer.json()
    assert state["whole"]
    assert state["paused"] == event.data["paused"]
    assert {lane["lane"] for lane in state["lanes"]} == {"web/ud/0"}
    assert answer.headers["Cache-Control"] == "no-store"
    assert state["fleet"]["paused"] == 1


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/page/style.css", "text/css"),
        ("/page/page.js", "text/javascript"),
        ("/page/chart.js", "text/javascript"),
        ("/page/mark.svg", "image/svg+xml"),
        ("/live/state", "application/json"),
    ],
)
async def test_every_answer_is_guarded(scene: Scene, path: str, kind: str) -> None:
    answer = await scene.session.get(path)
    assert (answer.status, answer.content_type) == (200, kind)
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers[name] == value
    assert (await scene.session.post(path)).status == 405, "the page only reads"
    tag = answer.headers.get("ETag")
    if tag:
        assert (await scene.session.get(path, headers={"If-None-Match": tag})).status == 304


class Wants(HTMLParser):
    """What a page asks a browser for, and what it carries in itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.paths: set[str] = set()
        self.inline: list[str] = []
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        self.inline += [name for name, _ in attrs if name == "style" or name.startswith("on")]
        self.paths |= {value or "" for name, value in attrs if name in {"src", "href", "action", "srcset"}}

    def handle_endtag(self, _: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in {"script", "style"} and data.strip():
            self.inline.append(data)


async def test_the_page_needs_nothing_from_elsewhere(scene: Scene) -> None:
    text = await (await scene.session.get("/")).text()
    assert "{{" not in text
    wants = Wants(text)
    assert wants.inline == []
    files = {path for path in wants.paths if path.startswith("page/")}
    assert {"page/page.js", "page/style.css", "page/mark.svg"} <= files
    assert wants.paths - files == {"#lanes", "#alarms", "live/state", "metrics"}
    found = set()
    for name in ("page.js", "model.js", "chart.js", "tables.js", "style.css", "mark.svg"):
        body = await (await scene.session.get(f"/page/{name}")).text()
        found |= set(re.findall(r"[a-z]+://[^\s\"'`)]+|@import.*|url\((?!\"?#)[^)]*\)", body))
        found |= {
            path for path in re.findall(r'(?:from|import\(?) *["\']([^"\']+)', body) if path[:2] != "./"
        }
        assert "eval(" not in body
        assert "innerHTML =" not in body
    assert found == {"http://www.w3.org/2000/svg"}, "a name, which nobody fetches"


async def test_a_strangers_name_for_this_machine_is_refused(scene: Scene) -> None:
    for path in ("/", "/live/state", "/live/events", "/page/page.js"):
        answer = await scene.session.get(path, headers={"Host": "rebound.example.com"})
        assert answer.status == 421
        assert "CAESURA_METRICS_EXPORTER_PAGE_HOSTS" in await answer.text()
    assert (await scene.session.get("/metrics", headers={"Host": "rebound.example.com"})).status == 200


async def test_names_that_are_set_are_known() -> None:
    async with scenery(page_hosts=("Ops.example.com",)) as scene:
        for path in ("/", "/live/state"):
            answer = await scene.session.get(path, headers={"Host": "ops.example.com:9310"})
            assert answer.status == 200


async def test_what_the_broker_forgets_the_page_forgets(scene: Scene) -> None:
    record = m.VmRecord(vm="web-1", set="web", update_domain=0, state="running")
    inventory = m.HostInventory(host="host-1", driver="process", epoch=1, vms=(record,))
    rollout = whole_rollout(
        rollout="r1",
        update="patch",
        status="running",
        policy=m.Policy(),
        sets=("web",),
        waves=(),
        created_at=datetime.now(UTC),
    )
    await scene.post.send(inventory, host="host-1")
    await announce(scene.post, rollout)
    live = scene.exporter.live
    await eventually(lambda: len(live.snapshot(0).rollouts or ()) == 1)
    for topic in ("caesura/v1/host/host-1/inventory", "caesura/v1/fleet/rollout/r1"):
        await scene.exporter.deliver(Delivery(topic, b"", retained=True))
    change = live.snapshot(0)
    assert change.rollouts == ()
    assert change.fleet is not None
    assert (change.fleet.hosts, change.fleet.vms) == (0, 0)


@pytest.mark.parametrize(
    ("host", "known", "allowed"),
    [
        ("127.0.0.1:9310", (), True),
        ("[::1]:9310", (), True),
        ("[fe80::1]", (), True),
        ("localhost:9310", (), True),
        ("page.localhost", (), True),
        ("metrics-exporter:9310", (), True),
        ("ops.example.com", (), False),
        ("ops.example.com:9310", ("ops.example.com",), True),
        ("OPS.example.com", ("ops.example.com",), True),
        ("anything.example.com", ("*",), True),
        ("", (), False),
        ("1.2.3.4.example.com", (), False),
        ("127.0.0.1.", (), False),
    ],
)
def test_whose_name_it_is(host: str, known: tuple[str, ...], *, allowed: bool) -> None:
    assert own_host(host, frozenset(known)) is allowed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_command_serves_before_the_broker_is_there_and_stops_with_streams_open(
    number: signal.Signals,
) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "caesura_metrics_exporter",
        env={
            **os.environ,
            "CAESURA_METRICS_EXPORTER_BROKER_URL": f"mqtt://127.0.0.1:{free_port()}",
            "CAESURA_METRICS_EXPORTER_LISTEN": f"127.0.0.1:{port}",
            "CAESURA_METRICS_EXPORTER_LOG_LEVEL": "error",
        },
    )
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with asyncio.timeout(patient(20)):
                while True:
                    with suppress(aiohttp.ClientError):
                        answer = await session.get("/live/events")
                        break
                    await asyncio.sleep(0.02)  # a process that starts announces its port to nobody
            stream = Stream(answer)
            event = await stream.next()
            assert event is not None
            assert event.data["fleet"]["broker"].startswith("not connected: ")
            assert (await session.get("/")).status == 200
            began = time.monotonic()
            process.send_signal(number)
            assert await stream.next() is None
            async with asyncio.timeout(patient(10)):
                assert await process.wait() == 0
            assert time.monotonic() - began < patient(5)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_the_command_puts_its_parts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that are set reach the page, its own name is known, and both ports scrape in a thread."""

    async def told(_: Scrape, __: web.Request) -> web.Response:
        return web.Response(text="by the thread")

    async def serving(*_: Any, **__: Any) -> None:
        for each in ports:
            answer = await session.get(f"http://127.0.0.1:{each}/metrics")
            assert await answer.text() == "by the thread"
        for name, status in (("ops.example.com", 200), ("my.example.com", 200), ("x.example.com", 421)):
            answer = await session.get(f"http://127.0.0.1:{ports[0]}/", headers={"Host": name})
            assert answer.status == status

    ports = free_port(), free_port()
    monkeypatch.setattr(Scrape, "handle", told)
    monkeypatch.setattr(command, "serve", serving)
    monkeypatch.setattr(command, "gethostname", lambda: "my.example.com")
    async with aiohttp.ClientSession() as session:
        await command._main(
            MetricsExporterSettings(
                listen=f"127.0.0.1:{ports[0]}",
                health_listen=f"127.0.0.1:{ports[1]}",
                page_hosts=("ops.example.com",),
            )
        )


@pytest.mark.parametrize("given", ['["ops.example.com:9310"]', '["https://x"]', '[""]', "ops.example.com"])
def test_names_that_never_match_are_refused(given: str) -> None:
    name = "CAESURA_METRICS_EXPORTER_PAGE_HOSTS"
    with pytest.raises(SettingsError, match=r"PAGE_HOSTS=.*Expected `(str` matching|array.*\[\"one\")"):
        read_settings(MetricsExporterSettings, "CAESURA_METRICS_EXPORTER_", {name: given})


@pytest.mark.parametrize("given", ['["ops.example.com", "a_b"]', '["*"]', "[]"])
def test_names_that_may_match_are_taken(given: str) -> None:
    name = "CAESURA_METRICS_EXPORTER_PAGE_HOSTS"
    taken = read_settings(MetricsExporterSettings, "CAESURA_METRICS_EXPORTER_", {name: given})
    assert list(taken.page_hosts) == json.loads(given)
