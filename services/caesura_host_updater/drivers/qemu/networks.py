"""The networks of a machine's cards: as QEMU says them, and as its command line would make them. Pure.

Sources: QEMU's ``net/net.c`` (``info network``), ``net/slirp.c`` (``info usernet``, ``hostfwd``, default addresses) and
``net/tap.c``. A trial process has no tap and no forwarded port, and the name of a tap may be chosen at each start: so
what a process has is completed by what the command line says.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address

from caesura_host_updater.drivers.qemu.arguments import options, repeated, settings

_CLIENT = re.compile(r"(?P<name>\S+): index=(?P<index>\d+),type=(?P<kind>[a-z-]+),?(?P<rest>\S*)\s*$")
_USER = re.compile(r"^Hub -?\d+ \((?P<name>.*)\):")
_FORWARD = re.compile(r"^\s*(TCP|UDP)\[HOST_FORWARD\]\s+\S+\s+(\S+)\s+(\d+)\s+(\S+)\s+(\d+)\s")
_STATED_FORWARD = re.compile(r"^(tcp|udp|):([^:]*):(\d+)-([^:]*):(\d+)$")
_KINDS = {"user": "user", "tap": "tap", "bridge": "tap"}
"""What a back end is called in a command line, and as what it shows up: a bridge makes a tap."""
_NO_NETWORKS = ("nic", "hubport")
_TAP = ("ifname", "script", "downscript", "helper", "br")
_TAP_DEFAULTS: Mapping[str, Callable[[str], bool]] = {
    "ifname": lambda _: True,  # the kernel chooses one
    "script": lambda text: text.endswith("/qemu-ifup"),
    "downscript": lambda text: text.endswith("/qemu-ifdown"),
    "helper": lambda text: text.endswith("/qemu-bridge-helper"),
    "br": lambda text: text == "br0",
}


@dataclass(frozen=True)
class Network:
    """A network back end. ``settings``: what QEMU says of it; ``forwards``: ``tcp:127.0.0.1:2222-10.0.2.15:22``."""

    kind: str
    settings: tuple[tuple[str, str], ...] = ()
    forwards: tuple[str, ...] = ()
    removed: bool = False
    """Whether ``netdev_del`` removed it while a card was on it, which has no network since."""

    @property
    def text(self) -> str:
        """For people."""
        if self.removed:
            return f"{self.kind} removed with netdev_del"
        words = [f"{key}={value}" for key, value in self.settings]
        return " ".join(
            (self.kind, ",".join([*words, *(f"hostfwd={each}" for each in self.forwards)]))
        ).strip()


def network_names(said: str) -> tuple[str, ...]:
    """The names of the networks in the answer to ``info network``, as QEMU has them."""
    return tuple(dict.fromkeys(name for name, _, _, _ in _clients(said)))


def read_networks(said: str, users: str, gone: Sequence[str] = ()) -> dict[str, Network]:
    """The networks by their ids; those without one by kind and number.

    Args:
        said: the answer to ``info network``.
        users: the answer to ``info usernet``.
        gone: names that QEMU knows no longer although a card has them.
    """
    forwards = _forwards(users)
    found: dict[str, Network] = {}
    unnamed: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    for name, index, kind, rest in _clients(said):
        # One that was made again under the same name is not the one that the card has.
        removed = name in gone or (name, index) in seen
        seen.add((name, index))
        if index != "0" and not removed:
            continue  # further queues of the same
        label = name
        if name.startswith("#"):
            unnamed[kind] = unnamed.get(kind, 0) + 1
            label = f"{kind} {unnamed[kind]}"
        pairs = tuple(_pairs(rest))
        found[label] = Network(kind, pairs, tuple(sorted(forwards.get(name, ()))), removed)
    return found


def _clients(said: str) -> Iterator[tuple[str, str, str, str]]:
    for line in said.splitlines():
        match = _CLIENT.search(line)
        if match is not None and match["kind"] not in _NO_NETWORKS:
            yield match["name"], match["index"], match["kind"], match["rest"]


def _pairs(rest: str) -> Iterator[tuple[str, str]]:
    key = ""
    value: list[str] = []
    for part in rest.split(","):
        name, equals, text = part.partition("=")
        if equals:
            if key:
                yield key, ",".join(value)
            key, value = name, [text]
        elif part:
            value.append(part)
    if key:
        yield key, ",".join(value)


def _forwards(users: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ""
    for line in users.splitlines():
        if (head := _USER.match(line)) is not None:
            name = head["name"]
        elif (row := _FORWARD.match(line)) is not None:
            kind, host, port, guest, guest_port = row.groups()
            found.setdefault(name, []).append(_forward(kind.lower(), host, port, guest, guest_port))
    return found


def _forward(kind: str, host: str, port: str, guest: str, guest_port: str) -> str:
    return f"{kind}:{'' if host in ('*', '0.0.0.0') else host}:{port}-{guest}:{guest_port}"


def stated_networks(
    running: Mapping[str, Network], new: Mapping[str, Network], argv: Sequence[str]
) -> dict[str, Network]:
    """The networks that a process with this command line has when nothing else may be missing in it.

    Args:
        running: those of the guest, for what is chosen at each start (the name of a tap, port 0).
        new: those of a process with this command line, or of a trial of it, whose user networks are real.
        argv: the command line.
    """
    found: dict[str, Network] = {}
    unnamed: dict[str, int] = {}
    for option in ("-netdev", "-net", "-nic"):
        for each, value in options(argv):
            kind, given = settings(each, value)
            kind = _KINDS.get(kind, "")
            if each != option or not kind:
                continue
            label = given.get("id", "")
            if not label:
                unnamed[kind] = unnamed.get(kind, 0) + 1
                label = f"{kind} {unnamed[kind]}"
            before = running.get(label, Network(kind))
            if kind == "user":
                real = new.get(label, Network(kind))
                stated = [_stated_forward(text, given, real) for text in repeated(value, "hostfwd")]
                forwards = _with_chosen_ports(stated, before.forwards)
                found[label] = dataclasses.replace(real, forwards=tuple(sorted(forwards)))
            else:
                found[label] = Network(kind, tuple(_stated_tap(given, before)))
    return found


def _stated_forward(text: str, given: Mapping[str, str], network: Network) -> str:
    match = _STATED_FORWARD.match(text)
    if match is None:
        return text  # which equals nothing that QEMU says, so it is refused
    kind, host, port, guest, guest_port = match.groups()
    guest = guest if guest not in ("", "0.0.0.0") else given.get("dhcpstart", "")
    if not guest:
        with suppress(ValueError):
            guest = str(IPv4Address(int(IPv4Address(dict(network.settings).get("net", ""))) | 15))
    return _forward(kind or "tcp", host, port, guest, guest_port)


def _with_chosen_ports(stated: Sequence[str], present: Sequence[str]) -> list[str]:
    """Port 0 is any that was free at the start."""
    left = list(present)
    for text in stated:
        if text in left:
            left.remove(text)
    found = []
    for text in stated:
        kind, host, rest = text.split(":", 2) if text.count(":") >= 2 else ("", "", "")
        if rest.startswith("0-"):
            alike = re.compile(f"{re.escape(f'{kind}:{host}:')}\\d+{re.escape(rest[1:])}")
            chosen = next((each for each in left if alike.fullmatch(each)), None)
            if chosen is not None:
                left.remove(chosen)
                text = chosen  # noqa: PLW2901 - as it would be now
        found.append(text)
    return found


def _stated_tap(given: Mapping[str, str], before: Network) -> Iterator[tuple[str, str]]:
    present = dict(before.settings)
    for key in _TAP:
        if key in given:
            yield key, given[key]
        elif key in present:
            yield key, present[key] if _TAP_DEFAULTS[key](present[key]) else "(as at the start)"
