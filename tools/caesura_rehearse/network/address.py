"""One more address of this machine, such as 169.254.169.254, for clients that know no other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from caesura.runtime.errors import ConfigError
from caesura.runtime.listen import parse_listen
from caesura_rehearse.network.in_namespace import add_address, remove_address

_ANSWER_S = (
    1.0  # s: for whatever serves the address already; a cloud's own service answers within milliseconds
)


GATEWAY = "gateway"
"""For ``--address``: this machine's address in the container's network."""


class AddressRefused(ConfigError):
    """The address cannot be used."""


def with_port(address: str) -> str:
    """``ADDRESS`` as ``ADDRESS:80``, and ``ADDRESS:PORT`` as it is. ``gateway`` may stand for the address: that of a container's network.

    Raises:
        AddressRefused: it is not an IPv4 address with an optional port.
    """
    host, _, port = address.partition(":")
    try:
        socket.inet_pton(socket.AF_INET, "127.0.0.1" if host == GATEWAY else host)
        parse_listen(f"{host}:{port or 80}")
    except (OSError, ConfigError):
        raise AddressRefused(f"{address!r} is not an IPv4 address, with :PORT if it is not 80") from None
    return f"{host}:{port or 80}"


@asynccontextmanager
async def local_address(address: str) -> AsyncIterator[None]:
    """Make sure while the block runs that this machine has the address; loopback gets it if nothing has it.

    Args:
        address: ``ADDRESS:PORT``.

    Raises:
        AddressRefused: something answers there already, or this user may not add an address.
    """
    host, _, port = address.partition(":")
    if await _answers(host, int(port)):
        raise AddressRefused(
            f"something answers at {address} already: a cloud's own metadata service, or another rehearsal. --netns needs no address of this machine"
        )
    if _is_local(host):
        yield
        return
    try:
        add_address(host)
    except OSError as error:
        raise AddressRefused(
            f"cannot add {host} to this machine: {error.strerror or error}. It needs root; --netns does not"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            remove_address()


async def _answers(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_ANSWER_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def _is_local(host: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
