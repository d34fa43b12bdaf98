"""Ports for the programs of the VMs: each gets one of its own to listen on."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack

from caesura.runtime.errors import ConfigError

_LAST = 65535


class PortTaken(ConfigError):
    """A port that was asked for is in use, or does not exist."""


def ports_for(vms: Sequence[str], first: int | None = None) -> list[int]:
    """A port of 127.0.0.1 for each VM, free at this moment.

    Args:
        first: of the first VM, the others get those after it; None: any.

    Raises:
        PortTaken: naming port and VM.
    """
    found = []
    with ExitStack() as probes:
        for index, vm in enumerate(vms):
            probe = probes.enter_context(socket.socket())
            wanted = 0 if first is None else first + index
            if wanted > _LAST:
                raise PortTaken(f"there is no port {wanted} for {vm}: the last one is {_LAST}")
            if wanted:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError as error:
                raise PortTaken(f"port {wanted} for {vm}: {error.strerror or error}") from error
            found.append(probe.getsockname()[1])
    return found
