"""Addresses to listen on, as written in settings, and the host names that requests may use for them. Without aiohttp, which most agents never need."""

from __future__ import annotations

import ipaddress

from caesura.runtime.errors import ConfigError
from caesura.runtime.settings import ServiceSettings


class ListenAddressError(ConfigError):
    """A listener's address is invalid."""


def parse_listen(listen: str) -> tuple[str, int] | str:
    """``host:port`` as a pair, ``unix:/path`` as the path.

    Raises:
        ListenAddressError: neither of the two, or a port outside 0..65535.
    """
    if listen.startswith("unix:") and listen != "unix:":
        return listen.removeprefix("unix:")
    host, _, port = listen.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ListenAddressError(
            f"cannot listen on {listen!r}: give host:port (127.0.0.1:9310) or unix:/path"
        )
    return host.strip("[]"), int(port)


def check_health_address(settings: ServiceSettings) -> None:
    """Check before anything starts that ``health_listen`` is a valid address.

    Raises:
        ListenAddressError: it is not.
    """
    if settings.health_listen:
        parse_listen(settings.health_listen)


def own_host(host: str, known: frozenset[str]) -> bool:
    """Whether a Host header cannot be a stranger's name for this machine.

    An IP address is not a name; a name without a dot, or below ``.localhost``, cannot be registered in public DNS. Every
    other name must be among ``known``; ``*`` there allows all.
    """
    name = _without_port(host.strip().lower())
    if "*" in known or name in known:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return bool(name) and ("." not in name or name.endswith(".localhost"))
    return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host
