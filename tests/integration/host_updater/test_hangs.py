"""What does not answer, in the middle of a pause: VMs are resumed on time by the updater itself, which goes on."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from caesura.contract.messages import HostInventory


async def test_a_fifo_in_updates_d_holds_up_no_resume(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    names = [host.add_vm(f"vm-{number}") for number in range(8)]
    host.add_update("patch", "pass")
    await host.start()
    command = await host.freeze(hold_s=2.0, budget_s=12.0)
    for name in names:
        await host.until(name, "frozen")
    os.mkfifo(host.updates_dir / "hangs.toml")
    os.kill(host.pid, signal.SIGHUP)
    report = await fleet.report(command.operation)
    assert report.status == "completed", report.reason
    assert {vm.resumed_by for vm in report.vms} == {"updater"}
    named = await fleet.ear.one(HostInventory, lambda m: bool(m.refused_updates))
    assert [each.file for each in named.refused_updates] == ["hangs.toml"]
    assert "it is a FIFO" in named.refused_updates[0].reason
    # The updater is well, and the other updates are as usable as before.
    again = await host.freeze(update="patch", budget_s=10.0)
    assert (await fleet.report(again.operation)).status == "completed"


async def test_a_log_that_nobody_reads_holds_up_no_resume(
    full_pipe: int, hosts: Callable[..., Any], fleet: Any
) -> None:
    host = hosts()
    host.add_vm("a")
    host.stderr = full_pipe
    host.settings["LOG_LEVEL"] = "debug"
    await host.start()
    for _ in range(2):
        command = await host.freeze(hold_s=0.5, budget_s=10.0)
        report = await fleet.report(command.operation)
        assert report.status == "completed", report.reason
        assert report.vms[0].resumed_by == "updater"
    await host.kill(signal.SIGTERM)
    assert host.process.returncode == 0


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A service manager's notify socket."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path)
        listening.setblocking(False)
        yield path, listening


def heard(listening: socket.socket) -> list[bytes]:
    """What was said since the last time."""
    found = []
    try:
        while True:
            found.append(listening.recv(100))
    except BlockingIOError:
        return found


def environ_of(pid: int) -> bytes:
    """What a process was started with."""
    return Path(f"/proc/{pid}/environ").read_bytes()


async def test_the_updater_tells_systemd_that_it_is_up_and_beats_until_it_hangs(
    manager: tuple[str, socket.socket],
    hosts: Callable[..., Any],
    wait_for: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, listening = manager
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    host = hosts()
    host.add_vm("a")
    await host.start()
    said: list[bytes] = []

    def beats(count: int) -> bool:
        said.extend(heard(listening))
        return said.count(b"WATCHDOG=1") >= count

    # Its queue was full of beats before anybody read it: that it is up is said again until it is taken.
    await wait_for(lambda: beats(20) and b"READY=1" in said, "beats, and that it is up")
    assert said.count(b"READY=1") == 1
    # Nobody else speaks for it: neither its guard nor its VMs have the socket's address.
    for pid in (host.guard_pid(), host.run_of("a")["pid"]):
        assert b"NOTIFY_SOCKET" not in environ_of(pid)
    await host.kill(signal.SIGTERM)
    said.extend(heard(listening))
    assert said.count(b"STOPPING=1") == 1
    assert heard(listening) == []


async def test_an_updater_that_the_watchdog_kills_leaves_its_vms_to_the_guard(
    manager: tuple[str, socket.socket],
    hosts: Callable[..., Any],
    fleet: Any,
    wait_for: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As systemd does it: no beat for a while, SIGKILL, start. The loop hangs as a stopped process does."""
    path, listening = manager
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    host = hosts()
    host.add_vm("a")
    await host.start()
    command = await host.freeze(hold_s=25.0, budget_s=30.0)
    await host.until("a", "frozen")
    os.kill(host.pid, signal.SIGSTOP)
    heard(listening)
    silent_since = time.monotonic()

    def silent() -> bool:
        nonlocal silent_since
        if heard(listening):
            silent_since = time.monotonic()
        return time.monotonic() - silent_since > 0.6

    await wait_for(silent, "the beats to end")
    assert host.kernel("a") == "frozen"
    await host.kill()
    await host.until("a", "running")
    await host.start()
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert report.vms[0].resumed_by == "guard"
