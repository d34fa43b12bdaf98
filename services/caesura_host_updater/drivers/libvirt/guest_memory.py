"""The memory of a domain that has it in a file: read from outside to prove that a pause left it as it was. Blocking.

libvirt's ``<memoryBacking>`` decides: with ``<source type='file'/>`` and ``<access mode='shared'/>`` it is a file in a folder that root and QEMU's
user may read; with ``<source type='memfd'/>`` it is a file without a name, which root and QEMU's user reach by the process's descriptors. Without
either it is private memory of the process. Source: libvirt, docs/formatdomain.rst ("Memory Backing").
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from caesura_host_updater.drivers.digest import digest_of
from caesura_host_updater.drivers.qemu.arguments import is_on, options, settings
from caesura_host_updater.drivers.sampling import sampled_digest_of
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.procfs import alive

T = TypeVar("T")

_MEMFD = "/memfd:memory-backend-memfd"
_REMEDY = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking> makes it a file from the domain's next start on"


class GuestMemory(msgspec.Struct, frozen=True):
    """Where it is. ``path`` is opened for each digest; ``error``: why it cannot be read, and then there is no path."""

    path: str = ""
    size_bytes: int = 0
    error: str = ""


UNLISTED = GuestMemory(error="libvirt does not list its domain")
"""Nobody has looked where it is."""


def memory_of_domain(plan: LibvirtPlan) -> GuestMemory:
    """The file of a domain that runs, if this user may read it."""
    if not plan.pid:
        return GuestMemory(error="its QEMU process is not seen by this user")
    try:
        arguments = Path(f"/proc/{plan.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError as error:
        return GuestMemory(error=f"its QEMU process cannot be looked at: {error.strerror or error}")
    kind, found = _backend(arguments)
    size_bytes = int(found["size"]) if found.get("size", "").isdigit() else 0
    if kind == "memory-backend-memfd":
        path = _memfd(plan.pid, size_bytes)
        if not path:
            return GuestMemory(error="its memory is a memfd, which only root and QEMU's user may read")
    elif kind == "memory-backend-file":
        path = found.get("mem-path", "")
        if not is_on(found, "share"):
            return GuestMemory(error=f"its memory file is mapped privately; {_REMEDY}")
        if not os.access(path, os.R_OK):
            return GuestMemory(error=f"its memory file may not be read by this user: {path}")
    else:
        return GuestMemory(error=f"its memory is private to its QEMU process; {_REMEDY}")
    if not size_bytes or _size(path) != size_bytes:
        return GuestMemory(error="its memory is not in one file")
    return GuestMemory(path, size_bytes)


def _backend(arguments: Sequence[str]) -> tuple[str, Mapping[str, str]]:
    """Kind and settings of the object that is its memory; no kind: there is none, or several (NUMA)."""
    found = [settings(option, value) for option, value in options(arguments) if option == "-object"]
    backends = [(kind, keys) for kind, keys in found if kind.startswith("memory-backend-")]
    return backends[0] if len(backends) == 1 else ("", {})


def _memfd(pid: int, size_bytes: int) -> str:
    """The descriptor of a process that is a memfd of this size; empty: there is none, or it may not be looked at."""
    try:
        for each in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(each).startswith(_MEMFD) and _size(str(each)) == size_bytes:  # noqa: PTH115 - no resolution
                return str(each)
    except OSError:
        pass
    return ""


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def memory_digest_of(plan: LibvirtPlan, stop_at: float) -> str | None:
    """A digest of all of it; None: not done by ``stop_at``. Raises OSError, ValueError."""
    return _read(plan, lambda path: digest_of(path, stop_at))


def sampled_memory_of(plan: LibvirtPlan, seed: str) -> str:
    """A digest of pages that ``seed`` chooses. Raises OSError, ValueError."""
    return _read(plan, lambda path: sampled_digest_of(path, seed))


def _read(plan: LibvirtPlan, read: Callable[[Path], T]) -> T:
    memory = memory_of_domain(plan)
    if memory.error:
        raise ValueError(memory.error)
    digest = read(Path(memory.path))
    if not alive(
        plan.pid, plan.start_ticks
    ):  # another process may have its pid, and so its descriptors' names
        raise ValueError("its process has ended")
    return digest
