"""Connects to ports inside a process's network, and passes the connections out.

Run by path with ``python -I -S``: standard library only, none of our imports. It reads port numbers, two bytes each, from the socket
that is its standard input, and answers each with ``+`` and a connected descriptor, or with ``-``. Sources: setns(2), unix(7).
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
CONNECT_S = (
    5.0  # s: to a port of the same machine; a program that is paused has its connections taken by the kernel
)


def main(pid: str) -> int:
    """Serve until the other end of standard input is closed. Exit code 1: there is no such process (any more)."""
    try:
        enter(pid)
    except OSError:
        return 1
    orders = socket.socket(fileno=0)
    while len(order := orders.recv(2, socket.MSG_WAITALL)) == 2:
        try:
            inside = socket.create_connection(("127.0.0.1", int.from_bytes(order)), timeout=CONNECT_S)
        except OSError:
            orders.sendall(b"-")
            continue
        with inside:
            socket.send_fds(orders, [b"+"], [inside.fileno()])
    return 0


def enter(pid: str) -> None:
    """Into the process's network, and before into its user namespace if that is another one."""
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = [f"/proc/{each}/ns/user" for each in (pid, "self")]
    kinds = [] if os.path.samefile(*spaces) else [("user", CLONE_NEWUSER)]  # noqa: PTH121 - light imports
    for name, kind in (*kinds, ("net", CLONE_NEWNET)):
        handle = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        if libc.setns(handle, kind):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
