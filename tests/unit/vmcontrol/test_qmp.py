"""The guard's QMP client against peers that behave, refuse, talk nonsense, or say nothing."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from caesura_testing.patience import patient
from caesura_vmcontrol.procfs import read_process
from caesura_vmcontrol.qemu_plans import QemuPlan, Vmm
from caesura_vmcontrol.qmp import PeerMismatch, Qmp, QmpClosed, QmpError, QmpNoAnswer, QmpRefused
from caesura_vmcontrol.qmp_commands import NotRunning, look, make_run, reach
from caesura_vmcontrol.vm_control import resume_vm

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": ["oob"]}}


class Peer:
    """What a test says for QEMU to its first client."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "qmp")
        self.listener = socket.socket(socket.AF_UNIX)
        handle = os.open(folder, os.O_RDONLY)
        self.listener.bind(f"/proc/self/fd/{handle}/qmp")
        os.close(handle)
        self.listener.listen(1)
        self.listener.settimeout(5)
        self.heard: list[dict[str, Any]] = []
        self.thread: threading.Thread | None = None
        self.done = threading.Event()

    def play(self, part: Callable[[socket.socket], None]) -> None:
        """Serve one client in a thread; the connection is held until the test is over."""

        def serve() -> None:
            connection, _ = self.listener.accept()
            with connection:
                part(connection)
                self.done.wait(5)

        self.thread = threading.Thread(target=serve)
        self.thread.start()

    def hear(self, connection: socket.socket) -> dict[str, Any]:
        """The next command."""
        line = b""
        while not line.endswith(b"\n"):
            line += connection.recv(1)
        self.heard.append(json.loads(line))
        return self.heard[-1]

    def greet(self, connection: socket.socket) -> None:
        """As QEMU does."""
        say(connection, GREETING)
        say(connection, {"return": {}, "id": self.hear(connection)["id"]})

    def close(self) -> None:
        """End it."""
        self.done.set()
        if self.thread is not None:
            self.thread.join()
        self.listener.close()


def say(connection: socket.socket, *messages: dict[str, Any]) -> None:
    """Messages, one a line."""
    connection.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))


def within(seconds: float) -> float:
    """A deadline."""
    return time.monotonic() + seconds


@pytest.fixture
def peer() -> Iterator[Peer]:
    """In a folder whose path is too long for a unix socket."""
    with tempfile.TemporaryDirectory() as folder:
        deep = Path(folder) / ("long" * 30)
        deep.mkdir()
        made = Peer(deep)
        yield made
        made.close()


def test_greeting_capabilities_and_an_answer_between_events(peer: Peer) -> None:
    def part(connection: socket.socket) -> None:
        peer.greet(connection)
        asked = peer.hear(connection)
        say(connection, {"event": "STOP", "timestamp": {}}, {"return": "late", "id": asked["id"] - 1})
        text = json.dumps({"return": {"status": "paused"}, "id": asked["id"]}).encode() + b"\n"
        for at in range(0, len(text), 7):  # in pieces
            connection.sendall(text[at : at + 7])
        say(connection, {"event": "RESUME"})

    peer.play(part)
    with Qmp(peer.path, os.getpid(), within(5)) as qmp:
        assert qmp.execute("query-status", {"x": 1}, until=within(5)) == {"status": "paused"}
        assert peer.heard[0]["execute"] == "qmp_capabilities"
        assert peer.heard[1]["arguments"] == {"x": 1}
        assert not qmp.take_events(within(0.2))
        assert qmp.events == ["STOP", "RESUME"]


