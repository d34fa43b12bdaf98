"""Asks a QEMU process what machine it has. See ``snapshot`` for what the answers mean."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp, QmpCommandRefused
from caesura_host_updater.drivers.qemu.character_devices import line_texts
from caesura_host_updater.drivers.qemu.devices import Settings, device_settings
from caesura_host_updater.drivers.qemu.networks import network_names, read_networks
from caesura_host_updater.drivers.qemu.snapshot import (
    VmSnapshot,
    busy_with,
    chardev_names,
    counted,
    device_types,
    disk_images,
    disk_limits,
    named_nodes,
    open_files,
    pci_places,
    ram_blocks,
    vcpu_places,
)

_STATE = frozenset(("type", "realized", "hotplugged", "hotpluggable", "loaded", "opened", "limits"))
"""What an object is or has become, not what it was given; the limits of throttle groups are read by name."""
_ELSEWHERE = {
    "iothread": frozenset(("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch")),  # query-iothreads
    "secret": frozenset(("iv", "keyid", "format", "file")),  # what they lead to is `data`
}
_SECRET = frozenset(("data", "password"))
_KEY = os.urandom(16)
"""For the digests that stand for passwords; it ends with this process, as they do."""
_NO_NETWORK = ("invalid net client name", "support rx-filter querying")
_BOOTABLE = frozenset(("drive", "netdev"))
"""Devices with one of these properties have a place in the boot order, which the device tree does not show."""
_NAMES: WeakKeyDictionary[AsyncQmp, dict[str, tuple[str, ...]]] = WeakKeyDictionary()
"""The names of the properties of each kind of object: the same as long as a process lives."""


async def read_machine(qmp: AsyncQmp) -> str:
    """The machine type as QEMU resolved it, such as ``pc-q35-7.2``. Raises QmpFailed."""
    return str(await qmp.execute("qom-get", path="/machine", property="type")).removesuffix("-machine")


async def read_snapshot(qmp: AsyncQmp) -> VmSnapshot:
    """What a QEMU says of its machine, in some 25 ms for ten devices. Raises QmpFailed."""
    ask = qmp.execute
    answers = await asyncio.gather(
        ask("qom-list", path="/machine/peripheral"),
        ask("qom-list", path="/machine/peripheral-anon"),
        ask("qom-list", path="/objects"),
        ask("query-cpus-fast"),
        ask("query-pci"),
        ask("human-monitor-command", command_line="info ramblock"),
        ask("query-block"),
        ask("query-named-block-nodes"),
        ask("query-jobs"),
        ask("query-block-exports"),
        ask("query-migrate"),
        ask("query-chardev"),
        ask("human-monitor-command", command_line="info qtree"),
        ask("human-monitor-command", command_line="info network"),
        ask("human-monitor-command", command_line="info usernet"),
    )
    named, unnamed, objects, cpus, buses, ram, blocks, nodes, jobs, exports, migration, *more = answers
    chardevs, tree, clients, users = more
    kinds, others = device_types(named), device_types(unnamed)
    tree_settings = device_settings(tree, kinds, set(others.values()))
    (devices, held, stated), (gone, plugged), (machine, generation_id) = await asyncio.gather(
        asyncio.gather(
            _device_settings(qmp, kinds, others, tree_settings),
            _object_settings(qmp, device_types(objects)),
            _objects(qmp, device_types(objects)),
        ),
        asyncio.gather(
            _removed_networks(qmp, network_names(clients)),
            _plugged_in(qmp, kinds, others, tree_settings),
        ),
        asyncio.gather(read_machine(qmp), _generation_id(qmp)),
    )
    return VmSnapshot(
        version=qmp.version,
        machine=machine,
        vcpus=vcpu_places(cpus),
        devices={**kinds, **counted(others)},
        places=pci_places(buses),
        settings={
            **{f"device {name}": settings for name, settings in devices.items()},
            **{f"object {name}": settings for name, settings in held.items()},
        },
        networks=read_networks(clients, users, gone),
        plugged=plugged,
        blocks=ram_blocks(ram),
        disks=disk_images(blocks),
        limits=disk_limits(blocks),
        nodes=named_nodes(nodes),
        objects=stated,
        chardevs=chardev_names(chardevs),
        lines=line_texts(chardevs),
        files=open_files(nodes),
        generation_id=generation_id,
        busy=tuple(busy_with(jobs, exports, nodes, migration)),
        blockers=tuple(str(why) for why in migration.get("blocked-reasons", ())),
    )


async def _objects(qmp: AsyncQmp, kinds: dict[str, str]) -> dict[str, str]:
    """Objects and their types; of a throttle group its limits, too, which can be set at run time."""
    found = dict(kinds)
    for name, kind in kinds.items():
        if kind == "throttle-group":
            limits = await qmp.execute("qom-get", path=f"/objects/{name}", property="limits")
            usual = {key: 1 if key.endswith("-max-length") else 0 for key in limits}
            held = [f"{key} {value}" for key, value in sorted(limits.items()) if value != usual[key]]
            found[name] = f"{kind} with {', '.join(held) or 'no limits'}"
    return found


async def _device_settings(
    qmp: AsyncQmp, kinds: Mapping[str, str], others: Mapping[str, str], tree: Mapping[str, Settings]
) -> dict[str, Settings]:
    """What the device tree lacks: devices that are on no bus (memory modules), and the order in which disks are booted."""
    # A CPU has hundreds of properties, which its model gives it; it is compared by its place.
    absent = [name for name, kind in kinds.items() if name not in tree and not kind.endswith("-cpu")]
    bootable = [name for name, settings in tree.items() if settings.keys() & _BOOTABLE]
    types = {name.rpartition(" ")[0] for name in bootable if name not in kinds}
    # Which of the devices without an id has which place in the order is not known: they are a set.
    paths = [(name, f"/machine/peripheral/{name}") for name in bootable if name in kinds]
    paths += [
        (f"{kind} 1", f"/machine/peripheral-anon/{name}") for name, kind in others.items() if kind in types
    ]
    orders, alone = await asyncio.gather(
        asyncio.gather(*(_property(qmp, path, "bootindex") for _, path in paths)),
        asyncio.gather(*(_properties(qmp, f"/machine/peripheral/{name}", kinds[name]) for name in absent)),
    )
    found: dict[str, Settings] = {**tree, **dict(zip(absent, alone, strict=True))}
    booted: dict[str, list[str]] = {}
    for (name, _), order in zip(paths, orders, strict=True):
        booted.setdefault(name, []).append(order)
    for name, each in booted.items():
        found[name] = {**found[name], "bootindex": ", ".join(sorted(filter(None, each)))}
    return found


async def _plugged_in(
    qmp: AsyncQmp, kinds: Mapping[str, str], others: Mapping[str, str], tree: Mapping[str, Settings]
) -> tuple[str, ...]:
    """The devices that were plugged in at run time; of those without an id all of a type if one of them was."""
    paths = [f"/machine/peripheral/{name}" for name in kinds]
    paths += [f"/machine/peripheral-anon/{name}" for name in others]
    when = await asyncio.gather(*(_property(qmp, path, "hotplugged") for path in paths))
    found = {name for name, hot in zip((*kinds, *others.values()), when, strict=True) if hot == "True"}
    unnamed = {name for name in tree if name not in kinds and name.rpartition(" ")[0] in found}
    return tuple(sorted(unnamed | {name for name in kinds if name in found}))


async def _removed_networks(qmp: AsyncQmp, names: tuple[str, ...]) -> list[str]:
    """The networks that were removed while a card is on them: ``info network`` shows them still.

    QEMU looks a name up in ``query-rx-filter`` (``net/net.c``): of a network it says "isn't a NIC". When the card has the
    name, too, as Proxmox gives it, and answers, there is no network of that name before it in QEMU's list.
    """

    async def known(name: str) -> bool:
        try:
            await qmp.execute("query-rx-filter", name=name)
        except QmpCommandRefused as error:
            return not any(words in str(error) for words in _NO_NETWORK)
        return False

    there = await asyncio.gather(*map(known, names))
    return [name for name, is_known in zip(names, there, strict=True) if not is_known]


async def _object_settings(qmp: AsyncQmp, kinds: Mapping[str, str]) -> dict[str, Settings]:
    """What objects were given. Not memory: that is compared by its blocks and by what the processes have mapped."""
    names = [name for name, kind in kinds.items() if not kind.startswith("memory-backend")]
    threads = await qmp.execute("query-iothreads") if "iothread" in kinds.values() else []
    found = await asyncio.gather(*(_properties(qmp, f"/objects/{name}", kinds[name]) for name in names))
    settings = dict(zip(names, found, strict=True))
    for thread in threads:
        polling = {key: str(value) for key, value in thread.items() if key not in ("id", "thread-id")}
        settings[thread["id"]] = {**settings.get(thread["id"], {}), **polling}
    return settings


async def _properties(qmp: AsyncQmp, path: str, kind: str) -> Settings:
    """The properties of one object that are a word or a number; passwords in a form that shows nothing."""
    known = _NAMES.setdefault(qmp, {})
    if kind not in known:
        try:
            listed = await qmp.execute("qom-list", path=path)
        except QmpCommandRefused:
            return {}  # it was removed this moment
        known[kind] = tuple(
            each["name"]
            for each in listed
            if each["name"] not in _STATE | _ELSEWHERE.get(kind, frozenset())
            and not each["type"].startswith(("child<", "link<"))
        )
    names = known[kind]
    found = await asyncio.gather(*(_property(qmp, path, name) for name in names))
    return {name: _hidden(text) if name in _SECRET else text for name, text in zip(names, found, strict=True)}


async def _property(qmp: AsyncQmp, path: str, name: str) -> str:
    try:
        return str(await qmp.execute("qom-get", path=path, property=name))
    except QmpCommandRefused:
        return ""  # there is none, or it can only be set


def _hidden(text: str) -> str:
    return f"hidden-{hashlib.blake2b(text.encode(), key=_KEY, digest_size=4).hexdigest()}" if text else ""


async def _generation_id(qmp: AsyncQmp) -> str:
    try:
        answer: Any = await qmp.execute("query-vm-generation-id")
    except QmpCommandRefused:
        return ""  # no such device
    return str(answer["guid"])
