"""QEMU command lines. Pure: the one that starts a VM, and where a guest's RAM is.

What a command line says of the guest's RAM decides whether another process can take it over. Sources: qemu(1), and
QEMU's ``ramblock_is_ignored``: with ``x-ignore-shared`` only RAM that is
``share=on`` in a named file stays where it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from caesura_host_updater.drivers.qemu.arguments import escaped, is_on, options, settings
from caesura_host_updater.drivers.qemu.definition import Definition
from caesura_vmcontrol.qemu_plans import SPARE

_HUGE = re.compile(r"^(/dev/hugepages|/hugepages|/mnt/huge|/run/hugepages|/var/lib/hugetlbfs)")


@dataclass(frozen=True)
class Paths:
    """Where a VM's things are. All absolute."""

    ram: str
    qmp: str
    guard: str
    agent: str
    serial: str
    serial_log: str
    scripts: Mapping[str, str]
    """The script that puts a tap on a bridge, by bridge."""


def first_command(vm: str, definition: Definition, binary: str, accel: str, at: Paths) -> tuple[str, ...]:
    """The command line that starts a VM. ``accel``: such as ``tcg,thread=multi``."""
    memory = f"{definition.memory_mib}M"
    words = [binary, "-name", escaped(vm), "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-machine", f"{definition.machine},memory-backend=ram", "-accel", accel, "-cpu", definition.cpu]
    words += ["-m", memory, "-smp", str(definition.vcpus)]
    words += [
        "-object",
        f"memory-backend-file,id=ram,mem-path={escaped(at.ram)},size={memory},share=on",
    ]
    words += ["-rtc", "base=utc,clock=host"]  # the RTC continues during a pause
    for option, value in (
        ("-kernel", definition.kernel),
        ("-initrd", definition.initrd),
        ("-append", definition.append),
    ):
        words += [option, value] if value else []
    # The spare one: an updater that was stopped in the middle of a way out holds the guard's.
    for name, path in (("qmp", at.qmp), ("guard", at.guard), ("guard2", f"{at.guard}{SPARE}")):
        words += ["-chardev", f"socket,id={name},path={escaped(path)},server=on,wait=off"]
        words += ["-mon", f"chardev={name},mode=control"]
    words += [
        "-chardev",
        f"socket,id=serial,path={escaped(at.serial)},server=on,wait=off,logfile={escaped(at.serial_log)},logappend=on",
        "-serial",
        "chardev:serial",
        "-device",
        "virtio-serial-pci,id=channels",
        "-chardev",
        f"socket,id=agent,path={escaped(at.agent)},server=on,wait=off",
        "-device",
        "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
        "-device",
        "virtio-rng-pci",
    ]
    for number, disk in enumerate(definition.disk):
        words += ["-drive", f"file={escaped(disk.file)},format={disk.format},if=none,id=disk{number}"]
        words += ["-device", f"virtio-blk-pci,drive=disk{number}"]
    for number, nic in enumerate(definition.nic):
        backend = "user" if nic.bridge is None else "tap"
        # A tap of each process's own: a second process on the same one would deafen the first.
        script = f",vhost=off,script={escaped(at.scripts[nic.bridge])},downscript=no" if nic.bridge else ""
        words += ["-netdev", f"{backend},id=net{number}{script}"]
        # No boot ROM: it would be one more piece of memory that differs between versions.
        words += [
            "-device",
            f"virtio-net-pci,netdev=net{number},mac={nic.mac or mac_of(vm, number)},romfile=",
        ]
    return (*words, *definition.extra)


def mac_of(vm: str, number: int) -> str:
    """A locally administered address of QEMU's range, the same at every start of the VM."""
    digest = blake2b(f"{vm}/{number}".encode(), digest_size=3).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest)


def bridge_script(bridge: str) -> str:
    """What QEMU runs when it has made a tap, with the tap's name as its argument."""
    return f'#!/bin/sh\nexec ip link set dev "$1" master {bridge} up\n'


# -- reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GuestRam:
    """The guest's RAM. ``size`` in bytes, as the command line says; ``backend``: the id of its memory backend."""

    file: str
    size: int
    backend: str = "ram"


def machine_of(argv: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The machine type and its settings, all ``-machine`` and ``-M`` taken together."""
    kind, found = "", dict[str, str]()
    for option, value in options(argv):
        if option in ("-machine", "-M"):
            one, more = settings(option, value)
            more.pop("type", None)
            kind = one or kind
            found |= more
    return kind, found


def cpu_of(argv: Sequence[str]) -> str:
    """The CPU model that is asked for, without its flags; empty: QEMU's default."""
    asked = [value or "" for option, value in options(argv) if option == "-cpu"]
    return asked[-1].split(",")[0] if asked else ""


def memory_of(argv: Sequence[str]) -> GuestRam | str:
    """Where the guest's RAM is, or every reason why it cannot stay there when another process takes over."""
    backends, nodes, wrong = [], list[str](), list[str]()
    for option, value in options(argv):
        kind, found = settings(option, value)
        if option == "-object" and kind.startswith("memory-backend-"):
            backends.append((kind, found))
        if option == "-mem-path":
            wrong.append(
                f"its RAM (-mem-path {value}) is private to the process: use a memory-backend-file with share=on"
            )
        if option == "-numa" and "memdev" in found:
            nodes.append(found["memdev"])
    if not backends and not wrong:
        wrong.append(
            "its RAM is private memory of the process: start it with a memory-backend-file with share=on"
        )
    if len(backends) > 1:
        wrong.append("it has several memory backends: only one is supported")
    if len(backends) != 1:
        return "; ".join(wrong)
    kind, found = backends[0]
    used = nodes[:1] or [machine_of(argv)[1].get("memory-backend", "")]
    wrong += _memory_errors(kind, found, used[0])
    size = _bytes(found.get("size", ""))
    if not size:
        wrong.append(f"the size of its RAM ({found.get('size')}) is not understood")
    return "; ".join(wrong) if wrong else GuestRam(found.get("mem-path", ""), size, used[0])


def _memory_errors(kind: str, found: Mapping[str, str], used: str) -> Iterator[str]:
    file = found.get("mem-path", "")
    if kind == "memory-backend-memfd":
        yield "its RAM is a memfd, which no other process can open: use a memory-backend-file with share=on"
        return
    if kind != "memory-backend-file":
        yield f"its RAM is a {kind}: use a memory-backend-file with share=on"
        return
    if used != found.get("id"):
        yield "its memory backend is not the machine's RAM (-machine memory-backend=ID)"
    if not is_on(found, "share"):
        yield "its RAM file is mapped privately: memory-backend-file lacks share=on"
    if not file.startswith("/"):
        yield f"its RAM file {file!r} is relative to a folder that is not ours"
    if _HUGE.match(file):
        yield f"its RAM is on huge pages ({file}), which is not supported"
    if is_on(found, "discard-data"):
        yield "discard-data=on would erase its RAM file when the old process ends"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    # Without a suffix an -object counts bytes; only -m counts MiB.
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2].upper()] if match else 0
