"""What a guest's own devices and networks are, under the same names: compared before another process takes it over.

A card or a disk that was unplugged and plugged in again otherwise, a network made again, a port forwarded by hand: each of
these was taken over by a process that has what the command line says, without a word.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from qemu.qmp.qmp_client import ExecuteError

from caesura_host_updater.drivers.port import DriverError
from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp, listener_of
from caesura_host_updater.drivers.qemu.definition import Definition, Disk, Nic
from caesura_host_updater.drivers.qemu.launching import LaunchFailed
from caesura_host_updater.drivers.qemu.observer import read_snapshot
from caesura_testing.guests import second_qemu
from caesura_testing.patience import patient

SMALL = Definition(memory_mib=16, machine="pc-q35-7.2")
PORT = ("-gdb", "tcp:127.0.0.1:0")
"""Something that only one process can have, so that a replace is compared with a trial only."""
WAYS = {"swap": ("swap", ()), "replace": ("replace", ()), "port": ("replace", PORT)}
BOTH_WAYS = pytest.mark.parametrize(("method", "extra"), list(WAYS.values()), ids=list(WAYS))
MAC = "52:54:00:00:00:0"
DEVICES = (
    *(word for n in (1, 2, 3) for word in ("-device", f"pcie-root-port,id=rp{n},chassis={n},slot={n}")),
    *("-netdev", "user,id=n0", "-device", f"virtio-net-pci,netdev=n0,id=net0,mac={MAC}1,bus=rp1,romfile="),
    *("-netdev", "user,id=n1", "-device", f"virtio-net-pci,netdev=n1,id=net1,mac={MAC}2,bus=rp2,romfile="),
    *("-device", "qemu-xhci,id=usb,p2=4,p3=4", "-device", "usb-tablet,id=tablet0,bus=usb.0,port=1"),
    *("-blockdev", "driver=null-co,node-name=null0,size=1048576,read-zeroes=on"),
    *("-device", "virtio-scsi-pci,id=scsi0"),
    *("-device", "scsi-hd,id=sd0,drive=null0,bus=scsi0.0,scsi-id=1,lun=2,serial=abc,bootindex=3"),
    *("-device", "virtio-rng-pci", "-device", "virtio-rng-pci,max-bytes=1024,period=1000"),
    *("-chardev", "null,id=line0", "-device", "pci-serial,chardev=line0,id=serial7"),
    *("-object", "iothread,id=io0", "-object", "secret,id=key0,data=one"),
)


def with_devices(*extra: str) -> Definition:
    """A guest with devices that can be plugged in again."""
    return msgspec.structs.replace(SMALL, extra=(*DEVICES, *extra))


async def ask(updater: Any, command: str, /, **arguments: Any) -> Any:
    """What an operator's tool asks of QEMU."""
    return await updater._guests["a"].qmp._client.execute(command, arguments)


async def type_in(driver: Any, line: str) -> None:
    """What an operator types into the monitor; QEMU answers nothing when it did it."""
    answer = await ask(driver, "human-monitor-command", **{"command-line": line})
    assert answer.strip() in ("", f"host forwarding rule for {line.rpartition(' ')[2]} removed"), answer


async def unplug(driver: Any, name: str, *, reset: bool = False) -> None:
    """Unplug a device; ``reset``: one that waits for its guest to release it, which a reset does for it."""
    await ask(driver, "device_del", id=name)
    if reset:
        await ask(driver, "system_reset")
    folder, _, last = name.rpartition("/")
    async with asyncio.timeout(patient(30)):
        while any(  # noqa: ASYNC110 - an event that was before the watch is none
            each["name"] == last
            for each in await ask(driver, "qom-list", path=folder or "/machine/peripheral")
        ):
            await asyncio.sleep(0.02)


async def plug_card(driver: Any, number: int, **arguments: Any) -> None:
    """The network card ``net0`` or ``net1`` again."""
    told = {"driver": "virtio-net-pci", "id": f"net{number}", "netdev": f"n{number}", "romfile": ""}
    told |= {"mac": f"{MAC}{number + 1}", "bus": f"rp{number + 1}"}
    await ask(driver, "device_add", **{**told, **arguments})


async def plug_tablet(driver: Any, **arguments: Any) -> None:
    """The tablet again."""
    await unplug(driver, "tablet0")
    told = {"driver": "usb-tablet", "id": "tablet0", "bus": "usb.0", "port": "1"}
    await ask(driver, "device_add", **{**told, **arguments})


