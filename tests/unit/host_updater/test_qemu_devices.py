"""What QEMU's monitor prints of devices and networks, read; and the networks that a command line would make."""

from __future__ import annotations

import shlex

import pytest

from caesura_host_updater.drivers.qemu.arguments import repeated
from caesura_host_updater.drivers.qemu.character_devices import line_texts, stated_lines
from caesura_host_updater.drivers.qemu.devices import device_settings
from caesura_host_updater.drivers.qemu.networks import (
    Network,
    network_names,
    read_networks,
    stated_networks,
)

TREE = """\
bus: main-system-bus\r
  type System\r
  dev: hpet, id ""\r
    timers = 3 (0x3)\r
    mmio 00000000fed00000/0000000000000400\r
  dev: q35-pcihost, id ""\r
    bus: pcie.0\r
      type PCIE\r
      dev: pcie-root-port, id "rp1"\r
        addr = 03.0\r
        rombar = -1 (0xffffffffffffffff)\r
        busnr = 2 (0x2)\r
        class PCI bridge, addr 00:03.0, pci id 1b36:000c (sub 0000:0000)\r
        bus: rp1\r
          type PCIE\r
          dev: virtio-net-pci, id "net0"\r
            ioeventfd = true\r
            addr = 00.0\r
            bar 0: mem at 0xffffffffffffffff [0xffe]\r
            bus: virtio-bus\r
              type virtio-pci-bus\r
              dev: virtio-net-device, id ""\r
                mac = "52:54:00:00:00:01"\r
                netdev = "#net058"\r
                ioeventfd = false\r
      dev: virtio-rng-pci, id ""\r
        addr = 0a.0\r
        max-bytes = 5 (0x5)\r
      dev: virtio-rng-pci, id ""\r
        addr = 09.0\r
        max-bytes = 7 (0x7)\r
      dev: qemu-xhci, id "usb"\r
        addr = 05.0\r
        bus: usb.0\r
          type usb-bus\r
          dev: usb-tablet, id "tab"\r
            port = ""\r
            serial = "a = b"\r
            logical = 512 (512 B)\r
            addr 0.0, port 1.2, speed 480, name QEMU USB Tablet, attached\r
"""


def test_the_device_tree() -> None:
    found = device_settings(TREE, {"rp1", "net0", "usb", "tab", "dimm0"}, {"virtio-rng-pci"})
    assert found == {
        "rp1": {"bus": "pcie.0", "addr": "03.0", "rombar": "1"},
        "net0": {
            "bus": "rp1",
            "ioeventfd": "true",
            "addr": "00.0",
            "mac": '"52:54:00:00:00:01"',
            "netdev": "(automatic)",
            "ioeventfd 2": "false",
        },
        "usb": {"bus": "pcie.0", "addr": "05.0"},
        "tab": {"bus": "usb.0", "port": '""', "serial": '"a = b"', "logical": "512", "at port": "1.2"},
        "virtio-rng-pci 1": {"bus": "pcie.0", "addr": "09.0", "max-bytes": "7"},
        "virtio-rng-pci 2": {"bus": "pcie.0", "addr": "0a.0", "max-bytes": "5"},
    }, "the board's own devices are its machine type's, and the firmware's numbers are nobody's"


def test_devices_without_an_id_are_numbered_by_their_places() -> None:
    """QEMU prints the newest first: one that was plugged in again in its old place keeps its number."""
    lines = TREE.splitlines()
    first = next(number for number, line in enumerate(lines) if "virtio-rng-pci" in line)
    swapped = [*lines[:first], *lines[first + 3 : first + 6], *lines[first : first + 3], *lines[first + 6 :]]
    assert swapped != lines
    unnamed = {"virtio-rng-pci"}
    assert device_settings("\n".join(swapped), (), unnamed) == device_settings(TREE, (), unnamed)


SAID = """\
hub 0\r
 \\ hub0port1: #net277: index=0,type=user,net=10.9.0.0,restrict=off\r
 \\ hub0port0: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57\r
rtl8139.0: index=0,type=nic,model=rtl8139,macaddr=52:54:00:12:34:56\r
 \\ #net058: index=0,type=user,net=10.0.2.0,restrict=on\r
net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:01\r
 \\ n0: index=0,type=user,net=10.0.2.0,restrict=off\r
net1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:02\r
 \\ n1: index=0,type=tap,ifname=tap0,script=/etc/my,ifup,downscript=no\r
net1: index=1,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:02\r
 \\ n1: index=1,type=tap,ifname=tap0,script=/etc/my,ifup,downscript=no\r
b: index=0,type=tap,helper=/usr/lib/qemu/qemu-bridge-helper,br=br1\r
"""
USERS = """\
Hub -1 (n0):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[ESTABLISHED]   18       10.0.2.15 50000        10.0.2.2  1883     0     0
  UDP[HOST_FORWARD]  17               * 42039       10.0.2.15    81     0     0
  TCP[HOST_FORWARD]  16       127.0.0.1 42115       10.0.2.15    80     0     0
Hub 0 (#net277):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
"""
USER = (("net", "10.0.2.0"), ("restrict", "off"))


