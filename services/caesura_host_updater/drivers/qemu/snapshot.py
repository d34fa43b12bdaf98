"""What a QEMU process says of the machine in it: read from QMP's answers. Pure.

Sources: QEMU's ``qapi/block-core.json`` (BlockInfo, BlockDeviceInfo, BlockDirtyInfo), ``qapi/job.json``,
``qapi/block-export.json``, ``qapi/migration.json`` (MigrationInfo), ``qapi/machine.json`` (CpuInfoFast),
``qapi/char.json``, ``qapi/qom.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from caesura_host_updater.drivers.qemu.devices import Settings
from caesura_host_updater.drivers.qemu.networks import Network

_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_UNDER_WAY = frozenset(
    {
        *("setup", "cancelling", "active", "pre-switchover", "device", "wait-unplug"),
        *("postcopy-active", "postcopy-paused", "postcopy-recover", "colo"),
    }
)
_ENDED_JOBS = frozenset(("null", "undefined"))


@dataclass(frozen=True)
class VmSnapshot:
    """A machine as its QEMU describes it. Values are texts for people; equal texts mean the same.

    Args:
        vcpus: each vCPU's place (socket, core, thread) and type.
        devices: qdev ids to their types; devices without an id by type and number.
        places: PCI addresses to vendor and device.
        settings: what devices and objects were given, by ``device net0`` or ``object io0``.
        networks: network back ends by their ids, those without one by kind and number.
        plugged: the devices that were plugged in at run time.
        blocks: RAM blocks to their used sizes in bytes.
        disks: each disk's image with its backing chain, by device or by what it is plugged into.
        limits: I/O limits and other settings of each disk that can be changed at run time.
        nodes: named block nodes to driver and file.
        objects: user-created QOM objects to their types.
        chardevs: the names of the character devices.
        lines: what is behind them, by their names.
        files: every file name that its block nodes have open.
        busy: what is under way or is served, which another process would not know of; each a reason for people.
        blockers: QEMU's own reasons against a migration.
    """

    version: str
    machine: str
    vcpus: tuple[str, ...]
    devices: Mapping[str, str]
    places: Mapping[str, str]
    blocks: Mapping[str, int]
    disks: Mapping[str, str]
    settings: Mapping[str, Settings] = field(default_factory=dict)
    networks: Mapping[str, Network] = field(default_factory=dict)
    plugged: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    chardevs: tuple[str, ...] = ()
    lines: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    generation_id: str = ""
    busy: tuple[str, ...] = ()
    blockers: tuple[str, ...] = ()


def ram_blocks(text: str) -> dict[str, int]:
    """Names and used bytes from the monitor's ``info ramblock``."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*(\S.*?)\s+\d+ \S+\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)\s", line)
        if match:
            found[match[1]] = int(match[2], 16)
    return found


def device_types(listed: Any) -> dict[str, str]:
    """Devices or objects and their types from ``qom-list``."""
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
    """What is where on the root buses from ``query-pci``: vendor and device by place.

    Not behind bridges: QEMU knows those places only when the guest's firmware has numbered the buses, which that of a
    new process never did.
    """
    found = {}
    for bus in buses:
        for device in bus["devices"]:
            place = f"{device['bus']:02x}:{device['slot']:02x}.{device['function']}"
            found[f"at PCI {place}"] = f"{device['id']['vendor']:04x}:{device['id']['device']:04x}"
    return found


def vcpu_places(cpus: Any) -> tuple[str, ...]:
    """Each vCPU's place from ``query-cpus-fast``, such as ``core-id 0, socket-id 1``."""
    return tuple(
        sorted(
            ", ".join(f"{key} {value}" for key, value in sorted(cpu.get("props", {}).items())) for cpu in cpus
        )
    )


def disk_images(blocks: Any) -> dict[str, str]:
    """Each disk's image with its backing chain from ``query-block``; empty where no medium is inserted."""
    return {_disk(block): _chain(block.get("inserted")) for block in blocks}


