"""Two machines as their QEMUs describe them: what is told apart before a guest is handed over."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from caesura_host_updater.drivers.qemu.compatibility import as_stated, differences, moved_bytes
from caesura_host_updater.drivers.qemu.networks import Network
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

ONE = VmSnapshot(
    version="7.2.22",
    machine="pc-q35-7.2",
    vcpus=("core-id 0", "core-id 1"),
    devices={"net": "virtio-net-pci"},
    places={"at PCI 00:01.0": "1af4:1000"},
    settings={
        "device net": {"mac": "1", "netdev": "n0", "vectors": "4"},
        "object ram": {"size": "1"},
        "object gone": {"size": "1"},
    },
    networks={"n0": Network("user", (("net", "10.0.2.0"),))},
    blocks={"ram": 1 << 30, "pc.bios": 1 << 18, "/rom@etc/acpi/tables": 1 << 17},
    disks={"disk0": "qcow2 /d.qcow2"},
    limits={"disk0": "no limits"},
    nodes={"n": "qcow2 /d.qcow2"},
    objects={"ram": "memory-backend-file"},
    chardevs=("serial0",),
    lines={"serial0": "unix /s"},
    generation_id="3cb7",
)


def changed(**changes: object) -> VmSnapshot:
    """The same with changes."""
    known = {name: getattr(ONE, name) for name in ONE.__dataclass_fields__}
    return VmSnapshot(**(known | changes))


def test_the_same() -> None:
    assert differences(ONE, ONE, "host") == ()
    tables = changed(blocks={**ONE.blocks, "/rom@etc/acpi/tables": 1}, version="10.0.2")
    assert differences(ONE, tables, "qemu64") == (), "tables are made anew by each version"


@pytest.mark.parametrize(
    ("new", "cpu", "why"),
    [
        (changed(machine="pc-q35-7.1"), "", "is a pc-q35-7.2 and the new process has a pc-q35-7.1"),
        (changed(version="10.0.2"), "host", "'host' is another one on QEMU 10.0.2 than on 7.2.22"),
        (changed(vcpus=("core-id 0",)), "", "2 vCPUs and the new process 1"),
        (changed(devices={}), "", "lacks device net (virtio-net-pci)"),
        (changed(devices={**ONE.devices, "x": "y"}), "", "has device x (y) that the guest has not"),
        (changed(devices={"net": "e1000"}), "", "device net is virtio-net-pci and e1000"),
        (
            changed(settings={"device net": {"mac": "", "netdev": "n1"}}),
            "",
            "device net has mac 1, netdev n0 and mac unset, netdev n1 in the new process: plugged in again or",
        ),
        (changed(settings={"object ram": {"size": "2"}}), "", "object ram has size 1 and size 2 in"),
        (changed(networks={}), "", "lacks network n0 (user net=10.0.2.0): netdev_add, netdev_del"),
        (changed(networks={"n0": Network("tap")}), "", "network n0 is user net=10.0.2.0 and tap in the new"),
        (changed(places={"at PCI 00:02.0": "1af4:1000"}), "", "lacks device at PCI 00:01.0"),
        (changed(vcpus=("core-id 0", "core-id 2")), "", "vCPUs are at core-id 0; core-id 1 and"),
        (changed(nodes={}), "", "lacks block node n (qcow2 /d.qcow2): blockdev-add"),
        (changed(limits={"disk0": "bps 1"}), "", "disk disk0 is no limits and bps 1"),
        (changed(objects={}), "", "lacks object ram"),
        (changed(chardevs=()), "", "lacks character device 'serial0'"),
        (changed(lines={"serial0": "null"}), "", "device 'serial0' is unix /s and null in the new process"),
        (changed(chardevs=("serial0", "x")), "", "no character device 'x'"),
        (changed(generation_id=""), "", "generation id is 3cb7 and none"),
        (changed(disks={"disk0": ""}), "", "and empty in the new process"),
        (
            changed(disks={"disk0": "qcow2 /base.qcow2"}),
            "",
            "disk disk0 is qcow2 /d.qcow2 and qcow2 /base.qcow2 in the new process: a snapshot",
        ),
        (changed(blocks={"ram": 1 << 30, "/rom@etc/acpi/tables": 1}), "", "lacks RAM block 'pc.bios'"),
        (changed(blocks={**ONE.blocks, "vga": 1}), "", "the guest has no RAM block 'vga'"),
        (changed(blocks={**ONE.blocks, "ram": 1 << 20}), "", "'ram' has 1073741824 bytes and 1048576"),
    ],
)
def test_what_differs_is_named(new: VmSnapshot, cpu: str, why: str) -> None:
    assert why in "; ".join(differences(ONE, new, cpu))


def test_settings_that_only_one_version_has_are_its_machine_types() -> None:
    newer = {"device net": {"mac": "1", "netdev": "n0", "x-new": "2"}, "object more": {}}
    assert differences(ONE, changed(settings=newer), "") == ()


def test_a_default_that_changed_from_version_to_version_is_no_difference() -> None:
    """The events of a pvpanic are one; what was plugged in at run time need not have the default."""
    old = changed(settings={"device net": {"events": "3", "mac": "1"}})
    new = changed(settings={"device net": {"events": "7", "mac": "1"}}, version="10.0.2")
    assert differences(old, new, "") == ()
    assert "device net has events 3 and events 7" in "; ".join(
        differences(old, changed(settings=new.settings), "")
    )
    plugged = changed(settings=old.settings, plugged=("net",))
    assert "device net has events 3 and events 7" in "; ".join(differences(plugged, new, ""))
    other = changed(settings={"device net": {"events": "7", "mac": "2"}}, version="10.0.2")
    assert "device net has mac 1 and mac 2 in" in "; ".join(differences(old, other, ""))


def test_settings_of_another_type_say_nothing_more() -> None:
    other = changed(devices={"net": "e1000"}, settings={"device net": {"mac": "2"}})
    assert not [each for each in differences(ONE, other, "") if "mac" in each]


def test_a_card_that_was_plugged_in_at_run_time() -> None:
    """Its network may be another one in ways that QEMU does not say."""
    plugged = changed(plugged=("net",))
    assert (
        "card net was plugged in at run time, and QEMU does not say all that its network n0 was given"
        in "; ".join(differences(plugged, ONE, ""))
    )
    assert differences(plugged, plugged, "") == differences(ONE, plugged, "") == ()


def test_a_trial_has_the_networks_of_its_command_line() -> None:
    argv = ("/q", "-netdev", "user,id=n0,hostfwd=tcp::22-:22", "-netdev", "tap,id=n1,ifname=t0")
    found = as_stated(ONE, ONE, argv)
    assert {name: network.text for name, network in found.networks.items()} == {
        "n0": "user net=10.0.2.0,hostfwd=tcp::22-10.0.2.15:22",
        "n1": "tap ifname=t0",
    }
    assert found.settings["device net"] == {"mac": "1", "netdev": "n0"}, (
        "vectors are made for the queues of a tap"
    )
    assert found.settings["object ram"] == ONE.settings["object ram"]


def test_every_difference_is_named_at_once() -> None:
    new = changed(vcpus=(), devices={}, disks={}, nodes={}, blocks={})
    found = "; ".join(differences(ONE, new, ""))
    for word in ("vCPUs", "device net", "disk disk0", "RAM block 'ram'", "RAM block 'pc.bios'"):
        assert word in found
    assert "block node" not in found, "a disk's own nodes would only say the same again"


def test_what_a_hand_over_may_copy() -> None:
    blocks = {"ram": 1 << 30, "pc.bios": 1 << 18, "0000:00:02.0/vga.vram": 16 << 20}
    assert moved_bytes(blocks, "ram") == (1 << 18) + (16 << 20)
    assert moved_bytes({**blocks, "/objects/ram": 1 << 30}, "ram") == (1 << 18) + (16 << 20)


def test_reading_what_qemu_says() -> None:
    text = (
        "              Block Name    PSize              Offset               Used              Total\r\n"
        "                     ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n"
        "    /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000\r\n"
    )
    assert ram_blocks(text) == {"ram": 0x4000000, "/rom@etc/acpi/tables": 0x20000}
    listed = [{"name": "type", "type": "string"}, {"name": "device[0]", "type": "child<virtio-rng-pci>"}]
    assert device_types(listed) == {"device[0]": "virtio-rng-pci"}
    assert counted({"device[0]": "a", "device[1]": "b", "device[2]": "a"}) == {
        "a 1": "a",
        "a 2": "a",
        "b 1": "b",
    }
    behind = {"bus": 1, "slot": 2, "function": 0, "id": {"vendor": 1, "device": 2}}
    bridge = {"bus": 0, "slot": 1, "function": 0, "id": {"vendor": 0x1B36, "device": 12}}
    buses = [{"devices": [{**bridge, "pci_bridge": {"devices": [behind]}}]}]
    assert pci_places(buses) == {"at PCI 00:01.0": "1b36:000c"}, "buses are numbered by the guest's firmware"
    assert msgspec.json.encode(pci_places(buses))
    cpus = [{"props": {"socket-id": 1, "core-id": 0}}, {"props": {"socket-id": 0, "core-id": 0}}]
    assert vcpu_places(cpus) == ("core-id 0, socket-id 0", "core-id 0, socket-id 1")
    labels = [{"label": "serial0"}, {"label": "serial0-base"}, {"label": "compat_monitor0"}]
    assert chardev_names(labels) == ("serial0",)


MEDIUM = {
    "drv": "qcow2",
    "file": "/top.qcow2",
    "ro": False,
    "node-name": "#block1",
    "cache": {"writeback": False, "direct": True, "no-flush": False},
    "image": {
        "filename": "/top.qcow2",
        "backing-image": {
            "format": "qcow2",
            "filename": "/mid.qcow2",
            "backing-image": {"format": "raw", "filename": "/base.raw"},
        },
    },
}


def test_reading_disks() -> None:
    blocks = [
        {"device": "disk0", "inserted": MEDIUM},
        {"device": "", "qdev": "/machine/x"},
        {
            "device": "cd",
            "inserted": {**MEDIUM, "ro": True, "image": {}, "bps": 5, "group": "g", "bps_max": 9},
        },
    ]
    assert disk_images(blocks) == {
        "disk0": "qcow2 /top.qcow2 over qcow2 /mid.qcow2 over raw /base.raw",
        "/machine/x": "",
        "cd": "qcow2 /top.qcow2 (read-only)",
    }
    assert disk_limits(blocks) == {
        "disk0": "cache direct",
        "cd": "bps 5, bps_max 9, group g, cache direct",
    }
    file = {"drv": "file", "file": "/top.qcow2", "node-name": "f"}
    assert named_nodes([MEDIUM, file]) == {"f": "file /top.qcow2"}
    assert open_files([MEDIUM, file]) == ("/top.qcow2",)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"jobs": [{"id": "j", "type": "mirror", "status": "ready"}]}, "job 'j' (mirror) is ready: wait"),
        ({"exports": [{"id": "e", "type": "nbd", "node-name": "n"}]}, "block export 'e' (nbd) of node n"),
        ({"migration": {"status": "active"}}, "a migration of it is active"),
        (
            {"nodes": [{"file": "/d", "dirty-bitmaps": [{"name": "b", "persistent": False}]}]},
            "bitmap 'b' of /d",
        ),
        (
            {"nodes": [{"file": "/d", "dirty-bitmaps": [{"name": "b", "persistent": True, "busy": True}]}]},
            "bitmap 'b' of /d",
        ),
        ({"nodes": [{"file": "/d", "dirty-bitmaps": [{"persistent": False}]}]}, "(without a name)"),
    ],
)
def test_what_another_process_would_not_go_on_with(said: dict[str, Any], why: str) -> None:
    nothing: dict[str, Any] = {"jobs": [], "exports": [], "nodes": [], "migration": {}}
    assert why in "; ".join(busy_with(**(nothing | said)))
    assert not list(busy_with(**nothing))


def test_what_is_no_hindrance() -> None:
    kept = {"name": "b", "persistent": True, "busy": False}
    ended = [{"id": "j", "type": "mirror", "status": "null"}]
    nodes = [{"file": "/d", "dirty-bitmaps": [kept]}]
    assert not list(busy_with(ended, [], nodes, {"status": "completed"}))
