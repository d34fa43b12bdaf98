"""QEMU command lines. Pure: from a definition to the first process, from one process to the next.

What a command line says of the guest's RAM decides whether another process can take it over. Sources: qemu(1), and
QEMU's ``ramblock_is_ignored``: with ``x-ignore-shared`` only RAM that is
``share=on`` in a named file stays where it is.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from caesura_host_updater.drivers.qemu.definition import Definition
from caesura_host_updater.guard.qemuplans import SPARE

NEXT = "next"
"""The folder, beside a process's sockets, where those of the process that shall follow it are."""

_FLAGS = frozenset(
    [
        "-S",
        "-daemonize",
        "-nodefaults",
        "-no-user-config",
        "-nographic",
        "-snapshot",
        "-no-reboot",
        "-no-shutdown",
        "-enable-kvm",
        "-no-acpi",
        "-no-hpet",
        "-usb",
        "-mem-prealloc",
        "-s",
        "-singlestep",
        "-full-screen",
        "-win2k-hack",
        "-no-fd-bootchk",
        "-show-cursor",
        "-no-quit",
        "-preconfig",
        "-only-migratable",
        "-xen-attach",
        "-semihosting",
        "-old-param",
        "-enable-fips",
        "-nouserconfig",
        "-curses",
    ]
)
_DROPPED = frozenset(("-S", "-daemonize", "-pidfile", "-incoming", "-loadvm"))
SERVERS = frozenset(("-qmp", "-qmp-pretty", "-monitor", "-serial", "-parallel", "-debugcon", "-gdb", "-vnc"))
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
    words += ["-rtc", "base=utc,clock=host"]  # the RTC goes on during a pause
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


def escaped(value: str) -> str:
    """A value as it stands between QEMU's commas."""
    return value.replace(",", ",,")


# -- reading --------------------------------------------------------------------------------------------------


def options(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The options of a command line with their values; a word that is no option is ``("", word)``."""
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            yield "", word
            continue
        option = word[1:] if word.startswith("--") else word
        yield option, None if option in _FLAGS else next(words, None)


def _words(option: str, value: str | None) -> list[str]:
    return ([option] if option else []) + ([value] if value is not None else [])


def settings(value: str | None) -> tuple[str, dict[str, str]]:
    """``kind,key=value,...`` as the kind and its keys; a lone key is ``on``."""
    parts = (value or "").replace(",,", "\0").split(",")
    found: dict[str, str] = {}
    kind = ""
    for index, part in enumerate(each.replace("\0", ",") for each in parts):
        key, equals, text = part.partition("=")
        if not equals and index == 0:
            kind = part
        elif part:
            found[key] = text if equals else "on"
    return kind, found


def is_on(found: Mapping[str, str], key: str, *, default: bool = False) -> bool:
    return found[key] in ("on", "yes", "true", "y") if key in found else default


@dataclass(frozen=True)
class Memory:
    """The guest's RAM. ``size`` in bytes, as the command line says."""

    file: str
    size: int


def machine_of(argv: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The machine type and its settings, all ``-machine`` and ``-M`` taken together."""
    kind, found = "", dict[str, str]()
    for option, value in options(argv):
        if option in ("-machine", "-M"):
            one, more = settings(value)
            kind = one or more.pop("type", "") or kind
            found |= more
    return kind, found


def memory_of(argv: Sequence[str]) -> Memory | str:
    """Where the guest's RAM is, or why it cannot stay there when another process takes over."""
    backends = []
    for option, value in options(argv):
        kind, found = settings(value)
        if option == "-object" and value is not None and value.startswith("{"):
            return "an -object in JSON is not understood here"
        if option == "-object" and kind.startswith("memory-backend-"):
            backends.append((kind, found))
        if option == "-mem-path":
            return f"its RAM (-mem-path {value}) is private to the process: use a memory-backend-file with share=on"
        if option == "-numa" and "memdev" in found:
            return "its RAM is in several pieces (-numa): only one memory backend is supported"
    if not backends:
        return "its RAM is private memory of the process: start it with a memory-backend-file with share=on"
    if len(backends) > 1:
        return "it has several memory backends: only one is supported"
    return _memory(*backends[0], machine_of(argv)[1].get("memory-backend"))


def _memory(kind: str, found: Mapping[str, str], used: str | None) -> Memory | str:
    file = found.get("mem-path", "")
    if kind == "memory-backend-memfd":
        return "its RAM is a memfd, which no other process can open: use a memory-backend-file with share=on"
    if kind != "memory-backend-file":
        return f"its RAM is a {kind}: use a memory-backend-file with share=on"
    if used != found.get("id"):
        return "its memory backend is not the machine's RAM (-machine memory-backend=ID)"
    if not is_on(found, "share"):
        return "its RAM file is mapped privately: memory-backend-file lacks share=on"
    if _HUGE.match(file):
        return f"its RAM is on huge pages ({file}), which is not supported"
    if is_on(found, "discard-data"):
        return "discard-data=on would erase its RAM file when the old process ends"
    size = _bytes(found.get("size", ""))
    return Memory(file, size) if size else f"the size of its RAM ({found.get('size')}) is not understood"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    # Without a suffix an -object counts bytes; only -m counts MiB.
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2].upper()] if match else 0


