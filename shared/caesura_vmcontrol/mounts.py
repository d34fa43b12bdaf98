"""What is mounted where, from ``/proc/mounts``. Standard library only."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH123

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

MOUNTS = "/proc/self/mounts"
_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """A line of ``/proc/mounts``: what is mounted, where, as which file system, and how."""

    device: str
    place: str
    kind: str
    options: tuple[str, ...]


def mounts_in(text: str) -> tuple[Mount, ...]:
    """The lines, in order. Pure. Space, tab, newline and backslash are octal there (proc(5))."""
    found = []
    for line in text.splitlines():
        words = [_OCTAL.sub(lambda match: chr(int(match[1], 8)), word) for word in line.split(" ")]
        if len(words) >= 4:
            found.append(Mount(words[0], words[1], words[2], tuple(words[3].split(","))))
    return tuple(found)


def mount_of(mounts: Iterable[Mount], path: str) -> Mount | None:
    """The mount that holds an absolute path: the longest place, and of equal ones the last. Pure."""
    best: Mount | None = None
    for each in mounts:
        inside = each.place in (path, "/") or path.startswith(f"{each.place}/")
        if inside and (best is None or len(each.place) >= len(best.place)):
            best = each
    return best


def read_mounts() -> tuple[Mount, ...]:
    """Of this process's namespace. Raises OSError."""
    with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
        return mounts_in(file.read())
