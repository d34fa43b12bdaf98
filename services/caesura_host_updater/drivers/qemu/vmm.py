"""What the kernel says about a QEMU process: its program, its words, its memory, and whether it lives as we do."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from caesura_vmcontrol.bounded_read import environs
from caesura_vmcontrol.procfs import process_table, read_process

_DELETED = " (deleted)"
_WORDS = 400  # characters of a log that are quoted
_NAMESPACES = {"net": "network", "pid": "process"}


class NoVmm(Exception):
    """There is no such process, or it is not a QEMU; the text says which."""


@dataclass(frozen=True)
class VmmProcess:
    """A QEMU process. ``binary`` is the path of its program; ``replaced``: that path holds another file by now."""

    pid: int
    start_ticks: int
    binary: str
    replaced: bool
    argv: tuple[str, ...]


def read_vmm(pid: int) -> VmmProcess:
    """Look at a process that should be a QEMU. Raises NoVmm."""
    process = read_process(pid)
    try:
        exe = os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - a kernel link, not our file
        argv = tuple(
            Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
        )
    except OSError as error:
        raise NoVmm(f"process {pid}: {error.strerror or error}") from error
    if process is None or not argv:
        raise NoVmm(f"process {pid} has ended")
    name = Path(exe.removesuffix(_DELETED)).name
    if "qemu" not in name and "kvm" not in name:
        raise NoVmm(f"process {pid} ({exe}) is not QEMU")
    replaced = exe.endswith(_DELETED)
    return VmmProcess(pid, process.start_ticks, exe.removesuffix(_DELETED), replaced, argv)


def foreign(pid: int, paths: Iterable[str]) -> list[str]:
    """Every reason why a process that we start would not live as this one does.

    ``paths``: what its command line names. In another mount namespace (systemd's ``ProtectSystem=`` makes one) they
    are compared by what they resolve to; the namespaces themselves say nothing.
    """
    found = []
    try:
        uid = Path(f"/proc/{pid}").stat().st_uid
        if uid != os.geteuid():
            found.append(
                f"it runs as user {uid} and we are {os.geteuid()}: a process that we start could not be the same"
            )
        for kind, name in _NAMESPACES.items():
            if Path(f"/proc/{pid}/ns/{kind}").stat().st_ino != Path(f"/proc/self/ns/{kind}").stat().st_ino:
                found.append(f"it lives in a {name} namespace of its own")
        found += [
            f"{path} is another file for its process than for us: it lives in a file system namespace of its own"
            for path in sorted(set(paths))
            if _identity(Path(path)) != _identity(Path(f"/proc/{pid}/root{path}"))
        ]
    except OSError as error:
        found.append(f"process {pid} cannot be looked at: {error.strerror or error}")
    return found


def _identity(path: Path) -> tuple[int, int] | None:
    """What a path resolves to: a device by its number, all else by device and inode; None: nothing."""
    try:
        there = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISBLK(there.st_mode) or stat.S_ISCHR(there.st_mode):
        return -1, there.st_rdev
    return there.st_dev, there.st_ino


def file_errors(pid: int, files: Iterable[str]) -> list[str]:
    """What is wrong with the files that a guest's disks are in: a new process would open them by name.

    ``files``: as QEMU names them. A file that was moved, removed or made again under the process is another one.
    """
    wanted = sorted({file for file in files if file.startswith("/")})
    found = [
        f"disk file {file!r} is relative to a folder that is not ours"
        for file in sorted(set(files))
        if not file.startswith(("/", "json:"))
    ]
    try:
        handles = [_identity(each) for each in Path(f"/proc/{pid}/fd").iterdir()] if wanted else []
    except OSError as error:
        return [*found, f"the files of process {pid} cannot be looked at: {error.strerror or error}"]
    for file in wanted:
        try:
            there = _identity(Path(file))
        except OSError as error:
            found.append(f"disk file {file} cannot be looked at: {error.strerror or error}")
            continue
        if there is None:
            found.append(f"disk file {file} is not there any more: a new process could not open it")
        elif there not in handles:
            found.append(
                f"disk file {file} is not the file that the guest writes to: it was moved or replaced"
            )
    return found


def ram_error(pid: int, file: str, size: int) -> str:
    """What is wrong with a guest's RAM file as it is on disk now; empty: the process maps exactly this file."""
    try:
        there = Path(file).stat()
    except OSError as error:
        return f"its RAM file {file} is not there any more ({error.strerror}): the guest's memory has no name"
    if there.st_size != size:
        return f"its RAM file {file} has {there.st_size} bytes, the guest's RAM {size}"
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")
    except OSError as error:
        return f"the maps of process {pid} cannot be read: {error.strerror}"
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[4] == str(there.st_ino) and not fields[5].endswith(_DELETED):
            return "" if fields[1][3] == "s" else f"its RAM file {file} is mapped privately"
    return f"its RAM file {file} was deleted under it and made again: the process has the old one"


def last_words(log: Path) -> str:
    """What a QEMU said last, without its own name and without warnings; empty: nothing."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    words = [
        re.sub(r"^\S*(qemu|kvm)[^\s:]*: ", "", line.strip())
        for line in lines[-40:]
        if line.strip() and ": warning: " not in line and "terminating on signal" not in line
    ]
    return "; ".join(words[-3:])[-_WORDS:]


def marked(mark: str) -> Iterator[tuple[int, int]]:
    """Pid and start time of every process with this ``NAME=value`` in its environment; a value may be a prefix."""
    wanted, table = mark.encode(), process_table()
    for pid, entries in environs(table):
        if any(entry.startswith(wanted) for entry in entries):
            yield pid, table[pid].start_ticks


def marked_as(pid: int, mark: str) -> str:
    """What follows ``mark`` in a process's environment; empty: it has no such mark. Raises OSError."""
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if entry.startswith(mark.encode()):
            return entry[len(mark) :].decode(errors="replace")
    return ""


def place_error(folder: Path) -> str:
    """Why others could put files of theirs into a folder, or another folder in its place; empty: they cannot.

    Raises:
        OSError: it cannot be looked at.
    """
    there = folder.lstat()
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid() or there.st_mode & 0o077:
        return f"{folder} is not a folder for us alone: it is {stat.filemode(there.st_mode)} of user {there.st_uid}"
    nearest = folder.parent.resolve()
    for parent in (nearest, *nearest.parents):
        above = parent.stat()
        open_to_all = above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX
        if above.st_uid not in (0, os.geteuid()) or open_to_all:
            return (
                f"{folder} is below {parent}, which is {stat.filemode(above.st_mode)} of user {above.st_uid}"
            )
    return ""
