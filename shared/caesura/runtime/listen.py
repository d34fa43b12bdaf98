"""Addresses to listen on, as settings have them, and names that requests may call them by. Without aiohttp, which most agents never need."""

from __future__ import annotations

import ipaddress

from caesura.runtime.errors import ConfigError
from caesura.runtime.settings import ServiceSettings


class ListenAddressError(ConfigError):
    """A listener's address makes no sense."""


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
    """Find out before anything starts whether ``health_listen`` can be an address.

    Raises:
        ListenAddressError: it cannot.
    """
    if settings.health_listen:
        parse_listen(settings.health_listen)


def own_host(host: str, known: frozenset[str]) -> bool:
    """Whether a Host header cannot be a stranger's name for this machine.

    An IP address is no name; a name without a dot, or below ``.localhost``, is not to be had in public DNS. Everything
    else must be among ``known``; ``*`` there allows all.
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