def test_a_no_is_quoted(peer: Peer) -> None:
    def part(connection: socket.socket) -> None:
        peer.greet(connection)
        error = {"class": "GenericError", "desc": 'Failed to get "write" lock'}
        say(connection, {"error": error, "id": peer.hear(connection)["id"]})
        peer.hear(connection)
        say(
            connection, {"error": {"class": "GenericError", "desc": "JSON parse error"}}
        )  # it could not read the id

    peer.play(part)
    with Qmp(peer.path, os.getpid(), within(5)) as qmp:
        with pytest.raises(
            QmpRefused, match=r'refuses cont: Failed to get "write" lock \(GenericError\)'
        ) as resumed_by_guard:
            qmp.execute("cont", until=within(5))
        assert (resumed_by_guard.value.error_class, resumed_by_guard.value.desc) == (
            "GenericError",
            'Failed to get "write" lock',
        )
        with pytest.raises(QmpRefused, match="JSON parse error"):
            qmp.execute("cont", until=within(5))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "does not answer"),
        (b'{"QMP": {', "does not answer"),
        (b"SSH-2.0-OpenSSH\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b"[1, 2]\n", "not QMP"),
        (b'{"hello": 1}\n', "does not greet"),
        (b"x" * 5_000_000, "without end"),
    ],
    ids=["silence", "half", "text", "bytes", "list", "stranger", "endless"],
)
def test_what_is_no_qmp(peer: Peer, said: bytes, why: str) -> None:
    def part(connection: socket.socket) -> None:
        try:
            connection.sendall(said)
        except OSError:
            return  # it has hung up on us

    peer.play(part)
    began = time.monotonic()
    with pytest.raises(QmpNoAnswer, match=why):
        Qmp(peer.path, os.getpid(), within(0.3 if why == "does not answer" else 5))
    assert time.monotonic() - began < patient(2)


def test_silence_after_a_command_has_its_deadline(peer: Peer) -> None:
    peer.play(peer.greet)
    with Qmp(peer.path, os.getpid(), within(5)) as qmp:
        began = time.monotonic()
        with pytest.raises(QmpNoAnswer, match="does not answer"):
            qmp.execute("query-status", until=within(0.1))
        assert 0.09 < time.monotonic() - began < patient(1)


def test_closed_in_the_middle(peer: Peer) -> None:
    def part(connection: socket.socket) -> None:
        peer.greet(connection)
        peer.hear(connection)
        say(connection, {"event": "RESUME"})
        connection.shutdown(socket.SHUT_RDWR)

    peer.play(part)
    with Qmp(peer.path, os.getpid(), within(5)) as qmp:
        with pytest.raises(QmpClosed, match="closed by QEMU"):
            qmp.execute("cont", until=within(5))
        assert qmp.events == ["RESUME"]
        assert qmp.take_events(within(5))


def test_another_process_is_not_commanded(peer: Peer) -> None:
    with pytest.raises(PeerMismatch, match=f"belongs to process {os.getpid()}, not to 1"):
        Qmp(peer.path, 1, within(1))
    assert peer.heard == []


def test_nobody_there(tmp_path: Path) -> None:
    for path in (tmp_path / "qmp", tmp_path / "nowhere" / "qmp"):
        with pytest.raises(QmpNoAnswer, match="cannot reach"):
            Qmp(str(path), os.getpid(), within(1))
    (tmp_path / "qmp").touch()
    with pytest.raises(QmpNoAnswer, match="cannot reach"):
        Qmp(str(tmp_path / "qmp"), os.getpid(), within(1))


def test_a_full_backlog_is_waited_for_and_given_up(peer: Peer) -> None:
    waiting = []
    for _ in range(2):  # listen(1) takes two
        client = socket.socket(socket.AF_UNIX)
        handle = os.open(Path(peer.path).parent, os.O_RDONLY)
        client.connect(f"/proc/self/fd/{handle}/qmp")
        os.close(handle)
        waiting.append(client)
    with pytest.raises(QmpNoAnswer, match="no room"):
        Qmp(peer.path, os.getpid(), within(0.1))
    for client in waiting:
        client.close()


def test_a_file_goes_along(peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"the state")
    got: list[bytes] = []

    def part(connection: socket.socket) -> None:
        peer.greet(connection)
        data, handles, _, _ = socket.recv_fds(connection, 4096, 1)
        got.append(os.read(handles[0], 100))
        os.close(handles[0])
        say(connection, {"return": {}, "id": json.loads(data)["id"]})

    peer.play(part)
    handle = os.open(tmp_path / "state", os.O_RDONLY)
    with Qmp(peer.path, os.getpid(), within(5)) as qmp:
        assert qmp.execute("getfd", {"fdname": "state"}, until=within(5), handle=handle) == {}
    os.close(handle)
    assert got == [b"the state"]


