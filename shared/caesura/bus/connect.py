"""Open the socket to a broker: TCP without delay, TLS, or a unix socket; all cancellable, no threads.

aiomqtt leaves this to paho, which blocks one of the few threads of the default executor per attempt: a
broker that does not answer would then stall everything else that uses threads, and could not be cancelled.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl

from caesura.bus.options import Address

_PROBES = {
    socket.TCP_KEEPIDLE: 2,  # s: of silence until the first probe
    socket.TCP_KEEPINTVL: 2,  # s: between probes
    socket.TCP_KEEPCNT: 23,  # unanswered probes: a network outage of 45 s is survived, as without keepalive
}


async def open_socket(address: Address, tls: ssl.SSLContext | None, timeout_s: float) -> socket.socket:
    """Connect within ``timeout_s`` seconds, TLS handshake included.

    Raises:
        OSError: no such name (``socket.gaierror``), refused, ``ssl.SSLError``, or ``TimeoutError``.
    """
    async with asyncio.timeout(timeout_s):
        if address.scheme == "unix":
            return await _connect(socket.AF_UNIX, address.path)
        sock = await _connect_any(address, timeout_s)
        if tls is None:
            return sock
        return await _start_tls(sock, tls, address.host)


async def _connect_any(address: Address, timeout_s: float) -> socket.socket:
    """Try each address of the name in turn, each with an equal share of the time: one dead route does not mean an outage."""
    loop = asyncio.get_running_loop()
    targets: list[tuple[int, tuple[str | int | bytes, ...]]]
    try:
        version = ipaddress.ip_address(address.host).version
    except ValueError:
        try:
            found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except (
            UnicodeError
        ) as error:  # an empty or overlong label; not an OSError, although it is about a name
            raise socket.gaierror(socket.EAI_NONAME, "not a host name") from error
        targets = [(family, target) for family, _, _, _, target in found]
    else:
        targets = [
            (socket.AF_INET6 if version == 6 else socket.AF_INET, (address.host, address.port)),
        ]
    failure: OSError = OSError(f"{address.host!r} has no address")
    for family, target in targets:
        try:
            async with asyncio.timeout(timeout_s / len(targets)):
                sock = await _connect(family, target)
        except OSError as error:
            failure = error
        else:
            # Nagle and delayed acknowledgements make a QoS 1 round trip 88 ms instead of under 1 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _probe_when_silent(sock)
            return sock
    raise failure


def _probe_when_silent(sock: socket.socket) -> None:
    """Have the kernel probe whether the peer still knows the connection (tcp(7), SO_KEEPALIVE).

    A guest whose hypervisor was swapped may have lost its connections to a NAT in the old process without a
    packet: the first probe is answered with a reset, seconds later instead of after MQTT's minute of silence.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        sock.setsockopt(socket.IPPROTO_TCP, name, value)


async def _connect(family: int, target: str | tuple[str | int | bytes, ...]) -> socket.socket:
    loop = asyncio.get_running_loop()
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, target)
    except BaseException:
        sock.close()
        raise
    return sock


async def _start_tls(sock: socket.socket, tls: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    try:
        wrapped = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    except BaseException:
        sock.close()
        raise
    try:
        while True:
            try:
                wrapped.do_handshake()
            except ssl.SSLWantReadError:
                await _until_ready(wrapped, write=False)
            except ssl.SSLWantWriteError:
                await _until_ready(wrapped, write=True)
            else:
                return wrapped
    except BaseException:
        wrapped.close()
        raise


async def _until_ready(sock: socket.socket, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    if write:
        loop.add_writer(sock, ready.set)
    else:
        loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        if write:
            loop.remove_writer(sock)
        else:
            loop.remove_reader(sock)
