"""QEMU command lines: made, read, handed on, and what in them forbids it."""

from __future__ import annotations

import shlex

import pytest

from caesura_host_updater.drivers.qemu.arguments import options, settings, with_setting
from caesura_host_updater.drivers.qemu.commandline import (
    GuestRam,
    Paths,
    bridge_script,
    first_command,
    mac_of,
    machine_of,
    memory_of,
)
from caesura_host_updater.drivers.qemu.definition import Definition, Disk, Nic
from caesura_host_updater.drivers.qemu.obstacles import obstacles, paths_of
from caesura_host_updater.drivers.qemu.successor import (
    next_command,
    next_path,
    settled,
    settled_path,
    sockets_of,
    trial_command,
)

AT = Paths(
    ram="/ram/c/a.ram",
    qmp="/run/c/a/qmp",
    guard="/run/c/a/guard",
    agent="/run/c/a/ga",
    serial="/run/c/a/serial",
    serial_log="/var/lib/c/a,b.serial.log",
    scripts={"br0": "/run/c/bridge-br0.sh"},
)
WHOLE = Definition(
    memory_mib=256,
    machine="pc-q35-7.2",
    vcpus=2,
    kernel="/k",
    initrd="/i",
    append="",
    disk=(Disk(file="/d,1.qcow2"),),
    nic=(Nic(), Nic(bridge="br0", mac="52:54:00:00:00:01")),
    extra=("-device", "virtio-balloon-pci"),
)
RAM = "-machine pc-q35-7.2,memory-backend=ram -object memory-backend-file,id=ram,mem-path=/r,size=1G,share=on"


def words(text: str) -> tuple[str, ...]:
    """A command line as typed."""
    return ("/usr/bin/qemu", *shlex.split(text))


def test_first_command_can_be_handed_over() -> None:
    argv = first_command("a", WHOLE, "/usr/bin/qemu-system-x86_64", "tcg", AT)
    assert memory_of(argv) == GuestRam("/ram/c/a.ram", 256 << 20)
    assert machine_of(argv) == ("pc-q35-7.2", {"memory-backend": "ram"})
    found = obstacles(argv, "pc-q35-7.2")
    assert found.both == found.beside == ()
    assert sockets_of(argv) == (AT.qmp, AT.guard, f"{AT.guard}.2", AT.serial, AT.agent)
    assert "file=/d,,1.qcow2,format=qcow2,if=none,id=disk0" in argv
    assert "tap,id=net1,vhost=off,script=/run/c/bridge-br0.sh,downscript=no" in argv
    assert argv[-2:] == ("-device", "virtio-balloon-pci")
    assert f"virtio-net-pci,netdev=net0,mac={mac_of('a', 0)},romfile=" in argv
    assert bridge_script("br0").startswith("#!/bin/sh\n")


def test_next_command_is_the_same_but_for_where_it_listens() -> None:
    argv = first_command("a", WHOLE, "/old/qemu", "tcg", AT)
    following = next_command(argv, "/new/qemu", "pc-q35-7.2")
    assert following[0] == "/new/qemu"
    assert following[-3:] == ("-incoming", "defer", "-S")
    assert set(sockets_of(following)) == {next_path(path) for path in sockets_of(argv)}
    assert settled(following) == ("/new/qemu", *argv[1:])
    assert settled(settled(following)) == settled(following)
    assert next_command(settled(following), "/new/qemu", "pc-q35-7.2") == following
    assert settled_path(next_path("/a/b")) == "/a/b"
    assert settled_path("/a/b") == "/a/b"


def test_a_spice_socket_is_moved_as_others_are() -> None:
    argv = words("-spice unix=on,addr=/s/a,,b,disable-ticketing=on -spice port=1,addr=127.0.0.1")
    assert sockets_of(argv) == ("/s/a,b",)
    following = next_command(argv, "/q", "pc-q35-7.2")
    assert following[1:5] == (
        *("-spice", "unix=on,addr=/s/next/a,,b,disable-ticketing=on"),
        *("-spice", "port=1,addr=127.0.0.1"),
    )
    assert settled(following)[1:5] == argv[1:]


def test_macs_differ_and_stay() -> None:
    assert mac_of("a", 0) == mac_of("a", 0)
    assert len({mac_of("a", 0), mac_of("a", 1), mac_of("b", 0)}) == 3