def test_networks() -> None:
    found = read_networks(SAID, USERS)
    assert {name: network.text for name, network in found.items()} == {
        "user 1": "user net=10.9.0.0,restrict=off",
        "user 2": "user net=10.0.2.0,restrict=on",
        "n0": "user net=10.0.2.0,restrict=off,hostfwd=tcp:127.0.0.1:42115-10.0.2.15:80,hostfwd=udp::42039-10.0.2.15:81",
        "n1": "tap ifname=tap0,script=/etc/my,ifup,downscript=no",
        "b": "tap helper=/usr/lib/qemu/qemu-bridge-helper,br=br1",
    }
    assert network_names(SAID) == ("#net277", "#net058", "n0", "n1", "b")


def test_a_network_that_was_removed_under_its_card() -> None:
    assert read_networks(SAID, USERS, ["n0"])["n0"].removed
    again = SAID + "n1: index=0,type=user,net=10.0.2.0,restrict=off\n"
    assert read_networks(again, USERS)["n1"].text == "user removed with netdev_del"
    assert not any(network.removed for network in read_networks(SAID, USERS).values()), "several queues"


def words(text: str) -> tuple[str, ...]:
    """A command line as typed."""
    return ("/usr/bin/qemu", *shlex.split(text))


@pytest.mark.parametrize(
    ("option", "running", "stated"),
    [
        ("hostfwd=tcp::22-:22", (), "tcp::22-10.0.2.15:22"),
        ("hostfwd=:127.0.0.1:22-:22", (), "tcp:127.0.0.1:22-10.0.2.15:22"),
        ("hostfwd=udp:0.0.0.0:22-10.0.2.7:22", (), "udp::22-10.0.2.7:22"),
        ("dhcpstart=10.0.2.50,hostfwd=tcp::22-:22", (), "tcp::22-10.0.2.50:22"),
        ("hostfwd=tcp::0-:22", ("tcp::4711-10.0.2.15:22",), "tcp::4711-10.0.2.15:22"),
        ("hostfwd=tcp::0-:22", ("tcp::4711-10.0.2.15:23",), "tcp::0-10.0.2.15:22"),
        ("hostfwd=tcp::0-:22", ("udp::4711-10.0.2.15:22",), "tcp::0-10.0.2.15:22"),
        ("hostfwd=tcp::22-:22", ("tcp::322-10.0.2.15:22",), "tcp::22-10.0.2.15:22"),
        ("hostfwd=unix:/s-:22", (), "unix:/s-:22"),
    ],
)
def test_forwarded_ports_as_a_command_line_writes_them(
    option: str, running: tuple[str, ...], stated: str
) -> None:
    argv = words(f"-netdev user,id=n,{option}")
    found = stated_networks({"n": Network("user", USER, running)}, {"n": Network("user", USER)}, argv)
    assert found == {"n": Network("user", USER, (stated,))}


def test_one_chosen_port_is_not_counted_twice() -> None:
    argv = words("-netdev user,id=n,hostfwd=tcp::0-:22,hostfwd=tcp::0-:22,hostfwd=tcp::5-:22")
    running = Network("user", USER, ("tcp::4711-10.0.2.15:22", "tcp::5-10.0.2.15:22"))
    found = stated_networks({"n": running}, {"n": Network("user", USER)}, argv)["n"].forwards
    assert found == ("tcp::0-10.0.2.15:22", "tcp::4711-10.0.2.15:22", "tcp::5-10.0.2.15:22")


