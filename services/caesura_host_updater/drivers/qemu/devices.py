"""What the devices of a machine were given, each by its name: read from QEMU's device tree. Pure.

``info qtree`` (QEMU's ``system/qdev-monitor.c``) prints every device with its qdev properties, those that ``-device``
takes, in one answer; asking for them one by one over ``qom-get`` costs 0.6 ms each. It has a device's place, too: the bus
that it is on and its address there as they were given, which needs no firmware that has numbered the buses.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

Settings = Mapping[str, str]
"""What a device or an object was given: property to text."""

_LINE = re.compile(
    r'^( *)(?:bus: (?P<bus>.*)|dev: (?P<kind>[^,]+), id "(?P<id>.*)"|(?P<key>[\w.-]+) = (?P<value>.*))$'
)
_NUMBER = re.compile(r"^(-?\d+) \(.*\)$")
_USB_PORT = re.compile(r"^ *addr \d+\.\d+, port (\S+), speed ")
_AUTOMATIC = re.compile(r'^"?#')
_RUNTIME = frozenset(("busnr",))
"""Set by the guest's firmware, not by the one who plugged the device in."""
_ALIKE = {("rombar", "-1"): "1"}
"""QEMU 9.2 and later say -1, "unless set otherwise", for what was 1 before: the ROM is visible in both."""


@dataclass
class _Device:
    indent: int
    kind: str
    id: str
    found: dict[str, str] = field(default_factory=dict)


def device_settings(tree: str, named: Collection[str], unnamed: Collection[str]) -> dict[str, Settings]:
    """The settings of the devices that somebody plugged in, by the id or by type and number.

    Args:
        tree: the answer to ``info qtree``.
        named: the ids of devices (``/machine/peripheral``).
        unnamed: the types of devices without an id (``/machine/peripheral-anon``); the board's own of these types
            are compared, too. They are numbered in the order of their places, not of their creation.
    """
    found: dict[str, Settings] = {}
    others: dict[str, list[dict[str, str]]] = {}
    for device in _devices(tree, named, unnamed):
        if device.id:
            found[device.id] = device.found
        else:
            others.setdefault(device.kind, []).append(device.found)
    for kind, settings in others.items():
        for number, each in enumerate(sorted(settings, key=_place)):
            found[f"{kind} {number + 1}"] = each
    return found


def _place(settings: Settings) -> tuple[str, str, list[tuple[str, str]]]:
    return settings.get("bus", ""), settings.get("addr", ""), sorted(settings.items())


def _devices(tree: str, named: Collection[str], unnamed: Collection[str]) -> Iterator[_Device]:
    """Every device that was plugged in, with what is inside it: a virtio device is two, one in the other."""
    inside: list[tuple[int, str, _Device | None]] = []  # buses and devices around a line: indent, bus, device
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        match = _LINE.match(line)
        if match is None:
            port = _USB_PORT.match(line)
            if port is not None and inside and inside[-1][2] is not None:
                inside[-1][2].found.setdefault("at port", port[1])
            continue
        while inside and inside[-1][0] >= indent:
            inside.pop()
        owner = inside[-1][2] if inside else None
        if match["bus"] is not None:
            inside.append((indent, match["bus"], owner))
        elif match["kind"] is not None:
            if match["id"] in named or (not match["id"] and match["kind"] in unnamed):
                bus = next((name for _, name, _ in reversed(inside) if name), "")
                owner = _Device(indent, match["kind"], match["id"], {"bus": bus})
                yield owner  # it is filled by the lines that follow
            inside.append((indent, "", owner))
        elif owner is not None:
            _add(owner.found, match["key"], match["value"])


def _add(found: dict[str, str], key: str, value: str) -> None:
    if key in _RUNTIME:
        return
    number = _NUMBER.match(value)
    text = number[1] if number is not None else value
    text = "(automatic)" if _AUTOMATIC.match(text) else text
    name, again = key, 1
    while name in found:
        again += 1
        name = f"{key} {again}"
    found[name] = _ALIKE.get((key, text), text)
