"""A Linux guest that goes through every way of changing its QEMU: memory, disk, clock and connections are looked at."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers.port import SwapFailed
from caesura_host_updater.drivers.qemu import definition
from caesura_host_updater.drivers.qemu.definition import Adopt, Nic
from caesura_testing.guests import (
    Definition,
    GuestUnavailable,
    Heartbeat,
    RunningGuest,
    boot,
    connect,
    image,
    second_qemu,
)
from caesura_testing.patience import patient

# Of this run alone: another one may be under way on the machine, or may have been killed with its bridge up.
BRIDGE = f"cst{os.getpid()}"
_NETWORK = f"10.213.{os.getpid() % 250}"
HOST_SIDE, GUEST_SIDE = f"{_NETWORK}.1", f"{_NETWORK}.2"


@pytest.fixture
def linux() -> Any:
    """Kernel and initrd."""
    try:
        return image()
    except GuestUnavailable as error:
        pytest.skip(str(error))


class Changes:
    """One guest, and what is done to it; after each change everything of it is looked at."""

    def __init__(self, driver: Any, guest: RunningGuest, tools: Any) -> None:
        self.driver = driver
        self.guest = guest
        self._tools = tools
        self._count = 0
        self.pauses: list[float] = []

    def operation(self) -> str:
        """A new id."""
        self._count += 1
        return f"op-{self._count}"

    async def swap(self, binary: str = "") -> None:
        """There and running."""
        await self.driver.prepare("a", self.operation(), "swap", binary)
        await self.guest.heartbeat.connect(self.guest.folder / "next" / "heartbeat")
        handed = await self.driver.hand_over("a", self._tools.soon())
        await self.driver.release("a")
        self.pauses.append(handed.resumed_at - handed.frozen_at)
        await self.look()

    async def roll_back(self, number: int) -> None:
        """The new process is told to die or to stop: the old one goes on."""
        before = self._tools.pid_of(self.driver, "a")
        await self.driver.prepare("a", self.operation(), "swap", "")
        os.kill(self._tools.next_pid(self.driver, "a"), number)
        with pytest.raises(SwapFailed):
            await self.driver.hand_over("a", self._tools.soon())
        assert await self.driver.resume("a", 10) == "running"
        await self.driver.release("a")
        assert self._tools.pid_of(self.driver, "a") == before
        await self.look()

    async def replace(self, binary: str = "") -> None:
        """Nothing runs in between but the memory's file."""
        await self.driver.prepare("a", self.operation(), "replace", binary)
        await self.driver.checkpoint("a", self._tools.soon())
        first = await self.driver.memory_digest("a", self._tools.soon())
        assert first is not None
        assert await self.driver.memory_digest("a", self._tools.soon()) == first
        assert await self.driver.resume("a", 20) == "running"
        await self.guest.heartbeat.connect(self.guest.folder / "heartbeat")
        await self.driver.release("a")
        await self.look()

    async def look(self) -> None:
        """Every word of the pattern, every block, and a heart that beats on."""
        assert self.driver.states() == {"a": "running"}
        await self.guest.heartbeat.next(20)
        assert self.guest.heartbeat.faults() == []
        assert (await self.guest.verify_memory())["ok"] is True
        assert (await self.guest.ask("disk", "verify"))["ok"] is True


async def test_memory_disk_and_heartbeat_through_every_change(rig: Any, tools: Any, linux: Any) -> None:
    disk = rig.disk("disk.qcow2", size="64M")
    what = Definition(
        memory_mib=160,
        vcpus=2,
        run=("heartbeat", "memory", "disk"),
        parameters={"memory": "40"},
        disks=((disk, "qcow2"),),
        user_network=True,
    )
    folder = rig.place("g")
    async with boot(what, folder=folder) as guest:
        there = Adopt(qmp=str(guest.qmp), guard_qmp=str(guest.guard), guest_agent=str(guest.guest_agent))
        driver = await rig.open({"a": there})
        assert driver.capabilities("a").methods == ("live", "swap", "freeze", "replace"), driver.capabilities(
            "a"
        )
        changes = Changes(driver, guest, tools)
        try:
            await changes.look()
            await changes.swap()
            await changes.roll_back(signal.SIGKILL)
            await changes.roll_back(signal.SIGSTOP)
            await changes.replace()
            await changes.swap()
            other = second_qemu()
            if other.binary is not None:
                await changes.swap(other.binary)
                assert driver.process_of("a").startswith(f"QEMU {other.version.split()[0][:3]}")
                await changes.swap(rig.qemu)  # and down again
                await changes.replace(other.binary)
                await changes.swap(rig.qemu)
                assert driver.process_of("a").startswith("QEMU 7.2")
            clock = await driver.sync_clock("a")
            assert abs(clock.after_s) < 0.01 + clock.uncertainty_s
            assert max(changes.pauses) < 0.5
        finally:
            pid = tools.pid_of(driver, "a")
            await rig.crash()
            await guest.execute("quit")
            await tools.until(lambda: not tools.runs(pid), "its end")
        assert "No errors were found" in rig.check_disk(disk)


