"""Whose pause it is: what Caesura paused runs again whatever was lost, what somebody else paused is left to him."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caesura.contract.messages import HostInventory
from caesura_host_updater.drivers.process.freezers import request_freeze
from caesura_vmcontrol.vm_control import resume_vm

JUNK = b"\0junk of a broken disk\n" * 300


async def test_what_an_operator_paused_is_named_and_left_alone(
    hosts: Callable[..., Any], fleet: Any, freezer: str
) -> None:
    host = hosts(freezer=freezer)
    host.add_vm("his")
    host.add_vm("ours")
    await host.start()
    request_freeze(host.plan("his"))
    await host.until("his", "frozen")
    command = await host.freeze("ours", hold_s=15.0, budget_s=20.0)
    await host.until("ours", "frozen")
    await host.kill_with_guard()
    await host.start()
    await host.until("ours", "running")
    assert (await fleet.report(command.operation)).status == "failed"

    def named(message: HostInventory) -> bool:
        (record,) = [vm for vm in message.vms if vm.vm == "his"]
        return (
            record.state == "paused" and "paused, and not by Caesura; resume it with: " in record.state_detail
        )

    record = next(vm for vm in (await fleet.ear.one(HostInventory, named)).vms if vm.vm == "his")
    # Everything that was to be done at the start is done: it still is as he left it.
    assert host.kernel("his") == "frozen"
    refused = await fleet.report((await host.freeze("his")).operation)
    assert refused.status == "refused"
    how = record.state_detail.partition("resume it with: ")[2]
    typed(how)
    await host.until("his", "running")
    os.kill(host.pid, signal.SIGHUP)
    await fleet.until(lambda: all(vm.state_detail == "" for vm in fleet.last(HostInventory).vms))


def typed(line: str) -> None:
    """What an operator does in a shell."""
    subprocess.run(["sh", "-c", line], check=True)


@pytest.mark.parametrize(
    ("lost", "how"),
    [
        *itertools.product(("intent", "journal", "intent and journal"), ("damaged", "missing")),
        # Not "missing": a VM that is frozen without any record of ours was frozen by somebody else.
        ("intent, journal and marker", "damaged"),
    ],
)
async def test_whatever_was_lost_every_vm_runs_in_the_end(
    lost: str, how: str, hosts: Callable[..., Any], wait_for: Any
) -> None:
    host = hosts()
    host.add_vm("a")
    host.add_vm("b")
    await host.start()
    await host.freeze(hold_s=25.0, budget_s=30.0)
    await host.until("a", "frozen")
    await host.until("b", "frozen")
    await host.kill_with_guard()
    files = {
        "intent": [host.state_dir / "guard-intent.json"],
        "journal": sorted(host.state_dir.glob("journal.sqlite*")),
        "marker": sorted((host.state_dir / "pauses").glob("*.json")),
    }
    assert all(files.values()), files
    for name, paths in files.items():
        for path in paths if name in lost else []:
            if how == "missing":
                path.unlink()
            else:
                path.write_bytes(JUNK)
    await host.launch()
    await host.until("a", "running")
    await host.until("b", "running")
    if "journal" in lost and how == "damaged":
        # It cannot say what became of the operation, so it does not go on the bus; but nothing is paused for that.
        await wait_for(lambda: any("cannot open the store" in str(line) for line in host.log()), "the reason")
    else:
        await wait_for(lambda: not list((host.state_dir / "pauses").glob("*.json")), "the markers' end")


@pytest.fixture
def external_guard() -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Starts guards as their own unit does; ends them after the test."""
    made: list[subprocess.Popen[bytes]] = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "caesura_pause_guard", "--state-dir", str(folder)]
        made.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        return made[-1]

    yield start
    for each in made:
        each.kill()
        each.wait()


