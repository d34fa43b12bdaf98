"""sd_notify: what is said, to whom, and that nobody is waited for."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from caesura_host_updater.__main__ import _beat
from caesura_vmcontrol.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A service manager's socket, and its address as systemd gives it."""
    name = f"@caesura-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name[1:] if name.startswith("@") else name)
        listening.settimeout(20)
        yield name, listening


def test_what_is_said_and_that_nobody_else_says_it(manager: tuple[str, socket.socket]) -> None:
    address, listening = manager
    environ = {
        "NOTIFY_SOCKET": address,
        "WATCHDOG_USEC": "3000000",
        "WATCHDOG_PID": str(os.getpid()),
        "X": "1",
    }
    notifier = Notifier.taken_from(environ)
    assert environ == {"X": "1"}, "VMs and updates inherit the rest"
    assert notifier.interval_s == 1.0
    notifier.ready()
    for _ in range(100):
        notifier.beat()
    notifier.stopping()
    assert [listening.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


def test_another_services_watchdog_is_not_beaten(manager: tuple[str, socket.socket]) -> None:
    notifier = Notifier.taken_from({"NOTIFY_SOCKET": manager[0], "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"})
    assert notifier.interval_s is None


def test_that_it_is_up_is_said_until_the_manager_takes_it(manager: tuple[str, socket.socket]) -> None:
    """Its queue has room for some ten messages on many machines: beats may have filled it."""
    address, listening = manager
    for _ in range(2000):
        Notifier(address, 3.0).stopping()
    notifier = Notifier(address, 3600.0)
    notifier.ready()
    listening.setblocking(False)
    said = []
    with suppress(BlockingIOError):
        while True:
            said.append(listening.recv(100))
    assert b"READY=1" not in said
    for _ in range(3):
        notifier.beat()
    listening.settimeout(20)
    assert [listening.recv(100) for _ in range(2)] == [b"READY=1", b"WATCHDOG=1"]


def test_a_manager_that_does_not_read_or_is_not_there_is_not_waited_for(
    manager: tuple[str, socket.socket], tmp_path: Path
) -> None:
    for _ in range(2000):
        Notifier(manager[0], 3.0).ready()  # many more than its queue takes
    Notifier(str(tmp_path / "nobody"), 3.0).beat()
    Notifier.taken_from({}).ready()


async def test_the_updaters_beat_comes_from_its_event_loop(manager: tuple[str, socket.socket]) -> None:
    """A thread would go on beating while the loop hangs: here it hangs in the test's own blocking read."""
    address, listening = manager
    beating = asyncio.create_task(_beat(Notifier(address, 0.03)))
    listening.setblocking(False)
    async with asyncio.timeout(20):
        for _ in range(3):
            assert await asyncio.get_running_loop().sock_recv(listening, 100) == b"WATCHDOG=1"
    with suppress(BlockingIOError):
        while True:
            listening.recv(100)
    listening.settimeout(0.5)  # many beats long
    with pytest.raises(TimeoutError):
        listening.recv(100)
    listening.setblocking(False)
    async with asyncio.timeout(20):
        assert await asyncio.get_running_loop().sock_recv(listening, 100) == b"WATCHDOG=1"
    beating.cancel()