# -- from one process to the next ---------------------------------------------------------------------------


def next_path(path: str) -> str:
    """Where the next process listens for what the present one has at ``path``."""
    folder, name = os.path.split(path)
    return os.path.join(folder, NEXT, name)  # noqa: PTH118 - no file is touched here


def settled_path(path: str) -> str:
    """The inverse of ``next_path``; any other path is left alone."""
    folder, name = os.path.split(path)
    parent, last = os.path.split(folder)
    return os.path.join(parent, name) if last == NEXT else path  # noqa: PTH118


def _with_sockets(argv: Sequence[str], move: Callable[[str], str]) -> tuple[list[str], dict[str, str]]:
    """The command line with every unix socket that it listens on moved, and from where to where."""
    words, moved = [argv[0]], dict[str, str]()

    def target(path: str) -> str:
        moved[path] = move(path)
        return moved[path]

    for option, value in options(argv):
        changed = value
        kind, found = settings(value)
        if option == "-chardev" and kind == "socket" and "path" in found and is_on(found, "server"):
            changed = _replaced(value or "", "path", target(found["path"]))
        elif option in SERVERS and value is not None and value.startswith("unix:"):
            path, comma, rest = value.removeprefix("unix:").partition(",")
            changed = f"unix:{target(path)}{comma}{rest}"
        words += _words(option, changed)
    return words, moved


def _replaced(value: str, key: str, new: str) -> str:
    parts = value.replace(",,", "\0").split(",")
    parts = [f"{key}={escaped(new)}" if part.startswith(f"{key}=") else part for part in parts]
    return ",".join(parts).replace("\0", ",,")


def sockets_of(argv: Sequence[str]) -> tuple[str, ...]:
    """Every unix socket that the process listens on."""
    return tuple(_with_sockets(argv, lambda path: path)[1])


def settled(argv: Sequence[str]) -> tuple[str, ...]:
    """A process's own command line as if it had been the first: to derive the next one's from."""
    words, _ = _with_sockets(argv, settled_path)
    kept = [words[0]]
    for option, value in options(words):
        if option not in _DROPPED:
            kept += _words(option, value)
    return tuple(kept)


def next_command(argv: Sequence[str], binary: str, machine: str) -> tuple[str, ...]:
    """The command line of the process that follows: waits for the state, then stands still.

    ``argv``: the present one's, settled. ``machine``: its type as QEMU resolved it.
    """
    words, _ = _with_sockets(argv, next_path)
    kept = [binary]
    for option, value in options(words):
        kind, found = settings(value)
        changed = value
        if option in _DROPPED:
            continue
        if option in ("-machine", "-M") and (kind or "type" in found):
            alias = kind or found["type"]
            changed = (value or "").replace(alias, machine, 1)
        elif option == "-chardev" and kind == "file" and "append" not in found:
            changed = f"{value},append=on"  # else its start would empty the file
        if option == "-chardev" and "logfile" in found and "logappend" not in found:
            changed = f"{changed},logappend=on"
        kept += _words(option, changed)
    if not machine_of(kept)[0]:
        kept += ["-machine", machine]
    return (*kept, "-incoming", "defer", "-S")