def _disk(block: Any) -> str:
    return str(block.get("device") or block.get("qdev") or "?")


def _chain(medium: Any) -> str:
    if not medium:
        return ""
    found = [f"{medium['drv']} {medium['file']}{' (read-only)' if medium['ro'] else ''}"]
    image = medium.get("image", {}).get("backing-image")
    while image:
        found.append(f"{image['format']} {image['filename']}")
        image = image.get("backing-image")
    return " over ".join(found)


def disk_limits(blocks: Any) -> dict[str, str]:
    """What can be set for a disk at run time: I/O limits, their group, zero detection, host cache."""
    found = {}
    for block in blocks:
        medium = block.get("inserted")
        if not medium:
            continue
        limits = [f"{key} {medium[key]}" for key in _LIMITS if medium.get(key)]
        limits += [f"{key} {medium[key]}" for key in sorted(medium) if key.endswith(("_max", "_max_length"))]
        if limits and medium.get("group"):
            limits.append(f"group {medium['group']}")
        if medium.get("detect_zeroes", "off") != "off":
            limits.append(f"detect-zeroes {medium['detect_zeroes']}")
        cache = medium.get("cache", {})
        limits += [f"cache {key}" for key in ("direct", "no-flush") if cache.get(key)]
        if medium.get("write_threshold"):
            limits.append(f"write-threshold {medium['write_threshold']}")
        found[_disk(block)] = ", ".join(limits) or "no limits"
    return found


def named_nodes(nodes: Any) -> dict[str, str]:
    """Block nodes with a name of their own from ``query-named-block-nodes``: driver and file."""
    return {
        node["node-name"]: f"{node['drv']} {node['file']}"
        for node in nodes
        if not node.get("node-name", "#").startswith("#")
    }


def open_files(nodes: Any) -> tuple[str, ...]:
    """The files that block nodes have open, as QEMU names them."""
    return tuple(
        sorted({str(node["file"]) for node in nodes if node["drv"] in ("file", "host_device", "host_cdrom")})
    )


def busy_with(jobs: Any, exports: Any, nodes: Any, migration: Any) -> Iterator[str]:
    """What is under way or is served that another process would not continue; reasons for people."""
    for job in jobs:
        if job["status"] not in _ENDED_JOBS:
            yield (
                f"job {job['id']!r} ({job['type']}) is {job['status']}: wait for its end, or end it with "
                "job-cancel or job-complete"
            )
    for export in exports:
        yield (
            f"block export {export['id']!r} ({export['type']}) of node {export['node-name']} has or may have "
            "clients: remove it with block-export-del"
        )
    for name, node in sorted(_volatile_bitmaps(nodes)):
        yield (
            f"dirty bitmap {name!r} of {node} lives in this process only: remove it with "
            "block-dirty-bitmap-remove, or make it a persistent one"
        )
    if wrong := migration_under_way(migration):
        yield wrong


def migration_under_way(migration: Any) -> str:
    """Why a guest must not be paused that is being migrated, from ``query-migrate``; empty: it is not."""
    status = migration.get("status")
    return f"a migration of it is {status}: wait for its end, or cancel it" if status in _UNDER_WAY else ""


def _volatile_bitmaps(nodes: Any) -> set[tuple[str, str]]:
    return {
        (str(bitmap.get("name") or "(without a name)"), str(node["file"]))
        for node in nodes
        for bitmap in node.get("dirty-bitmaps", ())
        if not bitmap.get("persistent") or bitmap.get("busy") or bitmap.get("inconsistent")
    }


def chardev_names(chardevs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Labels from ``query-chardev``, without those that monitors and debuggers have by themselves."""
    labels = (str(each["label"]) for each in chardevs)
    # A line that is shared with a monitor (`mon:`) has a second one below it, `serial0-base`.
    named = (label for label in labels if not label.endswith("-base"))
    return tuple(sorted(label for label in named if not label.startswith(("compat_monitor", "gdb", "#"))))
