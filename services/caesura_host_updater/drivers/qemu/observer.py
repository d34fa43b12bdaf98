"""Asks a QEMU process what machine it has. See ``snapshot`` for what the answers mean."""

from __future__ import annotations

import asyncio
from typing import Any

from caesura_host_updater.drivers.qemu.qmp import Qmp, QmpRefused
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


async def read_machine(qmp: Qmp) -> str:
    """The machine type as QEMU resolved it, such as ``pc-q35-7.2``. Raises QmpFailed."""
    return str(await qmp.execute("qom-get", path="/machine", property="type")).removesuffix("-machine")


async def read_snapshot(qmp: Qmp) -> VmSnapshot:
    """What a QEMU says of its machine, in some 5 ms. Raises QmpFailed."""
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
    )
    named, unnamed, objects, cpus, buses, ram, blocks, nodes, jobs, exports, migration, chardevs = answers
    return VmSnapshot(
        version=qmp.version,
        machine=await read_machine(qmp),
        vcpus=vcpu_places(cpus),
        devices={**device_types(named), **counted(device_types(unnamed))},
        places=pci_places(buses),
        blocks=ram_blocks(ram),
        disks=disk_images(blocks),
        limits=disk_limits(blocks),
        nodes=named_nodes(nodes),
        objects=await _objects(qmp, device_types(objects)),
        chardevs=chardev_names(chardevs),
        files=open_files(nodes),
        generation_id=await _generation_id(qmp),
        busy=tuple(busy_with(jobs, exports, nodes, migration)),
        blockers=tuple(str(why) for why in migration.get("blocked-reasons", ())),
    )


async def _objects(qmp: Qmp, kinds: dict[str, str]) -> dict[str, str]:
    """Objects and their types; of a throttle group its limits, too, which can be set at run time."""
    found = dict(kinds)
    for name, kind in kinds.items():
        if kind == "throttle-group":
            limits = await qmp.execute("qom-get", path=f"/objects/{name}", property="limits")
            usual = {key: 1 if key.endswith("-max-length") else 0 for key in limits}
            held = [f"{key} {value}" for key, value in sorted(limits.items()) if value != usual[key]]
            found[name] = f"{kind} with {', '.join(held) or 'no limits'}"
    return found


async def _generation_id(qmp: Qmp) -> str:
    try:
        answer: Any = await qmp.execute("query-vm-generation-id")
    except QmpRefused:
        return ""  # no such device
    return str(answer["guid"])
