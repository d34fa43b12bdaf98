"""The command line of the process that follows another one, and of a trial that only shows what that would be. Pure.

The next process has the same command line but for where it listens and what must not happen twice: files that are
emptied, RAM that is touched, ids that are made up at the start.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator, Sequence

from caesura_host_updater.drivers.qemu.arguments import (
    escaped,
    is_on,
    options,
    settings,
    with_setting,
    words_of,
)
from caesura_host_updater.drivers.qemu.commandline import machine_of

NEXT = "next"
"""The folder, beside a process's sockets, where those of the process that shall follow it are."""

SERVERS = frozenset(("-qmp", "-qmp-pretty", "-monitor", "-serial", "-parallel", "-debugcon", "-gdb", "-vnc"))
_DROPPED = frozenset(("-S", "-daemonize", "-pidfile", "-incoming", "-loadvm", "-mem-prealloc"))
LINES = {"-serial": "serial{}", "-parallel": "parallel{}", "-debugcon": "debugcon"}
"""Options that may name a file, and the id of the character device that QEMU makes of each (``qemu_chr_new``)."""
_MUTE = frozenset(("-mon", "-qmp", "-qmp-pretty", "-monitor", "-gdb", "-s", "-vnc", "-D", "-d", "-trace"))

_NETWORK = ("-netdev", "-nic", "-net")
_NOTICED = ("hostfwd", "guestfwd", "smb", "smbserver")
"""What a user network takes from its host: ports, connections, a folder."""


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
        kind, found = settings(option, value)
        if option == "-chardev" and kind == "socket" and "path" in found and is_on(found, "server"):
            changed = with_setting(value or "", "path", target(found["path"]))
        elif option == "-spice" and is_on(found, "unix") and "addr" in found:
            changed = with_setting(value or "", "addr", target(found["addr"]))
        elif option in SERVERS and value is not None and value.startswith("unix:"):
            path, comma, rest = value.removeprefix("unix:").partition(",")
            changed = f"unix:{target(path)}{comma}{rest}"
        words += words_of(option, changed)
    return words, moved


def sockets_of(argv: Sequence[str]) -> tuple[str, ...]:
    """Every unix socket that the process listens on."""
    return tuple(_with_sockets(argv, lambda path: path)[1])


def settled(argv: Sequence[str]) -> tuple[str, ...]:
    """A process's own command line as if it had been the first: to derive the next one's from."""
    words, _ = _with_sockets(argv, settled_path)
    kept = [words[0]]
    for option, value in options(words):
        if option not in _DROPPED:
            kept += words_of(option, value)
    return tuple(kept)


def next_command(argv: Sequence[str], binary: str, machine: str, generation_id: str = "") -> tuple[str, ...]:
    """The command line of the process that follows: it waits for the state, then stays paused.

    Args:
        argv: the present one's, settled.
        machine: its type as QEMU resolved it.
        generation_id: the guest's, as QEMU says: a new one would tell the guest that it was cloned. Empty: it has none.
    """
    words, _ = _with_sockets(argv, next_path)
    kept = [binary]
    lines = dict.fromkeys(LINES, 0)
    for option, value in options(words):
        if option in _DROPPED:
            continue
        if option in LINES:
            lines[option] += 1
            kept += _line(option, value or "", lines[option] - 1)
            continue
        kept += words_of(option, _followed(option, value, machine, generation_id))
    if not machine_of(kept)[0]:
        kept += ["-machine", machine]
    return (*kept, "-incoming", "defer", "-S")


def _followed(option: str, value: str | None, machine: str, generation_id: str) -> str | None:
    """One option's value in the next process."""
    kind, found = settings(option, value)
    changed = value or ""
    if option in ("-machine", "-M") and kind:
        return changed.replace(kind, machine, 1)
    if option == "-chardev":
        if kind == "file" and "append" not in found:
            changed = with_setting(changed, "append", "on")  # else its start would empty the file
        if "logfile" in found and "logappend" not in found:
            changed = with_setting(changed, "logappend", "on")
        return changed
    if option == "-object" and "prealloc" in found:
        return with_setting(changed, "prealloc", None)  # it would write to memory that a guest runs on
    if option == "-device" and kind == "vmgenid" and generation_id:
        return with_setting(changed, "guid", generation_id)
    return value


def _line(option: str, value: str, number: int) -> Iterator[str]:
    """A serial or parallel line. ``file:`` has no way to append: it becomes the character device that QEMU makes of it."""
    if not value.startswith("file:"):
        yield from (option, value)
        return
    name = LINES[option].format(number)
    yield from ("-chardev", f"file,id={name},path={escaped(value.removeprefix('file:'))},append=on")
    yield from (option, f"chardev:{name}")


def trial_command(command: Sequence[str], folder: str) -> tuple[str, ...]:
    """A next process's command line without what only one process can have, and without all that others could notice.

    The process has the same machine, memory, disks, devices and user networks (without forwarded ports), and one QMP
    socket ``trial`` in ``folder``.
    """
    kept = [command[0]]
    hubs = 0
    for option, value in options(command):
        _, found = settings(option, value)
        if option in _MUTE:
            continue
        if option == "-chardev":
            mux = ",mux=on" if is_on(found, "mux") else ""
            kept += ["-chardev", f"null,id={escaped(found.get('id', ''))}{mux}"]
        elif option in LINES:
            kept += [option, value if value is not None and _is_quiet(value) else "null"]
        elif option in _NETWORK:
            hubs += 1
            kept += _trial_network(option, value or "", hubs)
        elif option == "-spice":
            kept += ["-spice", f"unix=on,addr={escaped(folder)}/spice,disable-ticketing=on"]
        elif option == "-audiodev":
            kept += ["-audiodev", f"none,id={escaped(found.get('id', ''))}"]
        elif option in ("-display", "-sdl", "-curses", "-full-screen"):
            kept += ["-display", "none"] if option == "-display" else []
        else:
            kept += words_of(option, value)
    kept += ["-display", "none", "-monitor", "none"]
    return (*kept, "-qmp", f"unix:{folder}/trial,server=on,wait=off")


def _trial_network(option: str, value: str, hub: int) -> Iterator[str]:
    """A network of a trial: QEMU's own without what the host could notice, and a hub of its own for any other one."""
    kind, found = settings(option, value)
    if kind == "user":
        for key in _NOTICED:
            value = with_setting(value, key, None)
    elif option == "-netdev":
        value = f"hubport,id={escaped(found.get('id', ''))},hubid={hub}"
    elif kind == "none" or (option, kind) == ("-net", "nic"):
        pass  # without `none` there would be a card by default
    elif option == "-nic":
        card = {key: text for key, text in found.items() if key in ("id", "model", "mac")}
        value = ",".join((f"hubport,hubid={hub}", *(f"{key}={text}" for key, text in card.items())))
    else:
        return
    yield from (option, value)


def _is_quiet(value: str) -> bool:
    return value in ("none", "null") or value.startswith("chardev:")
