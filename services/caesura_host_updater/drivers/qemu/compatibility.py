"""Whether one QEMU process can take a guest over from another: compared before anything is paused. Pure.

QEMU itself refuses a process that lacks a device, but takes one that has a device more without a word, and what was
changed since the start (a snapshot, a medium, a limit) is in no command line: so we compare what the two say of
themselves. Every difference is named, with what an operator can do about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from caesura_host_updater.drivers.qemu.character_devices import line_differences, stated_lines
from caesura_host_updater.drivers.qemu.networks import stated_networks
from caesura_host_updater.drivers.qemu.snapshot import VmSnapshot

_AT_START = "the VM's command line must name what it has now"
_IDENTITY = frozenset(
    (
        *("bus", "addr", "at port", "port", "unit", "nr", "channel", "scsi-id", "lun", "slot", "node"),
        *("mac", "serial", "wwn", "name", "drive", "netdev", "chardev", "bootindex"),
    )
)
"""The properties that say what a device is and where: they have no default that could change."""


def differences(old: VmSnapshot, new: VmSnapshot, cpu: str) -> tuple[str, ...]:
    """Why ``new`` cannot take the guest of ``old`` over; empty: nothing speaks against it. ``cpu``: the model asked for."""
    return tuple(dict.fromkeys(_differences(old, new, cpu)))


def _differences(old: VmSnapshot, new: VmSnapshot, cpu: str) -> Iterator[str]:
    if old.machine != new.machine:
        yield f"the machine is a {old.machine} and the new process has a {new.machine}"
    if cpu in ("host", "max") and old.version != new.version:
        yield f"cpu model {cpu!r} is another one on QEMU {new.version} than on {old.version}: use a named model"
    if len(old.vcpus) != len(new.vcpus):
        yield f"the guest has {len(old.vcpus)} vCPUs and the new process {len(new.vcpus)}: {_AT_START}"
    elif old.vcpus != new.vcpus:
        yield f"the guest's vCPUs are at {'; '.join(old.vcpus)} and the new process's at {'; '.join(new.vcpus)}"
    yield from _difference("device", old.devices, new.devices, _AT_START)
    yield from _difference("device", old.places, new.places, _AT_START)
    yield from _setting_differences(old, new)
    yield from _network_differences(old, new)
    disks = list(
        _difference(
            "disk",
            old.disks,
            new.disks,
            f"a snapshot, a commit or a change of medium since its start: {_AT_START}",
        )
    )
    yield from disks
    nodes = _difference(
        "block node", old.nodes, new.nodes, f"blockdev-add or blockdev-del since its start: {_AT_START}"
    )
    yield from (each for each in nodes if not disks)  # a disk's own nodes would only say the same again
    yield from _difference(
        "the I/O setting of disk", old.limits, new.limits, f"set at run time: reset them, or {_AT_START}"
    )
    yield from _difference("object", old.objects, new.objects, _AT_START)
    for name in sorted(set(old.chardevs) ^ set(new.chardevs)):
        which = "the new process lacks" if name in old.chardevs else "the guest has no"
        yield f"{which} character device {name!r}: {_AT_START}"
    for name, here, there in line_differences(old.lines, new.lines):
        yield (
            f"character device {name!r} is {here or 'nothing'} and {there or 'nothing'} in the new process: chardev-change "
            f"or chardev-add since its start: {_AT_START}"
        )
    yield from _ram_differences(old.blocks, new.blocks)
    if old.generation_id != new.generation_id:
        yield f"the VM generation id is {old.generation_id or 'none'} and {new.generation_id or 'none'} in the new process"


def _setting_differences(old: VmSnapshot, new: VmSnapshot) -> Iterator[str]:
    """What a device or an object was given.

    A property that only one of two versions knows is as its machine type made it. So is, across versions, one whose default
    changed: of a device that was there at the start they are compared only if they say what the device is and where.
    """
    for name in sorted(old.settings.keys() & new.settings.keys()):
        here, there = old.settings[name], new.settings[name]
        what, _, label = name.partition(" ")
        is_device = what == "device"
        keys = here.keys() & there.keys()
        if old.version != new.version and is_device and label not in old.plugged:
            keys &= _IDENTITY
        differing = sorted(key for key in keys if here[key] != there[key])
        kinds = (old.devices, new.devices) if is_device else (old.objects, new.objects)
        if differing and kinds[0].get(label) == kinds[1].get(label):
            yield (
                f"{name} has {_listed(here, differing)} and {_listed(there, differing)} in the new process: plugged in "
                f"again or set since its start: {_AT_START}"
            )


def _listed(settings: Mapping[str, str], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {settings[key] or 'unset'}" for key in keys)


def _network_differences(old: VmSnapshot, new: VmSnapshot) -> Iterator[str]:
    yield from _difference(
        "network",
        {name: network.text for name, network in old.networks.items()},
        {name: network.text for name, network in new.networks.items()},
        f"netdev_add, netdev_del, hostfwd_add or hostfwd_remove since its start: {_AT_START}",
    )
    for card in old.plugged:
        network = old.settings.get(f"device {card}", {}).get("netdev", "").strip('"')
        if network and card not in new.plugged:
            yield (
                f"network card {card} was plugged in at run time, and QEMU does not say all that its network {network} "
                "was given (dns, guestfwd, sndbuf and the like): restart the VM once"
            )


def _ram_differences(old: Mapping[str, int], new: Mapping[str, int]) -> Iterator[str]:
    for name in sorted(old.keys() ^ new.keys()):
        which = "the new process lacks" if name in old else "the guest has no"
        yield f"{which} RAM block {name!r}"
    for name in sorted(old.keys() & new.keys()):
        # Tables that the firmware reads are made by each version itself and travel with the state.
        if not name.startswith("/rom@") and new[name] != old[name]:
            yield f"RAM block {name!r} has {old[name]} bytes and {new[name]} in the new process"


def _difference(what: str, old: Mapping[str, str], new: Mapping[str, str], hint: str) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"the new process lacks {what} {name} ({old[name]}): {hint}"
        elif name not in old:
            yield f"the new process has {what} {name} ({new[name]}) that the guest has not: {hint}"
        elif old[name] != new[name]:
            yield f"{what} {name} is {old[name] or 'empty'} and {new[name] or 'empty'} in the new process: {hint}"


def as_stated(running: VmSnapshot, new: VmSnapshot, argv: Sequence[str]) -> VmSnapshot:
    """A process's machine with the networks and character devices that its command line names.

    A trial has user networks only and nothing behind its character devices.
    """
    cards = {
        name: {key: text for key, text in settings.items() if key != "vectors"}
        for name, settings in new.settings.items()
        if "netdev" in settings  # its vectors are made for the queues of a tap
    }
    networks = stated_networks(running.networks, new.networks, argv)
    lines = stated_lines(running.lines, argv)
    return replace(new, networks=networks, lines=lines, settings={**new.settings, **cards})


def moved_bytes(blocks: Mapping[str, int], shared: str) -> int:
    """What a hand-over may copy at the most: the RAM blocks that are not in the shared file, such as firmware and video."""
    return sum(size for name, size in blocks.items() if name.removeprefix("/objects/") != shared)
