"""What in a QEMU command line forbids another process to take the guest over, and why. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from caesura_host_updater.drivers.qemu.commandline import SERVERS, is_on, memory_of, options, settings
from caesura_host_updater.drivers.qemu.definition import is_versioned

_FILES = frozenset(
    ("-kernel", "-initrd", "-dtb", "-bios", "-pflash", "-hda", "-hdb", "-hdc", "-hdd", "-cdrom")
)
_FILE_KEYS = frozenset(("file", "path", "mem-path", "filename", "file.filename", "logfile", "script"))
_NETWORK = ("-netdev", "-nic", "-net")


@dataclass(frozen=True)
class Obstacles:
    """Why a VM cannot be handed to another process, empty where it can.

    ``both``: neither beside the old one nor after it; ``beside``: not while the old one still has it.
    """

    both: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def obstacles(argv: Sequence[str], machine: str) -> Obstacles:
    """What in a command line forbids it. ``machine``: the type as QEMU resolved it."""
    both: list[str] = []
    beside: list[str] = []
    memory = memory_of(argv)
    if isinstance(memory, str):
        both.append(memory)
    if not is_versioned(machine):
        both.append(f"machine type {machine!r} has no version, so no other QEMU promises to be the same")
    for option, value in options(argv):
        kind, found = settings(value)
        both += _forbidden(option, value, kind, found)
        both += [
            f"{name!r} in its command line is relative to a folder that is not ours"
            for name in _relative(option, value, found)
        ]
        beside += _held(option, value, kind, found)
    return Obstacles(tuple(dict.fromkeys(both)), tuple(dict.fromkeys(beside)))


def _forbidden(option: str, value: str | None, kind: str, found: Mapping[str, str]) -> Iterator[str]:
    if option == "":
        yield f"the word {value!r} of its command line is not understood"
    if option == "-snapshot":
        yield "-snapshot keeps its disk writes in a file that no other process can open"
    if option in ("-chroot", "-runas", "-readconfig", "-preconfig"):
        yield f"it was started with {option}"
    if option == "-device" and kind.startswith(("vfio-", "vhost-", "ivshmem")):
        yield f"device {kind} cannot be handed over"
    if option in _NETWORK and (is_on(found, "vhost") or kind.startswith("vhost")):
        yield "vhost keeps network state in the host's kernel"
    if option == "-add-fd" or any(key in found for key in ("fd", "fds", "vhostfd", "fdset")):
        yield f"{option} {value} is an open file of its starter that no other process has"


def _held(option: str, value: str | None, kind: str, found: Mapping[str, str]) -> Iterator[str]:
    """What only one process at a time can have."""
    text = value or ""
    if option in _NETWORK and kind == "tap" and "ifname" in found:
        yield f"two processes cannot use the tap {found['ifname']} at once: give it a bridge"
    if option in _NETWORK and "hostfwd" in found:
        yield f"hostfwd {found['hostfwd']} holds a port of the host"
    if option == "-s" or (option == "-gdb" and text.startswith("tcp")):
        yield "its gdb server holds a port of the host"
    elif option == "-spice" or (option == "-vnc" and not text.startswith(("unix:", "none"))):
        yield f"{option} holds a port of the host"
    elif option == "-chardev" and kind == "socket" and "port" in found and is_on(found, "server"):
        yield f"chardev {found.get('id')} holds a port of the host"
    elif option in SERVERS and re.match(r"(tcp|telnet|websocket|udp):", text):
        yield f"{option} {text} holds a port of the host"


def _relative(option: str, value: str | None, found: Mapping[str, str]) -> Iterator[str]:
    if option in _FILES and value and not value.startswith("/"):
        yield value
    if option in ("-drive", "-blockdev", "-chardev", "-object"):
        for key in sorted(_FILE_KEYS & found.keys()):
            # A name with a colon is a protocol, such as nbd:... or rbd:...
            if not found[key].startswith("/") and ":" not in found[key]:
                yield found[key]
