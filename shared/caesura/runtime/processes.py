"""Processes found by a mark in their environment, and whether the kernel reports them as stopped or frozen.

For programs that must leave nothing behind: processes that outlive their parent on purpose (VMs, pause guards) still carry the
mark. Sources: proc(5) for environ and stat, cgroups(7) for the freezers.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from caesura.runtime.errors import CaesuraError

CGROUP_PREFIX = "caesura-"
"""The prefix of the host updater's cgroups; no other one is ever removed."""


def cgroup_name(host: str, state_dir: Path) -> str:
    """The cgroup that holds the VMs of a host updater.

    In a demo, two hosts of one name may share a machine: the state folder distinguishes them.
    """
    digest = blake2b(str(state_dir.resolve()).encode(), digest_size=4).hexdigest()
    return f"{CGROUP_PREFIX}{host}-{digest}"


def remove_cgroups(names: Collection[str]) -> None:
    """Remove those of these cgroups that are left and empty: an updater killed while it started or stopped a VM
    leaves a cgroup without a process, to which nothing else refers."""
    for mount in dict(_mounts()).values():
        for folder, _, _ in os.walk(mount, topdown=False):
            path = Path(folder)
            if path.name in names or path.parent.name in names:
                with suppress(OSError):
                    path.rmdir()


class StillAlive(CaesuraError):
    """Processes that could not be killed."""


async def kill_marked(mark: str, *, timeout_s: float = 15.0) -> None:
    """Thaw and kill every process that carries ``mark``, until there is none, and remove our cgroups
    that this empties. A frozen process cannot die, hence the thaw.

    Raises:
        StillAlive: some are left after ``timeout_s`` seconds.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    cgroups: set[Path] = set()
    while pids := list(marked_processes(mark)):
        for pid in pids:
            cgroups |= {path.parent for path in freezers(pid)}
            thaw(pid)
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if loop.time() > end:
            raise StillAlive(f"processes could not be killed: {pids}")
        await asyncio.sleep(0.05)  # the kernel notifies only the parent when a process is gone
    for folder in cgroups:
        for each in (folder, folder.parent):
            if any(part.startswith(CGROUP_PREFIX) for part in each.parts):
                with suppress(OSError):  # still used by another process: then it must stay
                    each.rmdir()


def marked_processes(mark: str) -> Iterator[int]:
    """Processes other than this one with ``mark`` (``NAME=value``) in their environment; zombies do not count."""
    wanted = mark.encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


def frozen_processes(mark: str) -> list[int]:
    """Marked processes that the kernel reports as stopped, or in a frozen cgroup."""
    return [
        pid
        for pid in marked_processes(mark)
        if is_stopped(pid) or any(reads_frozen(path) for path in freezers(pid))
    ]


def is_frozen(pid: int) -> bool:
    """Whether the kernel reports this process as stopped or frozen."""
    return is_stopped(pid) or any(reads_frozen(path) for path in freezers(pid))


def thaw(pid: int) -> None:
    """Make a process run again, however it was frozen."""
    for path in freezers(pid):
        with suppress(OSError):
            path.write_text("THAWED" if path.name == "freezer.state" else "0")
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal (state T in /proc/PID/stat)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def reads_frozen(path: Path) -> bool:
    """Whether a file of ``freezers`` says frozen, by itself or through a parent cgroup."""
    try:
        if path.name == "freezer.state":
            return path.read_text().strip() != "THAWED"
        return "frozen 1" in (path.parent / "cgroup.events").read_text()
    except OSError:
        return False


def freezers(pid: int) -> Sequence[Path]:
    """The files that freeze this process, cgroup v1 and v2 (cgroups(7): /proc/PID/cgroup and mountinfo)."""
    found = []
    with suppress(OSError):
        mounts = dict(_mounts())
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if path == "/":
                continue  # the root cgroup cannot be frozen
            if controllers == "" and "cgroup2" in mounts:
                found.append(Path(mounts["cgroup2"] + path) / "cgroup.freeze")
            if "freezer" in controllers.split(",") and "freezer" in mounts:
                found.append(Path(mounts["freezer"] + path) / "freezer.state")
    return [each for each in found if each.exists()]


def _mounts() -> Iterator[tuple[str, str]]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            yield "cgroup2", left.split()[4]
        elif kind == "cgroup" and "freezer" in options.split(","):
            yield "freezer", left.split()[4]