@pytest.mark.parametrize("how", ["missing", "cut", "junk", "intact"])
async def test_a_guard_without_its_intent_resumes_what_is_marked(
    how: str,
    hosts: Callable[..., Any],
    external_guard: Callable[[Path], subprocess.Popen[bytes]],
    freezer: str,
) -> None:
    """The updater is stopped, the guard died; whoever starts it again has the markers."""
    host = hosts(freezer=freezer)
    host.settings["GUARD"] = "external"
    host.add_vm("a")
    host.state_dir.mkdir(mode=0o700)
    first = external_guard(host.state_dir)
    await host.start()
    await host.freeze(hold_s=25.0, budget_s=30.0)
    await host.until("a", "frozen")
    os.kill(host.pid, signal.SIGSTOP)
    first.kill()
    first.wait()
    intent = host.state_dir / "guard-intent.json"
    raw = intent.read_bytes()
    match how:
        case "missing":
            intent.unlink()
        case "cut":
            intent.write_bytes(raw[: len(raw) // 2])
        case "junk":
            intent.write_bytes(JUNK)
    assert host.kernel("a") == "frozen"
    external_guard(host.state_dir)
    await host.until("a", "running")


async def test_on_a_full_disk_it_starts_and_resumes_what_it_finds_frozen(
    small_disk: Path, hosts: Callable[..., Any], fleet: Any, wait_for: Any
) -> None:
    host = hosts()
    host.state_dir = small_disk / "state"
    host.add_vm("a")
    await host.start()
    command = await host.freeze(hold_s=25.0, budget_s=30.0)
    await host.until("a", "frozen")
    await host.kill_with_guard()
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x")
    for path in (*host.state_dir.glob("journal.sqlite-shm"), *host.state_dir.glob("*.lock")):
        path.unlink()  # what a start makes again: there is no room for it
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 512)
    began = time.monotonic()
    await host.launch()
    await host.until("a", "running")
    assert time.monotonic() - began < 15  # s: far from the patience for guard and journal
    assert host.process.returncode is None
    filler.unlink()
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert report.vms[0].state == "running"
    again = await host.freeze(hold_s=0.1)
    assert (await fleet.report(again.operation)).status == "completed"


async def test_an_updater_that_died_between_marker_and_freeze_leaves_no_marker(
    hosts: Callable[..., Any], wait_for: Any
) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    guard = host.guard_pid()
    os.kill(guard, signal.SIGSTOP)  # it does not answer: nothing is frozen, the marker is there
    await host.freeze(hold_s=5.0)
    marker = host.state_dir / "pauses" / "a.json"
    await wait_for(marker.exists, "the marker")
    os.kill(host.pid, signal.SIGKILL)
    os.kill(guard, signal.SIGKILL)
    await host.process.wait()
    assert host.kernel("a") == "running"
    assert marker.exists()
    await host.start()
    await wait_for(lambda: not marker.exists(), "the end of a marker that means nothing")
    # From here on whoever freezes it by hand does so himself.
    request_freeze(host.plan("a"))
    await host.until("a", "frozen")
    await host.kill()
    await host.start()
    assert host.kernel("a") == "frozen"
    resume_vm(host.plan("a"))


async def test_nothing_is_frozen_that_cannot_be_marked(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    folder = host.state_dir / "pauses"
    with suppress(FileNotFoundError):
        folder.rmdir()
    folder.write_text("a file in the folder's place")
    command = await host.freeze(hold_s=0.5)
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert "nothing was frozen: its VMs could not be marked: cannot write the pause markers" in report.reason
    assert report.vms[0].pause_s == 0
    folder.unlink()
    assert (await fleet.report((await host.freeze(hold_s=0.1)).operation)).status == "completed"


def test_the_journal_that_the_tests_damage_is_where_it_is_looked_for(tmp_path: Path) -> None:
    """Else the tests above would damage nothing."""
    (tmp_path / "journal.sqlite").write_bytes(JUNK)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / "journal.sqlite").execute("PRAGMA journal_mode=WAL")
