"""The pause guard as its own process against real frozen processes, with nobody's help."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers.process.freezers import (
    ProcessGroupRecord,
    ProcessPlan,
    choose_freezer,
    plan_of,
    request_freeze,
)
from caesura_testing.patience import patient
from caesura_vmcontrol.guard_socket import ask_guard, socket_address
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.procfs import boot_id, read_process
from caesura_vmcontrol.resume_plans import plan_to_json
from caesura_vmcontrol.vm_control import condition, resume_vm

PATIENCE_S = 10.0


def wait(holds: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait for the kernel or another process."""
    until = time.monotonic() + patient(timeout_s)
    while not holds():
        assert time.monotonic() < until, f"not within {timeout_s} s: {what}"
        time.sleep(0.002)


class Guard:
    """A guard process and connections to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[socket.socket] = []
        self.visitor: socket.socket | None = None
        self.stderr: int = subprocess.DEVNULL

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start it and wait until it listens; it has a client, ``visitor``, until that is closed."""
        command = [sys.executable, "-m", "caesura_pause_guard", "--state-dir", str(self.folder)]
        process = subprocess.Popen([*command, *arguments], stderr=self.stderr)
        self.processes.append(process)
        wait(self.listens, "the guard to listen")
        if "--exit-when-alone" not in arguments:
            self.leave()
        return process

    def leave(self) -> None:
        """Close the connection of ``start``."""
        assert self.visitor is not None
        self.visitor.close()

    def listens(self) -> bool:
        """Whether somebody accepts."""
        with suppress(OSError):
            self.visitor = self.connect()
            return True
        return False

    def connect(self) -> socket.socket:
        """A connection as the updater makes it."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE_S)
        self.connections.append(connection)
        try:
            connection.connect(socket_address(folder))
        finally:
            os.close(folder)
        return connection

    def ask(self, connection: socket.socket, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer: dict[str, Any] = json.loads(connection.makefile().readline())
        return answer

    def arm(self, connection: socket.socket, plan: ProcessPlan, seconds: float) -> None:
        """Arm for one VM."""
        answer = self.ask(connection, **arming(plan, seconds))
        assert answer["ok"], answer

    def stop(self) -> None:
        """End every process and connection."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.wait()