async def plug_disk(driver: Any, **arguments: Any) -> None:
    """The disk ``sd0`` again."""
    await unplug(driver, "sd0")
    told = {"driver": "scsi-hd", "id": "sd0", "drive": "null0", "bus": "scsi0.0", "scsi-id": 1, "lun": 2}
    async with asyncio.timeout(patient(30)):
        while True:
            with suppress(ExecuteError):  # its predecessor is taken apart a moment after it has gone
                await ask(driver, "device_add", **{**told, "serial": "abc", "bootindex": 3, **arguments})
                return
            await asyncio.sleep(0.02)


async def make_network(driver: Any, **arguments: Any) -> None:
    """The network ``n1`` again, and its card, which is the same."""
    await unplug(driver, "net1", reset=True)
    await ask(driver, "netdev_del", id="n1")
    await ask(driver, "netdev_add", **{"type": "user", "id": "n1", **arguments})
    await plug_card(driver, 1)


async def forwarded(driver: Any) -> None:
    """A port of the host, by hand."""
    await type_in(driver, "hostfwd_add n0 tcp:127.0.0.1:0-:22")


async def other_network(driver: Any) -> None:
    """Other addresses."""
    await make_network(driver, net="10.7.0.0/16")


async def cut_off(driver: Any) -> None:
    """The guest may reach nobody."""
    await make_network(driver, restrict=True)


async def other_names(driver: Any) -> None:
    """Another name server, which QEMU does not say."""
    await make_network(driver, dns="10.0.2.9")


async def removed(driver: Any) -> None:
    """The card has no network since."""
    await ask(driver, "netdev_del", id="n0")


async def removed_and_made_again(driver: Any) -> None:
    """Nor has it the one that was made again."""
    await removed(driver)
    await ask(driver, "netdev_add", type="user", id="n0")


async def other_mac(driver: Any) -> None:
    """Another address of the card."""
    await unplug(driver, "net1", reset=True)
    await plug_card(driver, 1, mac=f"{MAC}9")


async def other_port(driver: Any) -> None:
    """Another place on its bus."""
    await plug_tablet(driver, port="2")


async def other_serial(driver: Any) -> None:
    """Another name of the disk in the guest's ``/dev/disk/by-id``."""
    await plug_disk(driver, serial="xyz")


async def other_lun(driver: Any) -> None:
    """Another place of the disk."""
    await plug_disk(driver, lun=3)


async def other_target(driver: Any) -> None:
    """The same."""
    await plug_disk(driver, **{"scsi-id": 2})


async def other_boot_order(driver: Any) -> None:
    """Another one at the guest's next boot."""
    await plug_disk(driver, bootindex=7)


async def other_slot(driver: Any) -> None:
    """Behind another root port."""
    await unplug(driver, "net0", reset=True)
    await plug_card(driver, 0, bus="rp3")


async def other_queues(driver: Any) -> None:
    """Another size of its queues, which the guest's driver has read."""
    await unplug(driver, "net0", reset=True)
    await plug_card(driver, 0, rx_queue_size=512)


async def other_rings(driver: Any) -> None:
    """Another layout of its queues."""
    await unplug(driver, "net0", reset=True)
    await plug_card(driver, 0, packed=True)


async def unnamed_device(driver: Any) -> None:
    """A device without an id, otherwise."""
    there = await ask(driver, "qom-list", path="/machine/peripheral-anon")
    paths = {each["type"]: f"/machine/peripheral-anon/{each['name']}" for each in there}
    await unplug(driver, paths["child<usb-kbd>"])
    await ask(driver, "device_add", driver="usb-kbd", serial="other", bus="usb.0", port="3")


async def polling(driver: Any) -> None:
    """An I/O thread that polls no longer."""
    await ask(driver, "qom-set", path="/objects/io0", property="poll-max-ns", value=0)


async def other_secret(driver: Any) -> None:
    """Another password under the same name."""
    await ask(driver, "object-del", id="key0")
    await ask(driver, "object-add", **{"qom-type": "secret", "id": "key0", "data": "two"})


