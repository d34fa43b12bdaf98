"""How each domain that runs is resumed: its QEMU process, and the QMP sockets of that process that we may use. Blocking."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from caesura_host_updater.drivers.libvirt.definition import LibvirtVm, pid_files, qmp_sockets
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.procfs import read_process

_MONITOR = "/monitor.sock"
_LISTENING = 0x10000  # __SO_ACCEPTCON of linux/net.h, in the column Flags of /proc/net/unix


def plan_of_domain(vm: LibvirtVm, number: int, socket: str, uri: str) -> LibvirtPlan | None:
    """The plan of a domain that runs; without its process where that cannot be seen from here.

    None: its process has ended, and the daemon has not noticed it yet.
    """
    for file in pid_files(socket, vm.domain_name):
        with suppress(OSError, ValueError):
            pid = int(Path(file).read_text(encoding="ascii"))
            process = read_process(pid)
            if process is None:
                return None
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if vm.uuid in arguments:
                paths = [*qmp_sockets(arguments), *monitor_sockets(pid)]
                usable = tuple(path for path in paths if os.access(path, os.W_OK))
                return LibvirtPlan(vm.name, socket, uri, vm.uuid, number, pid, process.start_ticks, usable)
    return LibvirtPlan(vm.name, socket, uri, vm.uuid, number, 0, 0)


def is_same_life(one: LibvirtPlan, other: LibvirtPlan) -> bool:
    """Whether two plans are of one life of a domain. Its process counts where both know it: ids are given again by a restarted daemon."""
    if one.uuid != other.uuid:
        return False
    if one.pid and other.pid:
        return (one.pid, one.start_ticks) == (other.pid, other.start_ticks)
    return one.number == other.number


def monitor_sockets(pid: int) -> list[str]:
    """The sockets on which a QEMU of libvirt's listens for the daemon; none where its descriptors may not be read."""
    try:
        inodes = {_inode(os.readlink(each)) for each in Path(f"/proc/{pid}/fd").iterdir()}  # noqa: PTH115 - no resolution
        lines = Path(f"/proc/{pid}/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return list(_listening(lines[1:], inodes))


def _inode(target: str) -> str:
    return target.removeprefix("socket:[").removesuffix("]") if target.startswith("socket:[") else ""


def _listening(lines: Iterable[str], inodes: set[str]) -> Iterable[str]:
    """Source: proc(5), /proc/net/unix: Num, RefCount, Protocol, Flags, Type, St, Inode, Path."""
    for line in lines:
        words = line.split(maxsplit=7)
        if len(words) != 8 or words[6] not in inodes:
            continue
        if int(words[3], 16) & _LISTENING and words[7].endswith(_MONITOR):
            yield words[7]
