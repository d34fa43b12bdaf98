"""What a rehearsal does inside another network. Run by path with ``python -I -S``: standard library only, none of our imports.

``execute SOCKET RESOLV_CONF PROGRAM ARGUMENT...`` executes a program in a network of its own, in which 169.254.169.254:80 answers. The listener is bound
here, inside, and its descriptor passed to the rehearsal, which serves it from outside. A RESOLV_CONF that is not empty replaces the machine's. Without root the network comes with a user
namespace in which the user has the same id; the program has no rights in it.

``serve PID`` binds the same listener in the network of a process that runs already, a container's, and takes the address away when
the other end of standard input is closed. ``connect PID`` connects to ports in that of a process, and passes the connections out.

Sources: user_namespaces(7), network_namespaces(7), setns(2), unix(7), netdevice(7).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress

CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG = 1
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C
IFF_UP = 0x1
ADDRESS, PORT = "169.254.169.254", 80
ALIAS = b"lo:metadata"


LOOK_S = 0.01  # s: between two looks at the routes
WAY_OUT_S = 10.0  # s: for slirp4netns or pasta to lead out; some 100 ms are usual
CONNECT_S = (
    5.0  # s: to a port of the same machine; a program that is paused has its connections taken by the kernel
)


def main(argv: list[str]) -> int:
    """See the module."""
    what, *words = argv
    if what == "execute":
        return execute(words[0], words[1], words[2:])
    return serve(words[0]) if what == "serve" else connect(words[0])


def execute(door: str, resolv_conf: str, program: list[str]) -> int:
    """Ends only if the program cannot be executed."""
    outside = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    outside.connect(door)
    try:
        parent = os.getppid()
        step = "a user namespace with a network of its own"
        enter(os.getuid(), os.getgid(), CLONE_NEWNS if resolv_conf else 0)
        # The kernel has forgotten it with the change of rights: the program ends with the process that has started it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            return 125
        step = "the address 169.254.169.254 in it"
        bring_up()
        listener = listen()
        if resolv_conf:
            step = "a resolv.conf in it"
            cover("/etc/resolv.conf", resolv_conf)
    except OSError as error:
        outside.sendall(f"{step}: {error.strerror or error}".encode())
        return 125
    socket.send_fds(outside, [b"+"], [listener.fileno()])
    if (go := outside.recv(1)) == b"~":
        await_way_out(outside)
    elif go != b"+":
        return 125
    try:
        os.execvp(program[0], program)  # noqa: S606 - what was given on the command line, without a shell
    except OSError as error:
        outside.sendall(f"cannot start {program[0]}: {error.strerror}".encode())
    return 125


def await_way_out(outside: socket.socket) -> None:
    """Until there is a default route, or none will come: then the rehearsal sends one more byte. The answer is ``=`` or ``-``."""
    outside.settimeout(LOOK_S)
    until, found, last = time.monotonic() + WAY_OUT_S, False, False
    while not (found or last) and time.monotonic() < until:
        with suppress(TimeoutError):
            last = bool(outside.recv(1))
        with open("/proc/self/net/route", encoding="ascii") as file:  # noqa: PTH123 - light imports
            found = any(line.split()[1:2] == ["00000000"] for line in file)
    outside.settimeout(None)
    outside.sendall(b"=" if found else b"-")


def cover(path: str, by: str) -> None:
    """Show another file in its place, here only. The change does not reach the mounts of the machine."""
    libc = ctypes.CDLL(None, use_errno=True)
    for source, target, flags in (
        (b"none", b"/", MS_REC | MS_PRIVATE),
        (by.encode(), os.path.realpath(path).encode(), MS_BIND),
    ):
        if libc.mount(source, target, None, flags, None):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def serve(pid: str) -> int:
    """Have the address in the network of a process until the other end of standard input is closed."""
    outside = socket.socket(fileno=0)
    added = False
    try:
        step = "the container's network"
        enter_that_of(pid)
        step = "the address 169.254.169.254 in the container's network"
        try:
            listener = listen()
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            add_address(ADDRESS)
            added = True
            listener = listen()
        with listener:
            socket.send_fds(outside, [b"+"], [listener.fileno()])
    except OSError as error:
        outside.sendall(f"{step}: {error.strerror or error}".encode())
    else:
        outside.recv(1)
    finally:
        if added:
            remove_address()
    return 0


def connect(pid: str) -> int:
    """Serve until the other end of standard input is closed. Exit code 1: there is no such process (any more).

    It reads port numbers, two bytes each, and answers each with ``+`` and a connected descriptor, or with ``-``.
    """
    try:
        enter_that_of(pid)
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


def listen() -> socket.socket:
    """At the address of the metadata API."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((ADDRESS, PORT))
    listener.listen(128)
    return listener


def enter(uid: int, gid: int, more: int = 0) -> None:
    """Into a new network; without root into a user namespace first, as the same user. ``more``: further namespaces."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET | more | (CLONE_NEWUSER if uid else 0)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if uid:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123 - light imports
                file.write(text)


def enter_that_of(pid: str) -> None:
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


def bring_up() -> None:
    """The loopback device, with the address of the metadata API on it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        set_flags(control, b"lo", up=True)
    add_address(ADDRESS)


def add_address(address: str) -> None:
    """Give loopback one more address. Needs rights over this network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.255")):
            packed = struct.pack("16sHH4s8x", ALIAS, socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, request, packed)


def remove_address() -> None:
    """Take it away again: an alias that goes down is removed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        set_flags(control, ALIAS, up=False)


def set_flags(control: socket.socket, device: bytes, *, up: bool) -> None:
    """Bring a device up or down."""
    flags = struct.unpack("16sh", fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sh", device, 0)))[1]
    flags = flags | IFF_UP if up else flags & ~IFF_UP
    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", device, flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
