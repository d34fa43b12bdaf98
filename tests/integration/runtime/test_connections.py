"""Idle, slow and too many HTTP clients, over real sockets: each listener bounds its own, and serves whoever asks."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.runtime.connections import Bounds, fair_share
from caesura.runtime.health import serve_app, serve_health
from caesura_metadata_publisher import http as publisher_http
from caesura_metadata_publisher.http import serve_metadata
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.service import MetadataPublisher
from caesura_metadata_publisher.settings import MetadataPublisherSettings
from caesura_testing.collector import eventually
from caesura_testing.patience import patient

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
QUICK = Bounds(connections=4, head_s=0.2, idle_s=60.0)
"""The deadline of a head is short, so that a test need not wait; that of an idle connection never comes."""
PATIENT = Bounds(connections=4, head_s=60.0, idle_s=60.0)

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Served:
    """An application that answers at once, and one path that answers when it is told to."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.busy = 0
        self.clients: list[Client] = []
        self.port = 0

    def app(self) -> web.Application:
        async def now(_: web.Request) -> web.Response:
            return web.Response(text="here")

        async def later(_: web.Request) -> web.Response:
            self.busy += 1
            await self.release.wait()
            return web.Response(text="late")

        async def body(request: web.Request) -> web.Response:
            self.busy += 1
            return web.Response(text=await request.text())

        app = web.Application()
        app.router.add_get("/", now)
        app.router.add_post("/", body)
        app.router.add_get("/later", later)
        return app

    async def client(self, sent: bytes = b"") -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.clients.append((reader, writer))
        writer.write(sent)
        return reader, writer


@asynccontextmanager
async def served(bounds: Bounds) -> AsyncIterator[Served]:
    scene = Served()
    try:
        async with serve_app(scene.app(), "127.0.0.1:0", bounds=bounds) as address:
            scene.port = int(address.rpartition(":")[2])
            yield scene
            scene.release.set()
    finally:
        for _, writer in scene.clients:
            writer.close()


async def answer(client: Client) -> str:
    """The body of the next answer; empty when the connection was closed in its place."""
    reader, _ = client
    async with asyncio.timeout(patient(20)):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return ""
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return (await reader.readexactly(int(length.partition(b":")[2]))).decode()


async def test_idle_clients_make_place_for_one_that_asks() -> None:
    async with served(PATIENT) as scene:
        idle = [await scene.client() for _ in range(12)]
        assert await answer(await scene.client(GET)) == "here"
        assert await answer(idle[0]) == "", "the one that waited the longest was cut"


