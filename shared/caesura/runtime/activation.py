"""Sockets that the service manager opened for us: sd_listen_fds(3), standard library only.

The manager keeps such a socket open while the service restarts, so a client waits in its queue and is not refused.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, MutableMapping

from caesura.runtime.listen import ListenAddressError, parse_listen

_FIRST = 3  # SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


def inherited_sockets(environ: MutableMapping[str, str]) -> tuple[socket.socket, ...]:
    """The listening sockets passed to this process; its variables are removed, so that no child takes them for its own."""
    count, pid, _ = (environ.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()) or not count.isdigit():
        return ()
    found = []
    for number in range(_FIRST, _FIRST + int(count)):
        os.set_inheritable(number, False)
        found.append(socket.socket(fileno=number))
    return tuple(found)


def socket_for(listen: str, inherited: Iterable[socket.socket]) -> socket.socket | None:
    """The inherited socket that listens on this address, as written in settings; None if there is none.

    Raises:
        ListenAddressError: it is not an address.
    """
    wanted = parse_listen(listen)
    for each in inherited:
        address = each.getsockname()
        if each.type != socket.SOCK_STREAM or not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            continue
        if isinstance(address, str | bytes):
            if isinstance(wanted, str) and os.fsdecode(address) == wanted:
                return each
        elif not isinstance(wanted, str) and (address[0], address[1]) == wanted:
            return each
    return None


def check_all_used(listens: Iterable[str], inherited: Iterable[socket.socket]) -> None:
    """Check that each inherited socket belongs to an address.

    Raises:
        ListenAddressError: one of them would be queueing clients that nobody answers.
    """
    left = list(inherited)
    for listen in listens:
        found = socket_for(listen, left)
        if found is not None:
            left.remove(found)
    for each in left:
        address = each.getsockname()
        shown = address if isinstance(address, str) else f"{address[0]}:{address[1]}" if address else "?"
        raise ListenAddressError(
            f"the service manager passes a socket for {shown}, which no listener has: write it there as in ListenStream="
        )