@pytest.fixture
def bridge() -> Iterator[str]:
    """A bridge of its own with an address for us; needs root."""
    if os.geteuid() != 0:
        pytest.skip("making a bridge needs root")
    for left in Path("/sys/class/net").glob("cst*"):
        if not Path("/proc", left.name.removeprefix("cst")).exists():
            subprocess.run(["ip", "link", "del", left.name], check=False)
    made = subprocess.run(
        ["ip", "link", "add", BRIDGE, "type", "bridge"], capture_output=True, text=True, check=False
    )
    if made.returncode != 0 or not Path("/dev/net/tun").exists():
        pytest.skip(f"no bridge and taps here: {made.stderr.strip() or 'no /dev/net/tun'}")
    subprocess.run(["ip", "addr", "add", f"{HOST_SIDE}/24", "dev", BRIDGE], check=True)
    subprocess.run(["ip", "link", "set", BRIDGE, "up"], check=True)
    yield BRIDGE
    subprocess.run(["ip", "link", "del", BRIDGE], check=True)


async def status_of(path: Path) -> dict[str, Any]:
    """What a workload says of itself."""
    import json  # noqa: PLC0415

    async with asyncio.timeout(patient(30)):
        reader, writer = await connect(path, 30)
        writer.write(b"status\n")
        found: dict[str, Any] = json.loads(await reader.readline())
        writer.close()
        await writer.wait_closed()
    return found


async def test_tcp_connection_on_a_bridge_lives_through_a_swap(
    rig: Any, tools: Any, linux: Any, bridge: str
) -> None:
    """A guest that the driver starts, with a tap of each process's own."""
    writers: list[asyncio.StreamWriter] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(OSError):
            while data := await reader.read(4096):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, HOST_SIDE, 0)
    port = server.sockets[0].getsockname()[1]
    run = rig.folder / "run" / "a"
    extra: list[str] = []
    for name in ("heartbeat", "tcp"):
        extra += ["-chardev", f"socket,id={name},path={run}/{name},server=on,wait=off"]
        extra += ["-device", f"virtserialport,chardev={name},name=org.caesura.{name}.0"]
    guest = definition.Definition(
        memory_mib=128,
        machine="pc-q35-7.2",
        kernel=linux.kernel,
        initrd=linux.initrd,
        append="console=ttyS0 quiet rdinit=/init panic=-1 caesura.run=heartbeat,tcp"
        f" caesura.ip={GUEST_SIDE}/24 caesura.gateway={HOST_SIDE} caesura.tcp={HOST_SIDE}:{port}",
        nic=(Nic(bridge=bridge),),
        extra=tuple(extra),
    )
    driver = await rig.open({"a": guest})
    assert driver.states() == {"a": "running"}, driver.ping()
    heart = Heartbeat()
    try:
        await heart.connect(run / "heartbeat")
        await heart.next(60, after=0.0)
        before = await reached(run / "tcp", 50)
        for number in range(3):
            await driver.prepare("a", f"op-{number}", "swap", "")
            await heart.connect(run / "next" / "heartbeat")
            await driver.hand_over("a", time.monotonic() + 10)
            await driver.release("a")
            await heart.next(20)
            before = await reached(run / "tcp", before["echoed"] + 50)
        assert before["connects"] == 1, before
        assert before["wrong"] == 0
        assert heart.faults() == []
        assert len(taps(bridge)) == 1, "the taps of the processes before are gone"
    finally:
        await heart.close()
        await rig.end()
        rig.driver = None
        server.close()
        for writer in writers:
            writer.transport.abort()  # the guest is gone without a word
        await server.wait_closed()


def taps(bridge: str) -> list[str]:
    """The ports of a bridge."""
    return [path.name for path in Path(f"/sys/class/net/{bridge}/brif").iterdir()]


async def reached(path: Path, echoed: int) -> dict[str, Any]:
    """The workload's status when so many of its lines came back."""
    async with asyncio.timeout(patient(60)):
        while (found := await status_of(path))["echoed"] < echoed:  # noqa: ASYNC110 - the guest does not call us
            await asyncio.sleep(0.05)
    return found