def test_errors_are_os_errors() -> None:
    """What carries plans out promises OSError."""
    assert issubclass(QmpError, OSError)
    assert str(QmpRefused("cont", "GenericError", "no")) == "QEMU refuses cont: no (GenericError)"


def _states(peer: Peer, *states: str) -> None:
    """A QEMU that says these states in turn, then the last one, and refuses every ``cont``."""

    def part(connection: socket.socket) -> None:
        peer.greet(connection)
        left = list(states)
        for line in connection.makefile("rb"):
            asked = json.loads(line)
            peer.heard.append(asked)
            answer: dict[str, Any] = {"return": {"status": left[0]}, "id": asked["id"]}
            if asked["execute"] == "query-status":
                left = left[1:] or left
            elif asked["execute"] == "cont":
                answer = {"error": {"class": "GenericError", "desc": "no"}, "id": asked["id"]}
            say(connection, answer)
        peer.done.set()

    peer.play(part)


def _commands(peer: Peer) -> list[str]:
    return [each["execute"] for each in peer.heard[1:]]


def test_once_means_one_cont_for_other_clients_need_the_socket(peer: Peer) -> None:
    _states(peer, "paused")
    with (
        Qmp(peer.path, os.getpid(), within(5)) as qmp,
        pytest.raises(NotRunning, match="paused and does not run: QEMU refuses cont"),
    ):
        make_run(qmp, within(5), ours=False, stopped=True, once=True)
    assert _commands(peer) == ["query-status", "cont", "query-status"]


@pytest.mark.parametrize("state", ["save-vm", "finish-migrate"])
def test_once_waits_for_no_snapshot_and_no_migration_and_resumes_neither(peer: Peer, state: str) -> None:
    _states(peer, state)
    with Qmp(peer.path, os.getpid(), within(5)) as qmp, pytest.raises(NotRunning, match=state):
        make_run(qmp, within(5), ours=False, stopped=True, once=True)
    assert _commands(peer) == ["query-status"]


def test_the_way_out_of_a_plain_stop_leaves_the_socket_after_one_try(peer: Peer) -> None:
    own = read_process(os.getpid())
    assert own is not None
    _states(peer, "paused")
    with pytest.raises(NotRunning):
        resume_vm(QemuPlan("vm", Vmm(own.pid, own.start_ticks, peer.path)))
    assert _commands(peer) == ["query-status", "cont", "query-status"]


def test_a_guest_whose_snapshot_is_being_taken_is_held_and_not_resumed(peer: Peer) -> None:
    """Its state would not be that of its disks."""
    own = read_process(os.getpid())
    assert own is not None
    _states(peer, "save-vm")
    assert look(own.pid, own.start_ticks, [peer.path], ours=lambda: False) == "held"
    assert _commands(peer) == ["query-status"]


@pytest.mark.parametrize("kept_first", [True, False])
def test_a_socket_that_another_client_keeps_leaves_time_for_the_next(
    peer: Peer, tmp_path: Path, kept_first: bool
) -> None:
    """QEMU accepts one client of a socket at a time; the next one waits without a greeting."""
    me = read_process(os.getpid())
    assert me is not None

    def part(connection: socket.socket) -> None:
        time.sleep(0.05)  # a turn of a main loop
        peer.greet(connection)

    peer.listener.settimeout(patient(20))  # its turn comes after the other's share of the time
    peer.play(part)
    with socket.socket(socket.AF_UNIX) as kept:
        kept.bind(str(tmp_path / "kept"))
        kept.listen()
        paths = [str(tmp_path / "kept"), peer.path]
        with reach(me.pid, me.start_ticks, paths if kept_first else paths[::-1], within(patient(3))):
            assert peer.heard[0]["execute"] == "qmp_capabilities"
