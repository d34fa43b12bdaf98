"""How fast the metadata publisher answers, against aiohttp answering constant bytes; and 5,000 VMs that poll one process.

`wrk` (Debian package) is the client. Both servers are processes of their own, pinned to one core where there are two, and measured
in turn, several times: the ratio is of medians of the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.synchronize import Event
from typing import Any

import aiohttp
from aiohttp import web

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.contract.messages import HostInventory, ScheduledEvent, SetDocument, VmRecord
from caesura.runtime.full_collections import rare_full_collections
from caesura.runtime.logs import configure_logging
from caesura_metadata_publisher.http import serve_metadata
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.service import MetadataPublisher, filters
from caesura_metadata_publisher.settings import MetadataPublisherSettings

TARGET = "/metadata/scheduledevents?api-version=2020-07-01"
CONNECTIONS = (1, 64, 512)
EVENT = ScheduledEvent(
    event_id="c7061bac-afdc-4513-b24b-aa5f13a16123",
    event_type="Freeze",
    status="scheduled",
    resources=tuple(f"web-{number}" for number in range(1, 6)),
    not_before=datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC),
    description="Host server is undergoing maintenance.",
    duration_s=9,
)
_RATE = re.compile(r"Requests/sec:\s+([0-9.]+)")
_COUNT = re.compile(r"([0-9]+) requests in")


def listeners(first: int, count: int) -> list[Listener]:
    """One for each VM. Loopback is a /8, so ports need not suffice."""
    return [
        Listener(f"vm-{number}", f"127.0.{1 + number // 250}.{1 + number % 250}:{first}")
        for number in range(count)
    ]


async def publisher(port: int, vms: int, ready: Event) -> None:
    """A real publisher whose bus is in memory; every VM is in the set that has the event."""
    broker = MemoryBroker()
    bus = MemoryBus(broker, client_id="publisher", filters=filters())
    served = MetadataPublisher(MetadataPublisherSettings(listeners_file="unused"), bus)
    fleet = MemoryBus(broker, client_id="fleet")
    post = MessageClient(fleet, "/caesura/fleet")
    tasks = [asyncio.ensure_future(fleet.run(post.deliver)), asyncio.ensure_future(served.run_bus())]
    assert await fleet.wait_connected(10.0)
    places = listeners(port, vms)
    for host in range(0, vms, 500):
        records = tuple(
            VmRecord(vm=each.vm, set="web", update_domain=0, state="running")
            for each in places[host : host + 500]
        )
        await post.send(
            HostInventory(host=f"host-{host}", driver="process", epoch=1, vms=records), host=f"host-{host}"
        )
    await post.send(SetDocument(set="web", incarnation=7, events=(EVENT,)), set="web")
    while served.documents_ping(tuple(places)):  # noqa: ASYNC110 - a benchmark's start
        await asyncio.sleep(0.01)
    async with serve_metadata(served, places, connections=1024), rare_full_collections():  # as the service
        ready.set()
        await asyncio.gather(*tasks)


async def constant(port: int, _: int, ready: Event) -> None:
    """What aiohttp does with the same bytes."""
    body = await document_bytes()

    async def handle(request: web.Request) -> web.Response:
        if request.headers.get("If-None-Match") == '"7"':
            return web.Response(status=304, headers={"ETag": '"7"'})
        return web.Response(
            body=body, headers={"Content-Type": "application/json; charset=utf-8", "ETag": '"7"'}
        )

    app = web.Application()
    app.router.add_get("/metadata/scheduledevents", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.1.1", port, backlog=1024).start()
    ready.set()
    await asyncio.Event().wait()


async def document_bytes() -> bytes:
    """The body that the publisher gives."""
    from caesura_metadata_publisher.api_versions import EVENTS_VERSIONS  # noqa: PLC0415 - only here
    from caesura_metadata_publisher.events_document import wire_document  # noqa: PLC0415 - only here

    return wire_document(SetDocument(set="web", incarnation=7, events=(EVENT,)), EVENTS_VERSIONS[0])


def start(serve: Callable[[int, int, Event], Any], port: int, vms: int = 1) -> multiprocessing.Process:
    """A server in a process of its own, when it answers."""
    ready = multiprocessing.Event()
    process = multiprocessing.Process(target=run, args=(serve, port, vms, ready), daemon=True)
    process.start()
    assert ready.wait(120), "the server did not start"
    return process


def run(serve: Callable[[int, int, Event], Any], port: int, vms: int, ready: Event) -> None:
    configure_logging("bench", style="auto", level="error")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    asyncio.run(serve(port, vms, ready))


def wrk(port: int, connections: int, seconds: float, *, conditional: bool) -> tuple[float, int]:
    """Requests a second, and in all."""
    headers = ["-H", "Metadata: true", *(["-H", 'If-None-Match: "7"'] if conditional else [])]
    command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), "wrk", "-t1"]
    command += [f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", *headers]
    done = subprocess.run(
        [*command, f"http://127.0.1.1:{port}{TARGET}"], capture_output=True, text=True, check=True
    )
    rate, count = _RATE.search(done.stdout), _COUNT.search(done.stdout)
    assert rate, done.stdout
    assert count, done.stdout
    assert "Non-2xx or 3xx responses" not in done.stdout, done.stdout
    assert "Socket errors" not in done.stdout, done.stdout
    return float(rate[1]), int(count[1])


def ratios(seconds: float, rounds: int) -> None:
    """The table of rates. On a busy machine the processor time of an answer says more than the rate."""
    servers = {18301: start(publisher, 18301), 18302: start(constant, 18302)}
    print(
        "| answer | connections | Caesura (1/s) | aiohttp, constant bytes (1/s) | ratio | processor time an answer (µs) | ratio |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for conditional in (False, True):
        for connections in CONNECTIONS:
            rates: dict[int, list[float]] = {port: [] for port in servers}
            costs: dict[int, list[float]] = {port: [] for port in servers}
            for _ in range(rounds):
                for port, process in servers.items():
                    before = cpu_s(process)
                    rate, count = wrk(port, connections, seconds, conditional=conditional)
                    rates[port].append(rate)
                    costs[port].append((cpu_s(process) - before) / count * 1e6)
            mine, other = (statistics.median(each) for each in rates.values())
            mine_us, other_us = (statistics.median(each) for each in costs.values())
            print(
                f"| {304 if conditional else 200} | {connections} | {mine:,.0f} | {other:,.0f} | {mine / other:.2f} "
                f"| {mine_us:.0f} / {other_us:.0f} | {other_us / mine_us:.2f} |",
                flush=True,
            )
    for process in servers.values():
        process.kill()


# -- many VMs that poll -----------------------------------------------------------------------------------------


class Poller(asyncio.Protocol):
    """A VM that asks once a second on one connection, as agents do; notes how long each answer took."""

    def __init__(self, times: list[float]) -> None:
        self._times = times
        self._asked = 0.0
        self._next = 0.0
        self._until = 0.0
        self._buffer = b""
        self.errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # A connection without a request is closed after a while: the first one, which does not count, comes at once.
        transport.write(_REQUEST)

    def start(self, first: float, until: float) -> None:
        """Ask once a second from ``first`` on, both on the loop's clock."""
        self._next, self._until = first, until
        asyncio.get_running_loop().call_at(first, self._ask)

    def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        # From when it should have asked: a client that is late itself must not hide that.
        self._asked = self._next
        self._next += 1.0
        self._transport.write(_REQUEST)
        if self._next < self._until:
            loop.call_at(self._next, self._ask)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if b"\r\n\r\n" in self._buffer and self._buffer.endswith(b"}"):
            self.errors += not self._buffer.startswith(b"HTTP/1.1 200")
            self._buffer = b""
            if self._asked:
                self._times.append(asyncio.get_running_loop().time() - self._asked)


