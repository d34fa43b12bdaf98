"""Why a guest cannot be kept while another kernel is started for its host, beyond what forbids a new process anyway."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path

from caesura_host_updater.drivers.qemu.arguments import options, settings
from caesura_host_updater.drivers.qemu.commandline import GuestRam, memory_of
from caesura_host_updater.drivers.qemu.obstacles import paths_of
from caesura_host_updater.drivers.qemu.process_records import VmProcessRecord
from caesura_host_updater.drivers.qemu.successor import sockets_of
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_vmcontrol.ram_places import dax_error

OFF = "the host file has no [kernel] kexec = true"
_LATER = "set [kernel] early = false"
_PROTOCOL = re.compile(r"^(?!file:)[a-z][a-z0-9+-]*:")


def kexec_obstacles(run: VmProcessRecord, kernel: KernelOptions) -> tuple[str, ...]:
    """Every reason; empty: none. Blocking."""
    if not kernel.kexec:
        return (OFF,)
    return tuple(dict.fromkeys(_reasons(run, kernel)))


def _reasons(run: VmProcessRecord, kernel: KernelOptions) -> Iterator[str]:
    if not run.ours:
        yield "it was not started by Caesura, so its process is not restored after a boot"
    memory = memory_of(run.argv)
    if isinstance(memory, str):
        yield memory
        return
    yield from filter(None, [_ram_error(memory, kernel)])
    if kernel.early:
        yield from _too_early(run, memory)


def _ram_error(memory: GuestRam, kernel: KernelOptions) -> str:
    if not memory.file.startswith(f"{kernel.carve_out}/"):
        return f"its RAM file {memory.file} is not in the carve-out {kernel.carve_out}: start it again"
    return dax_error(memory.file)


def _too_early(run: VmProcessRecord, memory: GuestRam) -> Iterator[str]:
    """What an initramfs does not have: bridges, peers in a network, file systems beside the root."""
    for option, value in options(run.argv):
        kind, found = settings(option, value)
        if option in ("-netdev", "-nic", "-net") and kind in ("tap", "bridge"):
            yield f"an initramfs has no bridge for its network {found.get('id', kind)}: {_LATER}"
        files = [found[key] for key in ("file", "filename", "file.filename") if key in found]
        if option in ("-drive", "-blockdev") and any(_PROTOCOL.match(each) for each in files):
            yield f"an initramfs has no network for its disk {found.get('id', files[0])}: {_LATER}"
    root = Path("/").stat().st_dev
    folders = {path.rpartition("/")[0] for path in sockets_of(run.argv)}
    for path in paths_of(run.argv):
        if path == memory.file or path in folders:
            continue
        try:
            there = Path(path).stat()
            # /dev is there in an initramfs.
            elsewhere = there.st_dev != root and not stat.S_ISCHR(there.st_mode)
        except OSError as error:
            yield f"{path} cannot be looked at: {error.strerror or error}"
            continue
        if elsewhere:
            yield f"{path} is not on the root file system, which is all that an initramfs has: {_LATER}"