def test_other_peoples_command_lines() -> None:
    """Aliases are resolved, logs are not emptied, and what belongs to the start of the first one is left out."""
    argv = words(
        "-machine q35,accel=tcg,memory-backend=ram -daemonize -pidfile /p -S --nographic -append '' -loadvm x"
        " -chardev file,id=log,path=/l -chardev socket,id=q,path=/s/q,,1,server=on,wait=off,logfile=/m"
        " -chardev socket,id=client,path=/s/client -qmp unix:/s/qmp,server=on,wait=off -incoming tcp:0:1"
    )
    following = next_command(argv, "/new", "pc-q35-7.2")
    assert following == (
        *("/new", "-machine", "pc-q35-7.2,accel=tcg,memory-backend=ram", "-nographic", "-append", ""),
        *("-chardev", "file,id=log,path=/l,append=on"),
        *("-chardev", "socket,id=q,path=/s/next/q,,1,server=on,wait=off,logfile=/m,logappend=on"),
        *("-chardev", "socket,id=client,path=/s/client", "-qmp", "unix:/s/next/qmp,server=on,wait=off"),
        *("-incoming", "defer", "-S"),
    )
    assert next_command(words("-m 1"), "/n", "pc-i440fx-7.2")[1:5] == ("-m", "1", "-machine", "pc-i440fx-7.2")
    assert machine_of(words("-M type=q35,a=b")) == ("q35", {"a": "b"})


def test_options_and_settings() -> None:
    assert list(options(words("-S -m 1 disk.img --smp 2 -append"))) == [
        ("-S", None),
        ("-m", "1"),
        ("", "disk.img"),
        ("-smp", "2"),
        ("-append", None),
    ]
    assert settings("-chardev", "socket,path=/a,,b,server=on,wait") == (
        "socket",
        {"path": "/a,b", "server": "on", "wait": "on"},
    )
    assert settings("-m", None) == ("", {})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("-m 1G", "private memory of the process"),
        ("-m 1G -mem-path /dev/shm", "-mem-path /dev/shm"),
        (RAM.replace("share=on", "share=off"), "lacks share=on"),
        (RAM.replace(",share=on", ""), "lacks share=on"),
        (RAM.replace("memory-backend=ram", "memory-backend=other"), "is not the machine's RAM"),
        (RAM.replace("memory-backend-file", "memory-backend-memfd"), "memfd"),
        (RAM.replace("memory-backend-file", "memory-backend-ram"), "is a memory-backend-ram"),
        (RAM.replace("/r", "/dev/hugepages/r"), "huge pages"),
        (RAM.replace("size=1G", "size=1Q"), "(1Q) is not understood"),
        (RAM + ",discard-data=on", "discard-data"),
        (RAM + " -object memory-backend-ram,id=more,size=1G", "several memory backends"),
        (RAM + " -numa node,memdev=other", "is not the machine's RAM"),
        (RAM + " -object {broken", "is not a JSON object"),
        (RAM + """ -device '{"driver":"vfio-pci","host":"1"}'""", "vfio-pci"),
        (RAM + """ -netdev '{"type":"tap","id":"n","vhost":true}'""", "vhost"),
        (RAM + """ -netdev '{"type":"tap","id":"n","fd":"3"}'""", "open file of its starter"),
        (RAM + """ -blockdev '{"driver":"qcow2","file":{"driver":"file","filename":"d.img"}}'""", "'d.img'"),
        (RAM + """ -drive 'file=json:{"file":{"driver":"file","filename":"d.img"}}'""", "is relative"),
        (
            RAM + """ -object '{"qom-type":"memory-backend-ram","id":"more","size":1}'""",
            "several memory backends",
        ),
        (RAM + " -drive file=/d,id=v,snapshot=on", "-drive v with snapshot=on"),
        (RAM + " -drive file=fat:rw:/tmp", "vvfat"),
        (RAM + " -qmp unix:s/qmp,server=on", "'s/qmp' in its command line is relative"),
        (RAM + " -spice unix=on,addr=spice", "'spice' in its command line is relative"),
        (RAM + " -drive file=file:d.img", "'file:d.img' in its command line is relative"),
        (
            RAM + " -chardev socket,id=tpm,path=/run/swtpm -tpmdev emulator,id=t,chardev=tpm",
            "client of /run/swtpm",
        ),
        (RAM + " -chardev socket,id=c,host=h,port=1", "client of h"),
        (RAM + " -netdev stream,id=n,addr.type=unix,addr.path=/run/passt,server=off", "client of /run/passt"),
        (RAM + " -netdev socket,id=n,connect=h:1", "client of h:1"),
        (RAM + " -netdev socket,id=n,listen=:1", "network back end 'socket'"),
        (RAM + " -netdev l2tpv3,id=n,src=a", "network back end 'l2tpv3'"),
        (RAM + " -tpmdev passthrough,id=t", "the host's own"),
        (RAM + " -object filter-dump,id=f,netdev=n,file=/d.pcap", "filter-dump f empties /d.pcap"),
        (RAM + " -serial mon:unix:/s/serial,server=on", "shares a line with a monitor"),
        (RAM + " -device usb-host,vendorid=1", "usb-host"),
        (RAM + " -device loader,addr=0,data=1", "writes to the guest's RAM"),
        (RAM + " -chardev serial,id=s,path=/dev/ttyS0", "character device 'serial' (s)"),
        (RAM + " -snapshot", "-snapshot"),
        (RAM + " -device vfio-pci,host=1", "vfio-pci"),
        (RAM + " -netdev tap,id=n,vhost=on", "vhost"),
        (RAM + " -netdev vhost-user,id=n", "vhost"),
        (RAM + " -netdev tap,id=n,fd=3", "open file of its starter"),
        (RAM + " -add-fd fd=3,set=1", "open file of its starter"),
        (RAM + " -kernel vmlinuz", "'vmlinuz' in its command line is relative"),
        (RAM + " -drive file=disk.img", "'disk.img' in its command line is relative"),
        (RAM + " -runas nobody", "-runas"),
        (RAM + " disk.img", "'disk.img' of its command line"),
    ],
)
def test_what_forbids_any_other_process(text: str, why: str) -> None:
    found = obstacles(words(text), "pc-q35-7.2")
    assert why in "; ".join(found.both)
    assert found.beside == ()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("-netdev tap,id=n,ifname=tap0", "the tap tap0"),
        ("-netdev user,id=n,hostfwd=tcp::22-:22", "hostfwd tcp::22-:22"),
        ("-s", "gdb"),
        ("-gdb tcp::1", "gdb"),
        ("-vnc :1", "-vnc"),
        ("-display vnc=:1", "write it as -vnc :1"),
        ("-display vnc=unix:/v", "write it as -vnc unix:/v"),
        ("-spice port=1", "-spice holds a port"),
        ("-spice unix=on,addr=/s/spice,tls-port=1", "-spice holds a port"),
        ("-monitor tcp:127.0.0.1:1,server=on", "-monitor tcp:"),
        ("-chardev socket,id=c,port=1,host=::1,server=on", "chardev c"),
    ],
)
def test_what_forbids_a_process_beside(text: str, why: str) -> None:
    found = obstacles(words(f"{RAM} {text}"), "pc-q35-7.2")
    assert found.both == ()
    assert why in "; ".join(found.beside)


