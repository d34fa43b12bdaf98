"""What in a QEMU command line forbids another process to take the guest over, and why. Pure.

What is not known to survive is refused: kinds of network back ends and character devices are named, not excluded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from caesura_host_updater.drivers.qemu.arguments import (
    is_on,
    options,
    parse_json,
    settings,
)
from caesura_host_updater.drivers.qemu.commandline import memory_of
from caesura_host_updater.drivers.qemu.definition import is_versioned
from caesura_host_updater.drivers.qemu.successor import SERVERS, sockets_of

_FILES = frozenset(
    (
        "-kernel",
        "-initrd",
        "-dtb",
        "-bios",
        "-pflash",
        "-hda",
        "-hdb",
        "-hdc",
        "-hdd",
        "-cdrom",
        "-fda",
        "-fdb",
    )
)
_FILE_KEYS = frozenset(("file", "path", "mem-path", "filename", "logfile", "script", "downscript"))
_NETWORK = ("-netdev", "-nic", "-net")
_NETWORKS = frozenset(("user", "tap", "bridge", "hubport", "none", "nic"))
_CHARDEVS = frozenset(
    (
        *("null", "socket", "file", "pipe", "pty", "ringbuf", "memory", "stdio", "vc", "mux", "udp"),
        *("spicevmc", "spiceport", "qemu-vdagent", "msmouse", "wctablet", "braille"),
    )
)
_PROTOCOL = re.compile(r"^[a-z][a-z0-9+-]*:")
_STARTER = frozenset(("fd", "fds", "vhostfd", "vhostfds", "fdset"))


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
        kind, found = settings(option, value)
        both += _forbidden(option, value, kind, found)
        both += _peers(option, kind, found)
        both += [
            f"{name!r} in its command line is relative to a folder that is not ours"
            for name in _relative(option, value, found)
        ]
        beside += _held(option, value, kind, found)
    return Obstacles(tuple(dict.fromkeys(both)), tuple(dict.fromkeys(beside)))


def _forbidden(option: str, value: str | None, kind: str, found: Mapping[str, str]) -> Iterator[str]:  # noqa: PLR0912 - one flat table
    if option == "":
        yield f"the word {value!r} of its command line is not understood"
    if value is not None and value.startswith("{") and not found:
        yield f"{option} {value[:60]} is not understood: it is not a JSON object"
    if option == "-snapshot" or (option == "-drive" and is_on(found, "snapshot")):
        name = found.get("id") or found.get("file", "")
        what = f"-drive {name} with snapshot=on" if option == "-drive" else "-snapshot"
        yield f"{what} keeps its disk writes in a file that no other process can open"
    if option in ("-drive", "-blockdev") and (
        "vvfat" in (kind, found.get("format"), found.get("driver"))
        or found.get("file", "").startswith("fat:")
    ):
        yield "vvfat keeps disk writes in a file that no other process can open"
    if option == "-object" and kind == "filter-dump":
        yield f"filter-dump {found.get('id')} empties {found.get('file')} when its process starts"
    if option in SERVERS and (value or "").startswith("mon:") and value not in ("mon:stdio", "mon:null"):
        yield f"{option} {value} shares a line with a monitor, which is not understood: give each its own chardev"
    if option in ("-chroot", "-runas", "-readconfig", "-preconfig", "-run-with"):
        yield f"it was started with {option}"
    if option == "-device" and kind.startswith(("vfio-", "vhost-", "ivshmem")):
        yield f"device {kind} cannot be handed over"
    if option == "-device" and kind in ("usb-host", "u2f-passthru", "ccid-card-passthru"):
        yield f"device {kind} is a device of the host, which the guest would see unplugged"
    if option == "-device" and kind in ("loader", "guest-loader"):
        yield f"device {kind} writes to the guest's RAM when its process starts"
    if option == "-tpmdev" and kind == "passthrough":
        yield "its TPM is the host's own, whose state cannot be handed over"
    if option in _NETWORK and (is_on(found, "vhost") or kind.startswith("vhost")):
        yield "vhost keeps network state in the host's kernel"
    elif option in _NETWORK and kind not in _NETWORKS and not _is_client(option, kind, found):
        yield f"network back end {kind!r} is not known to survive a new process: use a tap or a bridge"
    if option == "-chardev" and kind not in _CHARDEVS:
        yield f"character device {kind!r} ({found.get('id')}) is not known to survive a new process"
    if option == "-add-fd" or _STARTER & found.keys():
        yield f"{option} {value} is an open file of its starter that no other process has"


def _peers(option: str, kind: str, found: Mapping[str, str]) -> Iterator[str]:
    """Helpers that serve this process only: swtpm with ``--terminate`` and passt end when it does."""
    if _is_client(option, kind, found):
        where = next(
            (found[key] for key in ("path", "addr.path", "host", "connect", "addr.host") if key in found), "?"
        )
        yield (
            f"{option} {found.get('id', kind)} is a client of {where}: a helper such as swtpm, passt or a vhost-user "
            "back end ends with its only client or does not take a second one"
        )


def _is_client(option: str, kind: str, found: Mapping[str, str]) -> bool:
    if option == "-chardev":
        return kind == "socket" and not is_on(found, "server") and not _STARTER & found.keys()
    if option in ("-netdev", "-nic"):
        return (kind in ("stream", "dgram") and not is_on(found, "server")) or (
            kind == "socket" and "connect" in found
        )
    return False


def _held(option: str, value: str | None, kind: str, found: Mapping[str, str]) -> Iterator[str]:
    """What only one process at a time can have."""
    text = value or ""
    if option in _NETWORK and kind == "tap" and "ifname" in found:
        yield f"two processes cannot use the tap {found['ifname']} at once: give it a bridge"
    for key in sorted(found):
        if option in _NETWORK and (key == "hostfwd" or key.startswith("hostfwd.")):
            yield f"hostfwd {found[key]} holds a port of the host"
    if option == "-s" or (option == "-gdb" and text.startswith("tcp")):
        yield "its gdb server holds a port of the host"
    elif option == "-display" and text.startswith("vnc=") and not text.startswith("vnc=none"):
        # Also a unix socket: only that of -vnc is given to the next process under a name of its own.
        yield f"two processes cannot use -display {text} at once: write it as -vnc {text.removeprefix('vnc=')}"
    elif (option == "-spice" and (not is_on(found, "unix") or "tls-port" in found)) or (
        option == "-vnc" and not text.startswith(("unix:", "none"))
    ):
        yield f"{option} holds a port of the host"
    elif option == "-chardev" and ("port" in found or kind == "udp") and not _is_client(option, kind, found):
        yield f"chardev {found.get('id')} holds a port of the host"
    elif option in SERVERS and re.match(r"(tcp|telnet|websocket|udp):", text):
        yield f"{option} {text} holds a port of the host"


def _relative(option: str, value: str | None, found: Mapping[str, str]) -> Iterator[str]:
    if option in _FILES and value and not _is_absolute(value):
        yield value
    if option in ("-drive", "-blockdev", "-chardev", "-object", "-fsdev", "-virtfs", *_NETWORK):
        for key in sorted(found):
            is_file = key.rpartition(".")[2] in _FILE_KEYS
            # In -blockdev `file` may name a node; in -netdev `no` is not a script.
            if not is_file or (key == "file" and option == "-blockdev") or found[key] == "no":
                continue
            if not _is_absolute(found[key]):
                yield found[key]
    # A socket's path: the process that follows would listen elsewhere.
    yield from (path for path in sockets_of(("", option, value or "")) if not path.startswith("/"))


def _is_absolute(name: str) -> bool:
    """Whether a file's name means the same in any folder. Other protocols, such as ``nbd:`` or ``rbd:``, do."""
    if name.startswith("json:"):
        inner = settings("-blockdev", name.removeprefix("json:"))[1]
        files = [text for key, text in inner.items() if key.rpartition(".")[2] == "filename"]
        return parse_json(name.removeprefix("json:")) is not None and all(map(_is_absolute, files))
    if name.startswith(("/", "file:/")):
        return True
    return not name.startswith("file:") and _PROTOCOL.match(name) is not None


def paths_of(argv: Sequence[str]) -> tuple[str, ...]:
    """Every absolute path that a command line names as a file or as a socket's folder."""
    found = {argv[0]} if argv[0].startswith("/") else set[str]()
    for option, value in options(argv):
        named = [value or ""] if option in _FILES else []
        named += [
            text for key, text in settings(option, value)[1].items() if key.rpartition(".")[2] in _FILE_KEYS
        ]
        found |= {name for name in named if name.startswith("/")}
    listens = {path.rpartition("/")[0] for path in sockets_of(argv) if path.startswith("/")}
    # A socket has its folder compared: it may be one that only its process made in its own namespace.
    return tuple(sorted((found - set(sockets_of(argv))) | {each for each in listens if each}))