_REQUEST = f"GET {TARGET} HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata: true\r\n\r\n".encode()


async def poll(port: int, vms: int, seconds: float) -> tuple[list[float], int]:
    gc.disable()  # 5,000 VMs are 5,000 machines: a pause of this one would count as one of the publisher
    loop = asyncio.get_running_loop()
    times: list[float] = []
    pollers: list[Poller] = []
    for place in listeners(port, vms):
        host, _, own_port = place.listen.rpartition(":")
        _, poller = await loop.create_connection(lambda: Poller(times), host, int(own_port))
        pollers.append(poller)
    # Then each has its own place within the second.
    begin = loop.time() + 1.0
    until = begin + seconds
    for number, poller in enumerate(pollers):
        poller.start(begin + number / vms, until)
    await asyncio.sleep(until - loop.time() + 2.0)
    return times, sum(each.errors for each in pollers)


def many(vms: int, seconds: float) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    process = start(publisher, 18303, vms)
    before, began = cpu_s(process), time.monotonic()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    times, errors = asyncio.run(poll(18303, vms, seconds))
    spent_s = cpu_s(process) - before
    used = spent_s / (time.monotonic() - began)
    process.kill()
    times.sort()
    at = {
        name: times[min(len(times) - 1, int(len(times) * part))] * 1000
        for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
    }
    print(
        f"{vms} VMs, one poll a second each: {len(times)} answers, {errors} of them no 200; "
        + ", ".join(f"{name} {value:.1f} ms" for name, value in at.items())
        + f", longest {times[-1] * 1000:.1f} ms; the publisher used {used:.0%} of a core, {spent_s / len(times) * 1e6:.0f} µs a poll"
    )


def cpu_s(process: multiprocessing.Process) -> float:
    """The processor time that it has used, its kernel part included."""
    with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:  # noqa: PTH123 - /proc
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vms", type=int, default=5000)
    parser.add_argument("--only", choices=("ratios", "many"))
    options = parser.parse_args()
    if shutil.which("wrk") is None and options.only != "many":
        print("wrk is not installed (on Debian: apt-get install wrk)", file=sys.stderr)
        return 1
    print(
        f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, aiohttp {aiohttp.__version__}"
    )
    if options.only != "many":
        ratios(options.seconds, options.rounds)
    if options.only != "ratios":
        many(options.vms, options.seconds * 4)
    return 0


if __name__ == "__main__":
    sys.exit(main())
