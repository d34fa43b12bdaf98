"""Whether one QEMU can take a guest over from another: compared before anything is paused. Pure.

QEMU itself refuses a process that lacks a device, but takes one that has a device more without a word, and a
disk that was changed since the start is not in any command line: so we compare what the two say of themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Picture:
    """What a QEMU says of itself. ``blocks``: RAM blocks and their sizes in bytes; ``disks``: their files."""

    version: str
    machine: str
    vcpus: int
    devices: Mapping[str, str]
    places: Mapping[str, str]
    blocks: Mapping[str, int]
    disks: Mapping[str, str]


def ram_blocks(text: str) -> dict[str, int]:
    """Names and used bytes from the monitor's ``info ramblock``."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*(\S.*?)\s+\d+ \S+\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)\s", line)
        if match:
            found[match[1]] = int(match[2], 16)
    return found


def device_types(listed: Any) -> dict[str, str]:
    """Devices and their types from ``qom-list``."""
    return {
        each["name"]: each["type"].removeprefix("child<").removesuffix(">")
        for each in listed
        if each["type"].startswith("child<")
    }


def counted(types: Mapping[str, str]) -> dict[str, str]:
    """Devices without a name of their own, by type and number: ``virtio-rng-pci 1``."""
    seen: dict[str, int] = {}
    for kind in types.values():
        seen[kind] = seen.get(kind, 0) + 1
    return {f"{kind} {number + 1}": kind for kind, many in seen.items() for number in range(many)}


def pci_places(buses: Any) -> dict[str, str]:
    """What is where on the PCI buses from ``query-pci``: vendor and device by place."""
    found = {}
    for bus in buses:
        for device in bus["devices"]:
            place = f"{device['bus']:02x}:{device['slot']:02x}.{device['function']}"
            found[f"at PCI {place}"] = f"{device['id']['vendor']:04x}:{device['id']['device']:04x}"
            if "pci_bridge" in device:
                found |= pci_places([{"devices": device["pci_bridge"].get("devices", [])}])
    return found


def disk_files(blocks: Any) -> dict[str, str]:
    """The file of each disk from ``query-block``, by device or by the path of what it is plugged into."""
    found = {}
    for block in blocks:
        medium = block.get("inserted")
        found[block.get("device") or block.get("qdev") or "?"] = medium["file"] if medium else ""
    return found


def mismatch(old: Picture, new: Picture, cpu: str) -> str:
    """Why ``new`` cannot take the guest of ``old`` over; empty: nothing speaks against it. ``cpu``: the model asked for."""
    if old.machine != new.machine:
        return f"the machine is a {old.machine} and the new process has a {new.machine}"
    if cpu in ("host", "max") and old.version != new.version:
        return (
            f"cpu model {cpu!r} is another one on QEMU {new.version} than on {old.version}: use a named model"
        )
    if old.vcpus != new.vcpus:
        return f"the guest has {old.vcpus} vCPUs and the new process {new.vcpus}"
    wrong = (
        _difference("device", old.devices, new.devices)
        or _difference("device", old.places, new.places)
        or _difference("disk", old.disks, new.disks)
    )
    if wrong:
        return wrong
    for name in sorted(old.blocks.keys() ^ new.blocks.keys()):
        which = "the new process lacks" if name in old.blocks else "the guest has no"
        return f"{which} RAM block {name!r}"
    for name, size in sorted(old.blocks.items()):
        # Tables that the firmware reads are made anew by each version and travel with the state.
        if not name.startswith("/rom@") and new.blocks[name] != size:
            return f"RAM block {name!r} has {size} bytes and {new.blocks[name]} in the new process"
    return ""


def _difference(what: str, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            return f"the new process lacks {what} {name} ({old[name]})"
        if name not in old:
            return f"the new process has {what} {name} ({new[name]}) that the guest has not"
        if old[name] != new[name]:
            return f"{what} {name} is {old[name]} and {new[name]} in the new process"
    return ""
