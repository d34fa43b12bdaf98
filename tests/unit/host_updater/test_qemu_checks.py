"""Two pictures of QEMUs: what is told apart before a guest is handed over."""

from __future__ import annotations

import msgspec
import pytest

from caesura_host_updater.drivers.qemu.checks import (
    Picture,
    counted,
    device_types,
    disk_files,
    mismatch,
    pci_places,
    ram_blocks,
)

ONE = Picture(
    version="7.2.22",
    machine="pc-q35-7.2",
    vcpus=2,
    devices={"net": "virtio-net-pci"},
    places={"at PCI 00:01.0": "1af4:1000"},
    blocks={"ram": 1 << 30, "pc.bios": 1 << 18, "/rom@etc/acpi/tables": 1 << 17},
    disks={"disk0": "/d.qcow2"},
)


def changed(**changes: object) -> Picture:
    """The same with changes."""
    known = {name: getattr(ONE, name) for name in ONE.__dataclass_fields__}
    return Picture(**(known | changes))


def test_the_same() -> None:
    assert mismatch(ONE, ONE, "host") == ""
    tables = changed(blocks={**ONE.blocks, "/rom@etc/acpi/tables": 1}, version="10.0.2")
    assert mismatch(ONE, tables, "qemu64") == "", "tables are made anew by each version"


@pytest.mark.parametrize(
    ("new", "cpu", "why"),
    [
        (changed(machine="pc-q35-7.1"), "", "is a pc-q35-7.2 and the new process has a pc-q35-7.1"),
        (changed(version="10.0.2"), "host", "'host' is another one on QEMU 10.0.2 than on 7.2.22"),
        (changed(vcpus=1), "", "2 vCPUs and the new process 1"),
        (changed(devices={}), "", "lacks device net (virtio-net-pci)"),
        (changed(devices={**ONE.devices, "x": "y"}), "", "has device x (y) that the guest has not"),
        (changed(devices={"net": "e1000"}), "", "device net is virtio-net-pci and e1000"),
        (changed(places={"at PCI 00:02.0": "1af4:1000"}), "", "lacks device at PCI 00:01.0"),
        (changed(disks={"disk0": "/base.qcow2"}), "", "disk disk0 is /d.qcow2 and /base.qcow2"),
        (changed(blocks={"ram": 1 << 30, "/rom@etc/acpi/tables": 1}), "", "lacks RAM block 'pc.bios'"),
        (changed(blocks={**ONE.blocks, "vga": 1}), "", "the guest has no RAM block 'vga'"),
        (changed(blocks={**ONE.blocks, "ram": 1 << 20}), "", "'ram' has 1073741824 bytes and 1048576"),
    ],
)
def test_what_differs_is_named(new: Picture, cpu: str, why: str) -> None:
    assert why in mismatch(ONE, new, cpu)


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
    blocks = [
        {"device": "disk0", "inserted": {"file": "/d"}},
        {"device": "", "qdev": "/machine/x"},
    ]
    assert disk_files(blocks) == {"disk0": "/d", "/machine/x": ""}
    behind = {"bus": 1, "slot": 2, "function": 0, "id": {"vendor": 1, "device": 2}}
    bridge = {"bus": 0, "slot": 1, "function": 0, "id": {"vendor": 0x1B36, "device": 12}}
    buses = [{"devices": [{**bridge, "pci_bridge": {"devices": [behind]}}]}]
    assert pci_places(buses) == {"at PCI 00:01.0": "1b36:000c", "at PCI 01:02.0": "0001:0002"}
    assert msgspec.json.encode(pci_places(buses))