async def other_line(driver: Any) -> None:
    """Another socket behind the guest's serial line."""
    path = Path(driver._guests["a"].run.qmp).parent / "elsewhere"
    address = {"type": "unix", "data": {"path": str(path)}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    await ask(driver, "chardev-change", id="line0", backend=backend)
    path.unlink()


CHANGES = [
    (
        other_line,
        r"character device 'line0' is unix /.*/elsewhere and null in the new process: chardev-change or chardev-add",
    ),
    (
        forwarded,
        r"network n0 is user net=.*,restrict=off,hostfwd=tcp:127\.0\.0\.1:\d+-10\.0\.2\.15:22 and user net=.* in the new",
    ),
    (
        other_network,
        r"network n1 is user net=10\.7\.0\.0,restrict=off and user net=10\.0\.2\.0,restrict=off in",
    ),
    (cut_off, r"network n1 is user net=10\.0\.2\.0,restrict=on and user net=10\.0\.2\.0,restrict=off in"),
    (
        other_names,
        r"network card net1 was plugged in at run time, and QEMU does not say all .* network n1 was given",
    ),
    (removed, r"network n0 is user removed with netdev_del and user net=10\.0\.2\.0"),
    (removed_and_made_again, r"network n0 is user removed with netdev_del and user net=10\.0\.2\.0"),
    (
        other_mac,
        rf'device net1 has .*mac "{MAC}9".* and .*mac "{MAC}2".* in the new process: plugged in again',
    ),
    (other_port, r'device tablet0 has at port 2, port "2" and at port 1, port "1" in the new process'),
    (other_serial, r'device sd0 has .*serial "xyz" and .*serial "abc" in the new process'),
    (other_lun, r"device sd0 has lun 3 and lun 2 in the new process"),
    (other_target, r"device sd0 has scsi-id 2 and scsi-id 1 in the new process"),
    (other_boot_order, r"device sd0 has bootindex 7 and bootindex 3 in the new process"),
    (other_slot, r"device net0 has bus rp3 and bus rp1 in the new process"),
    (other_queues, r"device net0 has rx_queue_size 512 and rx_queue_size 256 in the new process"),
    (other_rings, r"device net0 has packed true and packed false in the new process"),
    (unnamed_device, r'device usb-kbd 1 has serial "other" and serial "" in the new process'),
    (polling, r"object io0 has poll-max-ns 0 and poll-max-ns 32768 in the new process"),
    (other_secret, r"object key0 has data hidden-\w+ and data hidden-\w+ in the new process"),
]


@BOTH_WAYS
@pytest.mark.parametrize(("change", "why"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
async def test_what_is_another_one_under_the_same_name_is_refused(
    rig: Any, tools: Any, method: Any, extra: tuple[str, ...], change: Any, why: str
) -> None:
    """By the host when it is commanded, and before that by the plan."""
    more = ("-device", "usb-kbd,bus=usb.0,port=3")
    driver = await rig.open({"a": with_devices(*more, *extra)})
    pid = tools.pid_of(driver, "a")
    await change(driver)
    with pytest.raises(DriverError, match=why) as refused:
        await driver.prepare("a", "op-1", method, "")
    assert "one" not in re.findall(r"\w+", str(refused.value)), "no password is ever shown"
    await driver._assessor.assess(driver._guests["a"])
    assert method not in driver.capabilities("a").methods
    assert "freeze" in driver.capabilities("a").methods
    assert re.search(why, driver.capabilities("a").missing[method])
    assert tools.pid_of(driver, "a") == pid
    assert driver.states() == {"a": "running"}
    await rig.only(pid)


@pytest.mark.parametrize("method", ["swap", "replace"])
@pytest.mark.parametrize("change", [forwarded, other_serial], ids=lambda change: change.__name__)
async def test_what_changes_between_the_comparison_and_the_pause_is_refused_too(
    rig: Any, tools: Any, method: Any, change: Any
) -> None:
    driver = await rig.open({"a": with_devices()})
    pid = tools.pid_of(driver, "a")
    await driver.prepare("a", "op-1", method, "")
    await change(driver)
    with pytest.raises(DriverError, match=r"changed since it was compared: (network n0|device sd0)"):
        await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())
    assert await driver.resume("a", 5) == "running"
    await driver.release("a")
    await rig.only(pid)


async def test_a_new_qemu_that_makes_another_device_of_the_same_name(rig: Any, tools: Any) -> None:
    """It was noticed by QEMU itself, when it loaded the state: in the pause."""
    driver = await rig.open({"a": with_devices()})
    vectors = 'words = [w.replace("virtio-serial-pci,", "virtio-serial-pci,vectors=5,") for w in words]'
    with pytest.raises(DriverError, match="device channels has vectors 2 and vectors 5 in the new process"):
        await driver.prepare("a", "op-1", "swap", rig.wrapper(vectors))
    await rig.only(tools.pid_of(driver, "a"))


@pytest.mark.parametrize("model", ["virtio-net-pci", "e1000"])
@pytest.mark.parametrize("again", [False, True], ids=["removed", "made again"])
async def test_a_network_that_was_removed_under_a_card_of_the_same_name(
    rig: Any, tools: Any, model: str, again: bool
) -> None:
    """As Proxmox names them. A card of the one kind answers in its network's place, the other kind refuses to."""
    extra = ("-netdev", "user,id=net0", "-device", f"{model},netdev=net0,id=net0,romfile=")
    driver = await rig.open({"a": msgspec.structs.replace(SMALL, extra=extra)})
    await driver._assessor.assess(driver._guests["a"])
    assert "swap" in driver.capabilities("a").methods
    await ask(driver, "netdev_del", id="net0")
    if again:
        await ask(driver, "netdev_add", type="user", id="net0")
    with pytest.raises(DriverError, match="network net0 is user removed with netdev_del and user net="):
        await driver.prepare("a", "op-1", "swap", "")


@pytest.mark.parametrize("version", ["the same QEMU", "another QEMU"])
async def test_a_machine_that_nobody_changed_is_taken_over(rig: Any, tools: Any, version: str) -> None:
    """Every kind of device here, and the firmware has run: nothing of what it did is a difference."""
    binary = ""
    if version == "another QEMU":
        second = await asyncio.to_thread(second_qemu)
        if second.binary is None:
            pytest.skip(f"no second QEMU: {second.reason}")
        binary = second.binary
    more = (
        *(
            "-nic",
            "user,model=rtl8139,net=10.3.0.0/24",
            "-device",
            "usb-mouse",
            "-device",
            "usb-kbd,bus=usb.0",
        ),
        *(
            "-device",
            "virtio-serial-pci",
            "-chardev",
            "null,id=c0",
            "-device",
            "virtserialport,chardev=c0,id=vp0",
        ),
        *(
            "-drive",
            f"file={rig.disk('i.qcow2')},if=virtio",
            "-device",
            "VGA",
            "-device",
            "ich9-ahci,id=ahci",
        ),
        *("-device", "vmgenid,guid=auto,id=gen", "-object", "filter-buffer,id=f0,netdev=n1,interval=1000"),
        *(
            "-serial",
            "null",
            "-serial",
            f"file:{rig.folder}/log",
            "-parallel",
            "null",
            "-chardev",
            "ringbuf,id=c1",
        ),
        *(
            "-chardev",
            f"socket,id=c2,path={rig.folder}/c2,server=on,wait=off,mux=on",
            "-chardev",
            "pty,id=c3",
        ),
        *("-serial", f"unix:{rig.folder}/c4,server=on,wait=off"),
        *("-net", "nic,model=e1000", "-net", "user", "-device", "virtio-balloon-pci,bus=rp2,id=balloon"),
    )
    definition = msgspec.structs.replace(
        with_devices(*more), nic=(Nic(),), disk=(Disk(file=str(rig.disk("d.qcow2"))),)
    )
    driver = await rig.open({"a": definition})

    async def numbered() -> bool:
        buses = await ask(driver, "query-pci")
        bridges = [each["pci_bridge"] for each in buses[0]["devices"] if "pci_bridge" in each]
        return any(bridge.get("devices") for bridge in bridges)

    async with asyncio.timeout(patient(60)):
        while not await numbered():  # noqa: ASYNC110 - the firmware tells nobody
            await asyncio.sleep(0.05)
    await driver._assessor.assess(driver._guests["a"])
    assert driver.capabilities("a").methods == ("live", "swap", "freeze", "replace", "reboot")
    for number, method in enumerate(("swap", "replace", "swap")):
        await driver.prepare("a", f"op-{number}", method, binary if number != 1 else "")
        await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())
        assert await driver.resume("a", 10) == "running"
        await driver.release("a")


async def test_forwarded_ports_of_the_command_line(rig: Any, tools: Any) -> None:
    """Those of the guest are compared with those that its command line names, in whatever way it writes them."""
    network = "user,id=n5,net=10.8.1.0/24,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp::0-10.8.1.77:53"
    legacy = """{"type":"user","id":"n6","dhcpstart":"10.0.2.99","hostfwd":[{"str":":127.0.0.1:0-:80"}]}"""
    extra = ("-netdev", network, "-device", "virtio-net-pci,netdev=n5,id=net5,romfile=", "-netdev", legacy)
    driver = await rig.open({"a": msgspec.structs.replace(SMALL, extra=extra)})
    await driver._assessor.assess(driver._guests["a"])
    assert driver.capabilities("a").methods == ("live", "freeze", "replace", "reboot")
    said = await ask(driver, "human-monitor-command", **{"command-line": "info usernet"})
    port = re.search(r"127\.0\.0\.1 (\d+) +10\.8\.1\.15", said)
    assert port is not None
    await type_in(driver, f"hostfwd_remove n5 tcp:127.0.0.1:{port[1]}")
    with pytest.raises(
        DriverError, match=r"network n5 is user net=10\.8\.1\.0.* and .*hostfwd=tcp:127\.0\.0\.1:0-10\.8"
    ):
        await driver.prepare("a", "op-1", "replace", "")


@pytest.fixture
def taps() -> Iterator[tuple[str, str]]:
    """Two taps of the host."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip("taps need root and /dev/net/tun")
    names = (f"cqa{os.getpid() % 100000}", f"cqb{os.getpid() % 100000}")
    for name in names:
        subprocess.run(["ip", "tuntap", "add", "mode", "tap", "name", name], check=True)
    yield names
    for name in names:
        subprocess.run(["ip", "link", "del", name], check=True)


async def test_a_tap_of_another_name(rig: Any, tools: Any, taps: tuple[str, str]) -> None:
    tap = f"tap,id=n7,ifname={taps[0]},script=no,downscript=no"
    card = ("-device", f"virtio-net-pci,netdev=n7,id=net7,mac={MAC}7,bus=rp3,romfile=")
    driver = await rig.open({"a": with_devices("-netdev", tap, *card)})
    await driver._assessor.assess(driver._guests["a"])
    assert driver.capabilities("a").methods == ("live", "freeze", "replace", "reboot")
    await unplug(driver, "net7", reset=True)
    await ask(driver, "netdev_del", id="n7")
    await ask(driver, "netdev_add", type="tap", id="n7", ifname=taps[1], script="no", downscript="no")
    await plug_card(driver, 7, mac=f"{MAC}7", bus="rp3")
    with pytest.raises(
        DriverError, match=rf"network n7 is tap ifname={taps[1]},.* and tap ifname={taps[0]},"
    ) as why:
        await driver.prepare("a", "op-1", "replace", "")
    assert "network card net7 was plugged in at run time" in str(why.value)


async def test_a_tap_that_gets_a_name_at_each_start(rig: Any, tools: Any, taps: tuple[str, str]) -> None:
    """Another name is no other network; a script in place of none is."""
    tap = (
        "-netdev",
        "tap,id=n7,script=no,downscript=no",
        "-device",
        "virtio-net-pci,netdev=n7,id=net7,romfile=",
    )
    driver = await rig.open({"a": with_devices(*tap)})
    for number, method in enumerate(("swap", "replace")):
        await driver.prepare("a", f"op-{number}", method, "")
        await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())
        assert await driver.resume("a", 10) == "running"
        await driver.release("a")


async def test_a_spice_socket_goes_along(rig: Any, tools: Any) -> None:
    """It was refused as a port of the host, which it is not."""
    place = rig.place("spice")
    extra = ("-spice", f"unix=on,addr={place}/socket,disable-ticketing=on", "-device", "VGA")
    try:
        driver = await rig.open({"a": msgspec.structs.replace(SMALL, extra=extra)})
    except LaunchFailed as error:
        pytest.skip(f"this QEMU has no SPICE: {error}")
    for number, method in enumerate(("swap", "replace")):
        await driver.prepare("a", f"op-{number}", method, "")
        await (driver.hand_over if method == "swap" else driver.checkpoint)("a", tools.soon())
        assert await driver.resume("a", 10) == "running"
        await driver.release("a")
        assert listener_of(str(place / "socket")) == tools.pid_of(driver, "a")
    assert [path.name for path in place.rglob("*")] == ["socket", "next"]


async def test_looking_at_ten_devices_asks_few_questions(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last look before a pause takes it as well: some 0.5 ms a command, and there are properties by the hundred."""
    driver = await rig.open({"a": with_devices()})
    client: AsyncQmp = driver._guests["a"].qmp
    await read_snapshot(client)
    asked: list[str] = []
    execute = client.execute

    async def counted(command: str, *arguments: Any, **more: Any) -> Any:
        asked.append(command)
        return await execute(command, *arguments, **more)

    monkeypatch.setattr(client, "execute", counted)
    await read_snapshot(client)
    assert 15 < len(asked) < 60, asked
