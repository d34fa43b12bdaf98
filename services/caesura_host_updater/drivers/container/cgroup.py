"""Where the kernel freezes a container: the freezer file of its first process's cgroup."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from caesura_host_updater.drivers.process.freezers import freezer_mounts, own_cgroups

_FILES: dict[Literal["cgroup1", "cgroup2"], str] = {"cgroup1": "freezer.state", "cgroup2": "cgroup.freeze"}


class NoFreezer(Exception):
    """The cgroup of a container cannot be seen from here; the text says why."""


def freezer_of(pid: int, mountinfo: str, cgroup: str) -> tuple[Literal["cgroup1", "cgroup2"], str]:
    """The hierarchy and the freezer file. Pure.

    Args:
        pid: of the container's first process, for the error.
        mountinfo: our own ``/proc/self/mountinfo``.
        cgroup: ``/proc/PID/cgroup`` of that process.

    Raises:
        NoFreezer: it is in the root of the hierarchies, which cannot be frozen, or they are not mounted here.
    """
    mounts, places = freezer_mounts(mountinfo), own_cgroups(cgroup)
    # A host with both hierarchies: its engine uses the one in which the container has a group of its own.
    for kind in ("cgroup1", "cgroup2"):
        place = places.get(kind, "/")
        if kind in mounts and place not in ("", "/") and ".." not in Path(place).parts:
            return kind, f"{mounts[kind]}/{place.strip('/')}/{_FILES[kind]}"
    raise NoFreezer(
        f"process {pid} is in no cgroup of its own that can be seen from here: that takes the process and cgroup namespaces of the host of the containers"
    )


def read_freezer(pid: int) -> tuple[Literal["cgroup1", "cgroup2"], str]:
    """As ``freezer_of``, read from /proc. Blocking. Raises NoFreezer, OSError."""
    mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    found = freezer_of(pid, mountinfo, Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8"))
    if not Path(found[1]).exists():
        raise NoFreezer(f"the freezer file {found[1]} of process {pid} is not there")
    return found