async def test_a_client_that_sends_its_request_byte_by_byte_is_cut_and_a_kept_connection_is_not() -> None:
    async with served(QUICK) as scene:
        kept = await scene.client(GET)
        assert await answer(kept) == "here"
        slow = await scene.client(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        ended = asyncio.ensure_future(answer(slow))
        while not ended.done():
            slow[1].write(b"a")
            await asyncio.sleep(0.02)  # the client's own pace; `answer` bounds the whole
        assert ended.result() == ""
        kept[1].write(GET)
        assert await answer(kept) == "here", "it was idle for longer than a head may take"


async def test_a_kept_connection_has_the_same_time_for_its_next_request() -> None:
    async with served(QUICK) as scene:
        kept = await scene.client(GET)
        assert await answer(kept) == "here"
        kept[1].write(b"GET / HT")
        assert await answer(kept) == ""


async def test_a_kept_connection_whose_request_had_a_body_may_be_idle_as_long_as_any() -> None:
    """Its body came while the request was being answered: that is no begin of a next head."""
    async with served(QUICK) as scene:
        kept = await scene.client(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n")
        await eventually(lambda: scene.busy == 1)
        kept[1].write(b"here")
        assert await answer(kept) == "here"
        for _ in range(2):  # each takes as long as a head may
            assert await answer(await scene.client(b"GET / HT")) == ""
        kept[1].write(GET)
        assert await answer(kept) == "here"


async def test_requests_that_are_being_answered_are_neither_cut_nor_replaced() -> None:
    async with served(QUICK) as scene:
        busy = [await scene.client(GET.replace(b"/ ", b"/later ")) for _ in range(4)]
        await eventually(lambda: scene.busy == 4)
        assert await answer(await scene.client(GET)) == "", "there is no place"
        scene.release.set()
        assert [await answer(each) for each in busy] == ["late"] * 4
        assert await answer(await scene.client(GET)) == "here"


@pytest.fixture
def closed_at_the_end() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """The process has no free descriptor."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare: list[int] = []
    highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    try:
        while True:
            try:
                spare.append(os.dup(0))
            except OSError:
                break
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in spare:
            os.close(each)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def vms(*names: str) -> list[Listener]:
    return [Listener(name, "127.0.0.1:0") for name in names]


def publisher() -> MetadataPublisher:
    settings = MetadataPublisherSettings(broker_url="mqtt://unused", listeners_file="unused")
    return MetadataPublisher(settings, MemoryBus(MemoryBroker(), client_id="p"))


async def test_without_descriptors_little_is_logged_and_the_listener_recovers(
    closed_at_the_end: ExitStack,
) -> None:
    async with serve_metadata(publisher(), vms("w1")) as (address,):
        port = int(address.rpartition(":")[2])
        # Their descriptors are there already.
        clients = [closed_at_the_end.enter_context(socket.socket()) for _ in range(8)]
        problems: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        with structlog.testing.capture_logs() as logs:
            with no_descriptors_left():
                for each in clients:
                    each.setblocking(False)
                    await asyncio.get_running_loop().sock_connect(each, ("127.0.0.1", port))
                await eventually(
                    lambda: bool(problems) or any("accept" in str(each["event"]) for each in logs)
                )
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(clients[0], GET)
            async with asyncio.timeout(patient(20)):
                assert (await loop.sock_recv(clients[0], 100)).startswith(b"HTTP/1.1 404")
        assert not problems, "asyncio logs each of them with a traceback"
        assert len([each for each in logs if "accept" in str(each["event"])]) == 1


async def test_one_vms_connections_keep_neither_another_vm_nor_the_probe_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if the process had few descriptors: the VMs share them, and none can have another's.
    monkeypatch.setattr(resource, "getrlimit", lambda _: (148, 148))
    probe = socket.socket()
    probe.bind(("127.0.0.1", 0))
    health = f"127.0.0.1:{probe.getsockname()[1]}"
    probe.close()
    async with (
        serve_health(health, {"fine": lambda: ""}, CollectorRegistry()),
        serve_metadata(publisher(), vms("w1", "w2")) as addresses,
    ):
        ports = [int(each.rpartition(":")[2]) for each in addresses]
        before = descriptors()
        flood = [await asyncio.open_connection("127.0.0.1", ports[0]) for _ in range(60)]
        ready = await asyncio.open_connection(*health.split(":"))
        ready[1].write(GET.replace(b"/ ", b"/ready "))
        assert "fine" in await answer(ready)
        other = await asyncio.open_connection("127.0.0.1", ports[1])
        other[1].write(GET)
        assert await answer(other)
        # 60 of the clients themselves, no more than the nine that w1 may have, and two pairs for the others.
        await eventually(lambda: descriptors() - before <= 60 + 9 + 4)
        for _, writer in [*flood, ready, other]:
            writer.close()


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_http, "_BODY_S", 0.1, raising=False)
    async with serve_metadata(publisher(), vms("w1")) as (address,):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        writer.write(
            b"POST /metadata/scheduledevents HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
        )
        async with asyncio.timeout(patient(20)):
            assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()


def test_descriptors_are_shared_among_listeners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert fair_share(1, 64) == 64
    assert fair_share(64, 64) == 13
    assert (fair_share(64, 64) + 1) * 64 + 128 <= 1024
    assert fair_share(5000, 64) == 2
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert fair_share(5000, 64) == 64