def test_what_forbids_nothing() -> None:
    text = "-netdev bridge,id=n,br=br0 -vnc unix:/v -drive file=nbd:h:1 -vnc none -display vnc=none -spice unix=on,addr=/s/spice"
    found = obstacles(words(f"{RAM} {text}"), "pc-q35-7.2")
    assert found.both == found.beside == ()


def test_every_reason_at_once() -> None:
    text = "-m 1G -mem-path /dev/shm -snapshot -device vfio-pci,host=1 -s"
    found = obstacles(words(text), "q35")
    for word in ("-mem-path", "-snapshot", "vfio-pci", "no version"):
        assert word in "; ".join(found.both)
    two = RAM.replace(",share=on", "").replace("memory-backend=ram", "memory-backend=x").replace("/r", "r")
    for word in ("lacks share=on", "is not the machine's RAM", "relative to a folder"):
        assert word in "; ".join(obstacles(words(two), "pc-q35-7.2").both)


def test_what_other_peoples_command_lines_have_and_may_have() -> None:
    """JSON, one NUMA node on one backend, distributions' machine types: nothing that forbids another process."""
    text = (
        """-machine pc-q35-jammy -object '{"qom-type":"memory-backend-file","id":"m0","mem-path":"/r","size":1073741824,"""
        """"share":true}' -numa node,memdev=m0 -device '{"driver":"virtio-blk-pci","drive":"d"}' """
        """-blockdev '{"driver":"file","node-name":"d","filename":"/d.img"}' -netdev '{"type":"user","id":"n"}'"""
    )
    assert memory_of(words(text)) == GuestRam("/r", 1 << 30, "m0")
    found = obstacles(words(text), "pc-q35-jammy")
    assert found.both == found.beside == ()
    forwarded = """-netdev '{"type":"user","id":"n","hostfwd":[{"str":"tcp::22-:22"}]}'"""
    assert "tcp::22-:22" in "; ".join(obstacles(words(f"{RAM} {forwarded}"), "pc-q35-7.2").beside)