def arming(plan: ProcessPlan, seconds: float, **changes: Any) -> dict[str, Any]:
    """An arm request."""
    request: dict[str, Any] = {
        "do": "arm",
        "operation": "op-1",
        "boot_id": boot_id(),
        "deadline": time.monotonic() + seconds,
        "plans": [plan_to_json(plan)],
    }
    return request | changes


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """A guard on a state folder whose path is too long for a unix socket."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir(mode=0o700)
    made = Guard(folder)
    yield made
    made.stop()


@pytest.fixture
def vm(freezer: Any) -> Iterator[ProcessPlan]:
    """One process, and how it is frozen."""
    place, _ = choose_freezer(freezer, f"caesura-guard-test-{os.getpid()}")
    control = place.create_cgroup("vm")
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    own = read_process(process.pid)
    assert own is not None
    if control:
        (Path(control).parent / "cgroup.procs").write_text(str(process.pid))
    run = ProcessGroupRecord(
        pid=process.pid, start_ticks=own.start_ticks, boot_id=boot_id(), kind=freezer, control=control
    )
    plan = plan_of("vm", run)
    yield plan
    resume_vm(plan)
    process.kill()
    process.wait()
    wait(lambda: condition(plan) == "gone", "the process to end")
    place.remove("vm")


def freeze(plan: ProcessPlan) -> float:
    """Freeze and confirm; when that was."""
    request_freeze(plan)
    wait(lambda: condition(plan) == "frozen", "the freeze")
    return time.monotonic()


def test_deadline(guard: Guard, vm: ProcessPlan) -> None:
    guard.start()
    connection = guard.connect()
    guard.arm(connection, vm, 0.5)
    frozen_at = freeze(vm)
    wait(lambda: condition(vm) == "running", "the resume")
    assert time.monotonic() - frozen_at < patient(0.8)
    record = guard.ask(connection, do="disarm", operation="op-1")["record"]
    assert record["fired"]["why"] == "the deadline passed"
    catch = record["fired"]["vms"]["vm"]
    assert (catch["was_frozen"], catch["end"]) == (True, "running")
    assert guard.ask(connection, do="status")["state"] == "ready"
    assert not (guard.folder / "guard-intent.json").exists()


def test_a_standard_error_that_is_a_full_pipe_costs_no_resume(
    guard: Guard, vm: ProcessPlan, full_pipe: int
) -> None:
    guard.stderr = full_pipe
    process = guard.start()
    connection = guard.connect()
    guard.arm(connection, vm, 0.5)
    freeze(vm)
    wait(lambda: condition(vm) == "running", "the resume")
    # And it serves on: what it says of the next operation does not fit either.
    assert guard.ask(connection, do="disarm", operation="op-1")["record"]["fired"]
    guard.arm(connection, vm, 20)
    freeze(vm)
    connection.close()
    wait(lambda: condition(vm) == "running", "the resume")
    process.terminate()
    assert process.wait(PATIENCE_S) == 0


def test_what_somebody_else_paused_stays_so(guard: Guard, vm: ProcessPlan) -> None:
    """The updater found it paused, says so, and dies."""
    guard.start()
    connection, another = guard.connect(), guard.connect()
    guard.arm(connection, vm, 20)
    freeze(vm)
    words = {"do": "drop", "operation": "op-1", "vms": ["vm"]}
    assert "only who armed" in guard.ask(another, **words)["error"]
    answer = guard.ask(connection, **words)
    assert answer["ok"], answer
    assert answer["intent"]["plans"] == []
    connection.close()
    wait(lambda: guard.ask(another, do="status")["state"] == "fired", "the guard to fire")
    assert guard.ask(another, do="disarm", operation="op-1")["ok"]
    assert condition(vm) == "frozen"


def test_ways_out_that_are_none_from_the_guard_are_told(guard: Guard, tmp_path: Path) -> None:
    guard.start()
    connection = guard.connect()
    uuid = "783136f9-2b12-4ee3-8a40-5eee38a7cccd"
    plan = LibvirtPlan(
        "web-1", "/none", "qemu:///system", uuid, 1, 0, 0, (str(tmp_path / "none"), str(tmp_path))
    )
    inspected = guard.ask(connection, do="inspect", plans=[plan_to_json(plan)])
    assert inspected == {"ok": True, "unusable": {"web-1": [str(tmp_path / "none")]}}
    assert guard.ask(connection, do="status")["state"] == "ready"
    assert ask_guard(str(guard.folder), {"do": "inspect", "plans": []}, patient(10))["unusable"] == {}
    request = arming(plan, 20)  # type: ignore[arg-type]
    answer = guard.ask(connection, **request)
    assert answer["unusable"] == {"web-1": [str(tmp_path / "none")]}


def test_connection_lost(guard: Guard, vm: ProcessPlan) -> None:
    guard.start()
    connection = guard.connect()
    guard.arm(connection, vm, 20)
    frozen_at = freeze(vm)
    connection.close()
    wait(lambda: condition(vm) == "running", "the resume")
    assert time.monotonic() - frozen_at < patient(2)


def test_found_armed_at_start(guard: Guard, vm: ProcessPlan) -> None:
    first = guard.start()
    connection = guard.connect()
    guard.arm(connection, vm, 20)
    freeze(vm)
    first.kill()
    first.wait()
    assert condition(vm) == "frozen"
    guard.start()
    wait(lambda: condition(vm) == "running", "the resume")
    answer = guard.ask(guard.connect(), do="status")
    assert answer["intent"]["fired"]["why"] == "the guard started and found it armed"
    # Not acknowledged: nothing else is taken, and a later start does not forget it.
    refused = guard.ask(guard.connect(), **arming(vm, 5, operation="op-2"))
    assert not refused["ok"]
    assert "op-1" in refused["error"]


def test_freeze_after_the_guard_fired_is_undone(guard: Guard, vm: ProcessPlan) -> None:
    """An updater that was stopped between its last look and its freeze call wakes up and freezes."""
    guard.start()
    connection = guard.connect()
    guard.arm(connection, vm, 0.2)
    wait(lambda: guard.ask(connection, do="status")["state"] == "fired", "the deadline")
    for _ in range(3):
        request_freeze(vm)
        frozen_at = time.monotonic()
        wait(lambda: condition(vm) == "running", "the late freeze to be undone")
        assert time.monotonic() - frozen_at < patient(1)
    record = guard.ask(connection, do="disarm", operation="op-1")["record"]
    catch = record["fired"]["vms"]["vm"]
    assert catch["was_frozen"]
    assert catch["frozen_after"] is not None
    assert catch["running_at"] - catch["frozen_after"] < 5


def test_owner_dies_after_it_fired(guard: Guard, vm: ProcessPlan) -> None:
    """Its last act may have been a freeze: the guard looks once more when the process is dead."""
    guard.start()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(guard.folder), json.dumps(arming(vm, 0.2))], stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    assert b"armed" in owner.stdout.readline()
    watcher = guard.connect()
    wait(lambda: guard.ask(watcher, do="status")["state"] == "fired", "the deadline")
    request_freeze(vm)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait(lambda: condition(vm) == "running", "the last freeze to be undone")


OWNER = """
import json, os, socket, sys, time
folder = os.open(sys.argv[1], os.O_RDONLY)
connection = socket.socket(socket.AF_UNIX)
connection.connect(f"/proc/self/fd/{folder}/guard.sock")
request = json.loads(sys.argv[2])
request["deadline"] = time.monotonic() + 0.2
connection.sendall(json.dumps(request).encode() + b"\\n")
assert json.loads(connection.makefile().readline())["ok"]
print("armed", flush=True)
time.sleep(600)
"""


def test_it_stays_while_an_owner_without_a_connection_lives(guard: Guard, vm: ProcessPlan) -> None:
    """One that is stopped may still freeze; what ends the guard is that nobody can."""
    process = guard.start("--exit-when-alone", "0.2")
    owner = subprocess.Popen(
        [sys.executable, "-c", LOST_OWNER, str(guard.folder), json.dumps(arming(vm, 20))],
        stdout=subprocess.PIPE,
    )
    try:
        assert owner.stdout is not None
        assert b"closed" in owner.stdout.readline()
        guard.leave()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            request_freeze(vm)
            wait(lambda: condition(vm) == "running", "the late freeze to be undone")
        request_freeze(vm)
    finally:
        owner.kill()
        owner.wait()
        assert owner.stdout is not None
        owner.stdout.close()
    wait(lambda: condition(vm) == "running", "the last freeze to be undone")
    for connection in guard.connections:
        connection.close()
    assert process.wait(patient(PATIENCE_S)) == 0


LOST_OWNER = """
import json, os, socket, sys, time
folder = os.open(sys.argv[1], os.O_RDONLY)
connection = socket.socket(socket.AF_UNIX)
connection.connect(f"/proc/self/fd/{folder}/guard.sock")
connection.sendall(sys.argv[2].encode() + b"\\n")
assert json.loads(connection.recv(65536))["ok"]
connection.close()
print("closed", flush=True)
time.sleep(600)
"""


def test_a_client_that_is_dead_when_its_request_is_read_does_not_end_the_guard(
    guard: Guard, vm: ProcessPlan
) -> None:
    process = guard.start()
    process.send_signal(signal.SIGSTOP)
    subprocess.run(
        [sys.executable, "-c", DEAD_CLIENT, str(guard.folder), json.dumps(arming(vm, 20))], check=True
    )
    process.send_signal(signal.SIGCONT)
    connection = guard.connect()
    assert guard.ask(connection, do="status")["state"] == "ready"
    assert process.poll() is None


DEAD_CLIENT = """
import os, socket, sys
folder = os.open(sys.argv[1], os.O_RDONLY)
connection = socket.socket(socket.AF_UNIX)
connection.connect(f"/proc/self/fd/{folder}/guard.sock")
connection.sendall(sys.argv[2].encode() + b"\\n")
"""


def test_told_to_stop_while_armed(guard: Guard, vm: ProcessPlan) -> None:
    process = guard.start()
    connection = guard.connect()
    guard.arm(connection, vm, 20)
    freeze(vm)
    process.send_signal(signal.SIGTERM)
    assert process.wait(patient(PATIENCE_S)) == 0
    assert condition(vm) == "running"


def test_disarm_is_not_believed_while_a_vm_stands_still(guard: Guard, vm: ProcessPlan) -> None:
    guard.start()
    connection = guard.connect()
    guard.arm(connection, vm, 20)
    freeze(vm)
    answer = guard.ask(connection, do="disarm", operation="op-1")
    assert condition(vm) == "running"
    if answer["ok"]:
        assert answer["record"]["fired"]["why"] == "disarmed while a VM was paused"
    else:
        assert "not running yet" in answer["error"]


@pytest.mark.parametrize("freezer", ["sigstop"])
def test_what_is_refused(guard: Guard, vm: ProcessPlan, freezer: str) -> None:
    guard.start()
    connection = guard.connect()
    good = arming(vm, 5)
    outside = {"kind": "cgroup2", "vm": "x", "control": "/etc/cgroup.freeze"}
    climbing = {"kind": "cgroup2", "vm": "x", "control": "/sys/fs/cgroup/../../../etc/cgroup.freeze"}
    other_file = {"kind": "cgroup1", "vm": "x", "control": "/sys/fs/cgroup/freezer/x/cgroup.procs"}
    init = {"kind": "signal", "vm": "x", "leader": 1, "start_ticks": 1, "others": []}
    for change in (
        {"plans": [outside]},
        {"plans": [climbing]},
        {"plans": [other_file]},
        {"plans": [init]},
        {"plans": [{"vm": "x"}]},
        {"plans": 7},
        {"boot_id": "another"},
        {"deadline": time.monotonic() - 1},
        {"deadline": "soon"},
        {"do": "dance"},
    ):
        answer = guard.ask(connection, **(good | change))
        assert not answer["ok"], change
        assert answer["error"]
    assert guard.ask(connection, do="status")["state"] == "ready"
    connection.sendall(b"this is not json\n")
    assert not json.loads(connection.makefile().readline())["ok"]
    second = subprocess.run(
        [sys.executable, "-m", "caesura_pause_guard", "--state-dir", str(guard.folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 1
    assert "another pause guard runs" in second.stderr


def test_ends_when_alone(guard: Guard) -> None:
    process = guard.start("--exit-when-alone", "0.2")
    guard.leave()
    assert process.wait(patient(PATIENCE_S)) == 0
    assert not (guard.folder / "guard.sock").exists()


def test_unreadable_intent_is_kept_aside(guard: Guard) -> None:
    (guard.folder / "guard-intent.json").write_text("{ torn")
    guard.start()
    assert guard.ask(guard.connect(), do="status")["state"] == "ready"
    assert (guard.folder / "guard-intent.json.unreadable").read_text() == "{ torn"


def test_it_beats_from_its_loop_and_says_when_it_ends(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path)
        listening.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        process = guard.start()
        assert [listening.recv(100) for _ in range(4)] == [b"READY=1", *[b"WATCHDOG=1"] * 3]
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
        listening.setblocking(False)
        said = []
        with suppress(BlockingIOError):
            while True:
                said.append(listening.recv(100))
    assert said[-1] == b"STOPPING=1"
