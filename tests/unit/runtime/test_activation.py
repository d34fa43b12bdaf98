"""Sockets that a service manager passes: which address each belongs to."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from caesura.runtime.activation import check_all_used, inherited_sockets, socket_for
from caesura.runtime.listen import ListenAddressError
from caesura_testing.activated import activated


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[tuple[socket.socket, ...]]:
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "a.sock"))
    unix.listen()
    yield tcp, unix
    tcp.close()
    unix.close()


def test_each_address_finds_its_own(sockets: tuple[socket.socket, ...], tmp_path: Path) -> None:
    tcp, unix = sockets
    port = tcp.getsockname()[1]
    assert socket_for(f"127.0.0.1:{port}", sockets) is tcp
    assert socket_for(f"127.0.0.2:{port}", sockets) is None
    assert socket_for(f"unix:{tmp_path}/a.sock", sockets) is unix
    assert socket_for(f"unix:{tmp_path}/b.sock", sockets) is None
    check_all_used([f"127.0.0.1:{port}", f"unix:{tmp_path}/a.sock", "127.0.0.1:0"], sockets)
    with pytest.raises(ListenAddressError, match=f"passes a socket for 127.0.0.1:{port}"):
        check_all_used([f"unix:{tmp_path}/a.sock"], sockets)


def test_what_does_not_listen_is_not_taken() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert socket_for(f"127.0.0.1:{bound.getsockname()[1]}", [bound]) is None


@pytest.mark.parametrize("pid", ["", "1"])
def test_variables_that_are_meant_for_another_process_are_only_removed(pid: str) -> None:
    environ = {"LISTEN_FDS": "2", "LISTEN_PID": pid, "LISTEN_FDNAMES": "a", "HOME": "/"}
    assert inherited_sockets(environ) == ()
    assert environ == {"HOME": "/"}


def test_a_process_takes_what_it_was_passed(sockets: tuple[socket.socket, ...]) -> None:
    code = (
        "import os; from caesura.runtime.activation import inherited_sockets; found = inherited_sockets(os.environ);"
        "print([each.getsockname() for each in found], any(os.get_inheritable(each.fileno()) for each in found))"
    )
    tcp, unix = (each.fileno() for each in sockets)
    command = activated((tcp, unix), [sys.executable, "-c", code])
    ran = subprocess.run(command, pass_fds=(tcp, unix), capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"{[each.getsockname() for each in sockets]} False"