@pytest.mark.parametrize(
    ("option", "running", "same"),
    [
        ("tap,id=n,ifname=t0,script=no", (("ifname", "t0"), ("script", "no")), True),
        ("tap,id=n,ifname=t1,script=no", (("ifname", "t0"), ("script", "no")), False),
        ("tap,id=n,script=no", (("ifname", "tap7"), ("script", "no")), True),
        ("tap,id=n", (("ifname", "tap7"), ("script", "/etc/qemu-ifup")), True),
        ("tap,id=n", (("ifname", "tap7"), ("script", "no")), False),
        ("tap,id=n,script=/my", (("ifname", "tap7"), ("script", "/etc/qemu-ifup")), False),
        ("bridge,id=n", (("helper", "/usr/lib/qemu/qemu-bridge-helper"), ("br", "br0")), True),
        ("bridge,id=n,br=br1", (("helper", "/usr/lib/qemu/qemu-bridge-helper"), ("br", "br0")), False),
        ("bridge,id=n", (("helper", "/usr/lib/qemu/qemu-bridge-helper"), ("br", "br1")), False),
        ("tap,id=n,ifname=t0", (("fd", "5"),), False),
        ("user,id=n", (("ifname", "t0"),), False),
    ],
)
def test_taps_as_a_command_line_writes_them(
    option: str, running: tuple[tuple[str, str], ...], same: bool
) -> None:
    before = {"n": Network("tap", running)}
    assert (stated_networks(before, {}, words(f"-netdev {option}")) == before) is same


def test_networks_without_an_id() -> None:
    argv = words(
        "-nic tap -nic user,id=x -net nic -net user -nic user,hostfwd=tcp::1-:1 -nic none -netdev hubport,id=h"
    )
    new = {name: Network("user", USER) for name in ("user 1", "user 2", "x")}
    found = stated_networks({}, new, argv)
    assert {name: network.text for name, network in found.items()} == {
        "user 1": "user net=10.0.2.0,restrict=off",
        "tap 1": "tap",
        "x": "user net=10.0.2.0,restrict=off",
        "user 2": "user net=10.0.2.0,restrict=off,hostfwd=tcp::1-10.0.2.15:1",
    }


def test_settings_that_may_be_repeated() -> None:
    assert repeated("user,id=n,hostfwd=a,,b,hostfwd=c", "hostfwd") == ["a,b", "c"]
    assert repeated('{"type":"user","hostfwd":[{"str":"a"},{"str":"b"}]}', "hostfwd") == ["a", "b"]
    assert repeated('{"type":"user","hostfwd":"a"}', "hostfwd") == ["a"]
    assert repeated('{"type":"user"}', "hostfwd") == repeated(None, "hostfwd") == []


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("disconnected:unix:/s/next/a,server=on", "unix /s/a"),
        ("unix:/s/a,b,server=on", "unix /s/a,b"),
        ("disconnected:telnet:127.0.0.1:38455,server=on", "telnet port 38455"),
        ("tcp:127.0.0.1:5,server=on <-> 127.0.0.1:6", "tcp port 5"),
        ("pty:/dev/pts/0", "pty"),
        ("null", "null"),
    ],
)
def test_what_is_behind_a_character_device(said: str, text: str) -> None:
    assert line_texts([{"label": "c", "filename": said}]) == {"c": text}


def test_a_line_that_is_shared_is_the_one_below() -> None:
    shared = [{"label": "c-base", "filename": "null"}, {"label": "c", "filename": "mux"}]
    assert line_texts(shared) == line_texts(shared[::-1]) == {"c": "null"}


@pytest.mark.parametrize(
    ("text", "running", "stated"),
    [
        ("-chardev socket,id=c,path=/s/next/a,server=on", "", "unix /s/a"),
        ("-chardev socket,id=c,host=h,port=5,server=on", "", "tcp port 5"),
        ("-chardev socket,id=c,host=h,port=5,server=on,telnet=on", "", "telnet port 5"),
        ("-chardev socket,id=c,host=h,port=0,server=on", "tcp port 7", "tcp port 7"),
        ("-chardev socket,id=c,host=h,port=0,server=on", "unix /a", "tcp port "),
        ("-chardev pty,id=c", "", "pty"),
        ("-chardev braille,id=c", "", None),
        ("-chardev socket,id=c,path=a,abstract=on,server=on", "", None),
    ],
)
def test_character_devices_as_a_command_line_writes_them(text: str, running: str, stated: str | None) -> None:
    assert stated_lines({"c": running}, words(text)) == ({} if stated is None else {"c": stated})


def test_serial_lines_as_a_command_line_writes_them() -> None:
    text = "-serial null -serial unix:/s/next/a,server=on -serial telnet::5,server=on -serial chardev:x -serial stdio"
    assert stated_lines({}, words(f"{text} -serial pty -parallel none -debugcon file:/l")) == {
        "serial0": "null",
        "serial1": "unix /s/a",
        "serial2": "telnet port 5",
        "serial5": "pty",
        "debugcon": "file",
    }
