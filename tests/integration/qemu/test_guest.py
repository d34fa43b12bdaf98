"""The guest of ``caesura guest build``, really booted: its workloads, and Caesura's agent in it on a real Mosquitto."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytest_asyncio

from caesura.bus.local_broker import LocalBroker
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Delivery
from caesura.contract.codec import decode
from caesura.contract.envelope import Message
from caesura.contract.messages import (
    AgentClockSynced,
    AgentPresence,
    ClockSyncAnswered,
    ClockSyncRequested,
    VmResumed,
)
from caesura.runtime.identity import new_id
from caesura_testing.broker import mosquitto, mosquitto_installed
from caesura_testing.guests import Definition, RunningGuest, boot, qemu_installed
from caesura_testing.patience import patient

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not qemu_installed(), reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed"),
]

M = TypeVar("M", bound=Message)
VM = "guest-1"
PATIENCE_S = patient(30.0)
DISK_BLOCKS = 16384


class Outside:
    """What the guest talks to: an echo server, a metadata service with one scheduled event, a broker."""

    def __init__(self, broker: LocalBroker) -> None:
        self.broker = broker
        self.approvals: list[dict[str, Any]] = []
        self.said: list[Message] = []
        self.bus = MqttBus(BrokerOptions(url=broker.url, client_id="host"), filters=[f"caesura/v1/vm/{VM}/#"])
        self.post = MessageClient(self.bus, "/caesura/host/host-1")

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()

    async def metadata(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert "Metadata: true" in head
        body = b""
        if head.startswith("POST"):
            length = next(
                line.split(":")[1] for line in head.splitlines() if line.startswith("Content-Length")
            )
            self.approvals.append(json.loads(await reader.readexactly(int(length))))
        else:
            events = [
                {"EventId": "theirs", "EventStatus": "Scheduled", "Resources": ["somebody-else"]},
                {"EventId": "ours", "EventStatus": "Scheduled", "Resources": [VM, "guest-2"]},
            ]
            body = json.dumps({"DocumentIncarnation": 1, "Events": events}).encode()
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    async def heard(self, delivery: Delivery) -> None:
        """The host's part: answers clock-sync requests, keeps the rest."""
        t2_ns = time.time_ns()
        message = decode(delivery.topic, delivery.payload).message
        self.said.append(message)
        if isinstance(message, ClockSyncRequested):
            answer = ClockSyncAnswered(
                vm=VM,
                host="host-1",
                exchange=message.exchange,
                t1_ns=message.t1_ns,
                t2_ns=t2_ns,
                t3_ns=time.time_ns(),
            )
            await self.post.send(answer, host="host-1", vm=VM)

    def all(self, kind: type[M]) -> list[M]:
        return [each for each in self.said if isinstance(each, kind)]