def test_what_must_not_happen_twice() -> None:
    argv = words(
        "-device vmgenid,guid=auto,id=g -serial file:/log/a,b -serial null -serial file:/log/c -parallel file:/p"
        " -mem-prealloc -object memory-backend-file,id=ram,mem-path=/r,size=1G,share=on,prealloc=on"
        """ -object '{"qom-type":"memory-backend-file","id":"x","prealloc":true}'"""
        """ -device '{"driver":"vmgenid","guid":"auto"}'"""
    )
    following = next_command(argv, "/new", "pc-q35-7.2", "3cb7e8cc")
    assert following[1:] == (
        *("-device", "vmgenid,guid=3cb7e8cc,id=g"),
        *("-chardev", "file,id=serial0,path=/log/a,,b,append=on", "-serial", "chardev:serial0"),
        *("-serial", "null"),
        *("-chardev", "file,id=serial2,path=/log/c,append=on", "-serial", "chardev:serial2"),
        *("-chardev", "file,id=parallel0,path=/p,append=on", "-parallel", "chardev:parallel0"),
        *("-object", "memory-backend-file,id=ram,mem-path=/r,size=1G,share=on"),
        *("-object", '{"qom-type": "memory-backend-file", "id": "x"}'),
        *("-device", '{"driver": "vmgenid", "guid": "3cb7e8cc"}'),
        *("-machine", "pc-q35-7.2", "-incoming", "defer", "-S"),
    )
    assert next_command(settled(following), "/new", "pc-q35-7.2", "3cb7e8cc") == following


def test_a_trial_has_the_same_machine_and_nothing_that_others_could_notice() -> None:
    argv = words(
        "-machine pc-q35-7.2 -netdev user,id=n,hostfwd=tcp::22-:22 -device e1000,netdev=n -netdev tap,id=m,ifname=t0"
        " -chardev socket,id=c,path=/s/c,server=on,mux=on -mon chardev=c -qmp unix:/s/qmp,server=on -vnc :1 -s"
        " -spice port=5900 -serial file:/l -serial chardev:c -nic user,model=e1000,hostfwd=tcp::1-:1 -nic none"
        " -nic bridge,model=rtl8139 -net bridge"
        " -net nic -net user -audiodev pa,id=a -display gtk -drive file=/d -gdb tcp::1 -monitor stdio"
    )
    trial = trial_command(next_command(argv, "/q", "pc-q35-7.2"), "/run/v")
    assert trial == (
        *("/q", "-machine", "pc-q35-7.2", "-netdev", "user,id=n", "-device", "e1000,netdev=n"),
        *("-netdev", "hubport,id=m,hubid=2", "-chardev", "null,id=c,mux=on"),
        *("-spice", "unix=on,addr=/run/v/spice,disable-ticketing=on"),
        *("-chardev", "null,id=serial0", "-serial", "chardev:serial0", "-serial", "chardev:c"),
        *("-nic", "user,model=e1000", "-nic", "none", "-nic", "hubport,hubid=5,model=rtl8139"),
        *("-net", "nic", "-net", "user", "-audiodev", "none,id=a"),
        *("-display", "none", "-drive", "file=/d", "-incoming", "defer", "-S"),
        *("-display", "none", "-monitor", "none", "-qmp", "unix:/run/v/trial,server=on,wait=off"),
    )


def test_settings_that_are_changed() -> None:
    assert with_setting("a,b=1,c=2", "b", "x,y") == "a,b=x,,y,c=2"
    assert with_setting("a,b=1", "b", None) == "a"
    assert with_setting("a", "b", "1") == "a,b=1"
    assert settings("-netdev", "type=tap,id=n") == ("tap", {"type": "tap", "id": "n"})
    assert settings("-blockdev", '{"driver": "raw", "file": {"filename": "/x"}, "n": [1]}') == (
        "raw",
        {"driver": "raw", "file.filename": "/x", "n.0": "1"},
    )
    assert settings("-object", "{broken") == ("", {})


def test_paths_that_a_command_line_names() -> None:
    argv = words(
        "-kernel /k -drive file=/d,,1,id=x -qmp unix:/s/qmp,server=on -object secret,id=s,file=/f -append /a"
    )
    assert paths_of(argv) == ("/d,1", "/f", "/k", "/s", "/usr/bin/qemu")


def test_machines_without_a_version() -> None:
    for machine in ("microvm", "none", "isapc", "q35", "pc-q35", "virt"):
        assert f"machine type '{machine}' has no version" in "; ".join(obstacles(words(RAM), machine).both)
    for machine in (
        "pc-q35-7.2",
        "virt-10.0",
        "pc-q35-rhel9.2.0",
        "pc-q35-jammy",
        "pc-i440fx-focal",
        "pc-i440fx-jammy-hpb",
    ):
        assert obstacles(words(RAM), machine).both == ()
