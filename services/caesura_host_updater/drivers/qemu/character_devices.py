"""What is behind a machine's character devices: as QEMU says it, and as its command line would make it. Pure.

Sources: QEMU's ``query-chardev`` (``chardev/char-socket.c``, ``char-pty.c``; other kinds say their own name) and
``chardev/char.c`` for what ``-serial`` takes. The same in QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from caesura_host_updater.drivers.qemu.arguments import is_on, options, settings
from caesura_host_updater.drivers.qemu.successor import LINES, settled_path

_UNIX = re.compile(r"^unix:(.*?)(?:,server=on)?$")
_PORT = re.compile(r"^(tcp|telnet|websocket|tn3270):.*:(\d+)(?:,server=on)?$")
_PLAIN = frozenset(("null", "file", "pty", "udp", "ringbuf", "memory", "vc", "spicevmc"))
"""Kinds that say their own name, with or without a colon and more."""


def line_texts(chardevs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Labels to what is behind them, from ``query-chardev``: ``unix /path``, ``tcp port 4711``, ``pty``, ``null``."""
    found: dict[str, str] = {}
    for each in sorted(chardevs, key=lambda one: str(one["label"]).endswith("-base")):
        # A line that several share is the one below it, `serial0-base`, which comes last here.
        found[str(each["label"]).removesuffix("-base")] = _text(str(each.get("filename", "")))
    return found


def _text(name: str) -> str:
    name = name.removeprefix("disconnected:").partition(" <-> ")[0]
    if (path := _UNIX.match(name)) is not None:
        return f"unix {settled_path(path[1])}"
    if (port := _PORT.match(name)) is not None:
        return f"{port[1]} port {port[2]}"
    return name.partition(":")[0]


def stated_lines(running: Mapping[str, str], argv: Sequence[str]) -> dict[str, str]:
    """What a process with this command line has behind its character devices, as far as that is known beforehand."""
    counted = dict.fromkeys(LINES, 0)
    found: dict[str, str] = {}
    for option, value in options(argv):
        label, text = "", ""
        if option == "-chardev":
            kind, given = settings(option, value)
            label, text = given.get("id", ""), _stated(kind, given)
        elif option in LINES:
            label, text = LINES[option].format(counted[option]), _of_line(value or "")
            counted[option] += 1
        if text.endswith(" port ") and running.get(label, "").startswith(text):
            text = running[label]  # any that was free
        if label and text:
            found[label] = text
    return found


def _stated(kind: str, given: Mapping[str, str]) -> str:
    if kind == "socket" and not is_on(given, "abstract"):
        path = given.get("path", given.get("addr.path", ""))
        port = given.get("port", given.get("addr.port", ""))
        telnet = next((name for name in ("telnet", "websocket", "tn3270") if is_on(given, name)), "tcp")
        chosen = "" if port == "0" or "to" in given else port
        return f"unix {settled_path(path)}" if path else f"{telnet} port {chosen}" if port else ""
    return kind if kind in _PLAIN else ""


def _of_line(value: str) -> str:
    kind, colon, rest = value.partition(":")
    if kind == "unix" and colon:
        return f"unix {settled_path(rest.partition(',')[0])}"
    if kind in ("tcp", "telnet", "websocket"):
        port = rest.partition(",")[0].rpartition(":")[2]
        return f"{kind} port {'' if port == '0' else port}" if port.isdigit() else ""
    return kind if kind in _PLAIN else ""


def line_differences(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Labels that both have with something else behind them."""
    for label in sorted(old.keys() & new.keys()):
        if old[label] != new[label]:
            yield label, old[label], new[label]