async def until(condition: Callable[[], bool], what: str) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + PATIENCE_S
    while not condition():
        assert loop.time() < end, what
        await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def outside() -> AsyncIterator[Outside]:
    folder = Path(tempfile.mkdtemp(prefix="caesura-", dir="/tmp"))
    async with mosquitto(folder) as broker:
        found = Outside(broker)
        task = asyncio.create_task(found.bus.run(found.heard))
        assert await found.bus.wait_connected(patient(10))
        yield found
        await found.bus.close()
        await task
    shutil.rmtree(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(outside: Outside) -> AsyncIterator[RunningGuest]:
    """One guest for the whole module, with everything in it; 192 MiB of RAM."""
    folder = Path(tempfile.mkdtemp(prefix="caesura-", dir="/tmp"))
    disk = folder / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(DISK_BLOCKS * 4096)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        ports = []
        for serve in (outside.echo, outside.metadata):
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            stack.callback(server.close)
            ports.append(server.sockets[0].getsockname()[1])
        definition = Definition(
            memory_mib=192,
            run=("heartbeat", "memory", "disk", "tcp", "approve"),
            parameters={
                "memory": "25",
                "dirty_mib": "2",
                "dirty_mib_s": "5",
                "heartbeat_ms": "10",
                "disk_ms": "20",
                "disk_blocks": str(DISK_BLOCKS),
                "tcp": f"10.0.2.2:{ports[0]}",
                "url": f"http://10.0.2.2:{ports[1]}/metadata/scheduledevents?api-version=2020-07-01",
            },
            agent={"vm": VM, "broker_url": f"mqtt://10.0.2.2:{outside.broker.port}", "log_format": "json"},
            disks=((disk, "raw"),),
            user_network=True,
        )
        yield await stack.enter_async_context(boot(definition, folder=folder))


async def test_the_heartbeat_comes_without_a_gap(guest: RunningGuest) -> None:
    begin = asyncio.get_running_loop().time()
    await until(lambda: len(guest.heartbeat.since(begin)) >= 100, "a hundred beats")
    assert guest.heartbeat.faults() == []
    assert guest.heartbeat.missing() == 0


async def test_a_pause_is_a_gap_outside_and_none_inside(guest: RunningGuest) -> None:
    loop = asyncio.get_running_loop()
    await guest.execute("stop")
    stopped = loop.time()
    before = guest.heartbeat.beats[-1]
    await asyncio.sleep(0.6)
    assert guest.heartbeat.since(stopped + 0.1) == [], "a stopped guest has no heartbeat"
    await guest.execute("cont")
    after = await guest.heartbeat.next(after=stopped + 0.1)
    assert after.received - before.received >= 0.6
    assert after.monotonic_ns - before.monotonic_ns < 0.4e9, "the guest's monotonic clock stood still"
    assert guest.heartbeat.longest_gap_s(since=stopped) >= 0.6
    assert guest.heartbeat.faults() == []


async def test_the_guest_compares_its_memory_and_finds_one_changed_byte(guest: RunningGuest) -> None:
    status = await guest.ask("memory", "status")
    assert status["wanted"] - 4096 < status["bytes"] <= status["wanted"], "it got what it was told to fill"
    answer = await guest.verify_memory()
    assert answer["ok"]
    assert answer["bytes"] == status["bytes"] + (2 << 20)
    await guest.until("memory", lambda status: status["dirty_written"] > answer["dirty_written"])
    assert (await guest.verify_memory())["ok"]
    damaged = (await guest.ask("memory", "swap-byte"))["damaged"]
    answer = await guest.verify_memory()
    assert not answer["ok"]
    assert answer["bad_offset"] == damaged
    await guest.ask("memory", "swap-byte")
    assert (await guest.verify_memory())["ok"]


async def test_the_guest_reads_its_disk_back_and_finds_a_damaged_block(guest: RunningGuest) -> None:
    await guest.until("disk", lambda status: status["written"] >= 20)
    assert (await guest.ask("disk", "verify"))["ok"]
    path, _ = guest.definition.disks[0]
    with path.open("r+b") as file:
        file.seek(7 * 4096 + 100)
        file.write(b"!")
    answer = await guest.ask("disk", "verify")
    assert (answer["ok"], answer["bad_block"]) == (False, 7)


async def test_the_connection_of_the_guest_is_echoed(guest: RunningGuest) -> None:
    status = await guest.until("tcp", lambda status: status["echoed"] >= 20)
    assert status["connected"]
    assert (status["connects"], status["wrong"]) == (1, 0)


async def test_the_workload_approves_the_events_of_its_vm_only(guest: RunningGuest, outside: Outside) -> None:
    await until(lambda: bool(outside.approvals), "an approval")
    assert outside.approvals == [{"StartRequests": [{"EventId": "ours"}]}]
    status = await guest.until("approve", lambda status: status["approved"] == ["ours"])
    assert status["errors"] == 0


async def test_the_agent_in_the_guest_is_on_the_bus_and_sets_its_clock(
    guest: RunningGuest, outside: Outside
) -> None:
    await until(lambda: bool(outside.all(AgentClockSynced)), f"the agent's clock:\n{guest.logs()}")
    presence = outside.all(AgentPresence)[0]
    assert (presence.vm, presence.online, presence.clock) == (VM, True, "system")
    synced = outside.all(AgentClockSynced)[0]
    assert synced.synced, synced
    assert not synced.simulated
    # The guest's RTC gives whole seconds, so its clock starts up to a second wrong.
    assert synced.error_after_s is not None
    # A busy guest under TCG answers late: what it can know is its uncertainty, within the agent's own bound.
    assert abs(synced.error_after_s) + (synced.uncertainty_s or 0) <= 0.1
    now = asyncio.get_running_loop().time()
    beat = await guest.heartbeat.next(after=now)
    assert abs(beat.realtime_ns / 1e9 - time.time()) < patient(0.25)


# -- the canary in real RAM ---------------------------------------------------------------------------------

_PAGE = 4096
_MAGIC = b"CAESURAc"  # how each page of the agent's canary begins


def _canary_pages(ram: Path) -> list[int]:
    """Offsets in the guest's RAM of the pages that its agent holds."""
    found = []
    with ram.open("rb") as file:
        offset = 0
        while chunk := file.read(256 * _PAGE):
            found += [offset + at for at in range(0, len(chunk), _PAGE) if chunk[at : at + 8] == _MAGIC]
            offset += len(chunk)
    return found


async def _paused(guest: RunningGuest, outside: Outside, harm: Callable[[Path], None]) -> AgentClockSynced:
    """A pause in which something happens to the guest's RAM, and what the agent says after it."""
    await guest.execute("stop")
    await asyncio.to_thread(harm, guest.ram_file)
    await guest.execute("cont")
    operation = new_id()
    resumed = VmResumed(
        vm=VM,
        host="host-1",
        set=f"_{VM}",
        update_domain=0,
        operation=operation,
        method="freeze",
        pause_s=0.1,
        budget_s=30,
        within_budget=True,
        resumed_by="updater",
        at=datetime.now(UTC),
    )
    await outside.post.send(resumed, host="host-1", set=f"_{VM}", ud=0, vm=VM)

    def answers() -> list[AgentClockSynced]:
        told = [each for each in outside.all(AgentClockSynced) if each.operation == operation]
        return [each for each in told if each.canary is not None]

    await until(lambda: bool(answers()), f"the agent's answer:\n{guest.logs()}")
    return answers()[0]


async def test_a_page_of_the_guests_ram_that_changed_in_a_pause_is_found_by_the_agent(
    guest: RunningGuest, outside: Outside
) -> None:
    """A flipped bit, a zeroed page and a stale one, put into the RAM file while the guest is paused."""
    await until(
        lambda: any(each.canary_bytes for each in outside.all(AgentPresence)),
        f"the agent's canary:\n{guest.logs()}",
    )
    held = next(each.canary_bytes for each in outside.all(AgentPresence) if each.canary_bytes)
    whole = await _paused(guest, outside, lambda _: None)
    assert whole.canary is not None
    assert (whole.canary.pages * _PAGE, whole.canary.bad_pages) == (held, 0)

    old: list[bytes] = []
    pages: list[int] = []

    def look(ram: Path) -> None:
        pages.extend(_canary_pages(ram))
        with ram.open("rb") as file:
            for offset in pages:
                file.seek(offset)
                old.append(file.read(_PAGE))

    await _paused(guest, outside, look)
    assert len(pages) >= held // _PAGE, "they are in the guest's RAM, in the clear"
    numbers = [int.from_bytes(page[8:16], "little") for page in old]
    by_number = dict(zip(numbers, pages, strict=True))
    versions = {
        number: int.from_bytes(page[16:24], "little") for number, page in zip(numbers, old, strict=True)
    }

    def stale(ram: Path) -> list[int]:
        """Pages that were rewritten since."""
        found = []
        with ram.open("rb") as file:
            for number, offset in by_number.items():
                file.seek(offset + 16)
                if int.from_bytes(file.read(8), "little") != versions[number]:
                    found.append(number)
        return found

    await until(lambda: bool(stale(guest.ram_file)), "a page that was rewritten")

    def harm(ram: Path) -> None:
        older = stale(ram)[0]
        flipped, zeroed = [number for number in by_number if number != older][10:12]
        with ram.open("r+b") as file:
            file.seek(by_number[older])
            file.write(old[numbers.index(older)])
            file.seek(by_number[flipped] + 1234)
            byte = file.read(1)[0]
            file.seek(by_number[flipped] + 1234)
            file.write(bytes([byte ^ 2]))
            file.seek(by_number[zeroed])
            file.write(bytes(_PAGE))

    harmed = await _paused(guest, outside, harm)
    assert harmed.canary is not None
    assert harmed.canary.bad_pages == 3, harmed.canary
    for words in ("is damaged", "is zeroed", "holds write"):
        assert words in harmed.canary.detail
    after = await _paused(guest, outside, lambda _: None)
    assert after.canary is not None
    assert after.canary.bad_pages == 0, "one pause is not blamed for another's"
