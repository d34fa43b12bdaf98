"""The live page's HTTP side, over real sockets: what streams, resumes, is slow, is too many, and ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import aiohttp
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from caesura.bus.brokers import free_port
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import Delivery
from caesura.bus.post import Post
from caesura.contract import messages as m
from caesura.runtime.health import serve_health
from caesura.testing.collector import eventually
from caesura_metrics_exporter.page import SECURITY_HEADERS, LivePage, own_host
from caesura_metrics_exporter.service import MetricsExporter, filters
from caesura_metrics_exporter.settings import MetricsExporterSettings
from caesura_metrics_exporter.stream import LiveStream


class Event(msgspec.Struct):
    """One server-sent event."""

    name: str
    id: str
    data: dict[str, Any]


class Stream:
    """Reads a stream as a browser does."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.comments: list[str] = []
        self.retry_ms = 0

    async def next(self) -> Event | None:
        """The next event; None at the end of the stream."""
        event = Event("message", "", {})
        async with asyncio.timeout(10):
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
                    case "" if text:
                        self.comments.append(text)
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
        self, session: aiohttp.ClientSession, port: int, exporter: MetricsExporter, post: Post
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
    *, readers: int = 8, heartbeat_s: float = 15.0, stall_s: float = 30.0, page_hosts: tuple[str, ...] = ()
) -> AsyncIterator[Scene]:
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="exporter", filters=filters())
    speaker = MemoryBus(broker, client_id="speaker")
    exporter = MetricsExporter(MetricsExporterSettings(), bus)
    exporter.stream = LiveStream(
        exporter.live, time.time, exporter.broker_ping, readers=readers, least_s=0.05
    )
    page = LivePage(exporter.stream, heartbeat_s=heartbeat_s, stall_s=stall_s, page_hosts=page_hosts)
    port = free_port()
    tasks = [
        asyncio.create_task(each) for each in (exporter.run_bus(), exporter.stream.run(), speaker.run(silent))
    ]
    try:
        assert await bus.wait_connected(5)
        assert await speaker.wait_connected(5)
        async with (
            serve_health(f"127.0.0.1:{port}", {}, CollectorRegistry(), extend=page.extend),
            aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
        ):
            yield Scene(session, port, exporter, Post(speaker, "/caesura/test"))
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
                async with asyncio.timeout(30):
                    while scene.exporter.stream.readers == 2:
                        # Every lane changes again and again: more than the kernel takes for a reader that is stuck.
                        for lane in range(2000):
                            await scene.freeze(number + lane, set=f"set-{lane}", vm=f"again-{number}-{lane}")
                        number += 2000
                        await stream.until_paused(number)
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


async def test_a_silent_stream_shows_signs_of_life() -> None:
    async with scenery(heartbeat_s=0.02) as scene, scene.stream() as stream:
        await stream.next()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await stream.next()
        assert "still here" in stream.comments


async def test_the_end_of_the_exporter_ends_the_streams() -> None:
    async with aiohttp.ClientSession() as session:
        async with scenery() as scene:
            stream = Stream(await session.get(f"http://127.0.0.1:{scene.port}/live/events"))
            assert await stream.next()
            began = time.monotonic()
        assert time.monotonic() - began < 1.5, "nothing waited for the open stream"
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


async def test_the_page_needs_nothing_from_elsewhere(scene: Scene) -> None:
    text = await (await scene.session.get("/")).text()
    assert "{{" not in text
    for reference in ("http://", "https://", "//", "style=", "onclick", "<script>"):
        for quote in ('"', "'"):
            assert f"={quote}{reference}" not in text
    assert "<script>" not in text
    assert " style=" not in text


async def test_a_strangers_name_for_this_machine_is_refused(scene: Scene) -> None:
    for path in ("/", "/live/state", "/live/events", "/page/page.js"):
        answer = await scene.session.get(path, headers={"Host": "rebound.example.com"})
        assert answer.status == 421
        assert "CAESURA_METRICS_EXPORTER_PAGE_HOSTS" in await answer.text()
    assert (await scene.session.get("/metrics", headers={"Host": "rebound.example.com"})).status == 200


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
            async with asyncio.timeout(20):
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
            async with asyncio.timeout(10):
                assert await process.wait() == 0
            assert time.monotonic() - began < 5
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
