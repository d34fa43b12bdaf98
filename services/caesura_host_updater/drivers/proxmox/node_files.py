"""The VMs of a Proxmox node as its files have them. Every function here blocks: ``/etc/pve`` is a file system of Proxmox's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from caesura_host_updater.drivers.proxmox.definition import (
    ProxmoxOptions,
    ProxmoxVm,
    is_tagged,
    pid_file_of,
    read_config,
    sockets_of,
    started_with,
    vmid_of,
)
from caesura_vmcontrol.bounded_calls import within
from caesura_vmcontrol.procfs import alive, read_process
from caesura_vmcontrol.qemu_plans import QemuPlan, Vmm

_MOST_BYTES = 1 << 20
"""More than any configuration has: Proxmox's file system ends a file there."""


class NodeView(msgspec.Struct, frozen=True):
    """What one look at a node's files found.

    Args:
        vms: by name.
        plans: of those that run.
        passed: files that cannot be read, and why.
        unread: VMs whose files those are, and why.
    """

    vms: dict[str, ProxmoxVm]
    plans: dict[str, QemuPlan]
    passed: dict[str, str]
    unread: dict[str, str]


def look_at_node(options: ProxmoxOptions, known: Callable[[str], QemuPlan | None]) -> NodeView:
    """All configurations, and which VMs run.

    ``known``: the plan of a VM as of the last look; it is kept while its process lives.

    Raises:
        OSError: the folder cannot be read.
    """
    vms: dict[str, ProxmoxVm] = {}
    plans: dict[str, QemuPlan] = {}
    passed: dict[str, str] = {}
    unread: dict[str, str] = {}
    folder = Path(options.config_dir)
    for file in sorted(folder.iterdir()):
        vmid = vmid_of(file.name)
        if vmid is None:
            continue
        try:
            # Read again each time: Proxmox's times of change have whole seconds, and are of the node that wrote.
            text = _text(file)
        except FileNotFoundError:
            continue  # it was removed, or moved to another node, in this moment
        except OSError as error:
            passed[str(file)] = unread[options.name_of(vmid)] = error.strerror or str(error)
            continue
        if options.vms == "tagged" and not is_tagged(text):
            continue
        vm = read_config(vmid, text, options.name_of(vmid))
        vms[vm.name] = vm
        plan = plan_of(vm, options.run_dir, known(vm.name))
        if plan is not None:
            plans[vm.name] = plan
    return NodeView(vms, plans, passed, unread)


def read_now(options: ProxmoxOptions, vmid: int, patience_s: float) -> ProxmoxVm | None:
    """One VM as its configuration has it now; None: this node has none of it any more.

    Raises:
        CallTimeout: the file system does not answer within ``patience_s``.
        OSError: it cannot be read.
    """
    file = Path(options.config_dir) / f"{vmid}.conf"
    try:
        text = within(patience_s, lambda: _text(file), key=("read", str(file)))
    except FileNotFoundError:
        return None
    return read_config(vmid, text, options.name_of(vmid))


def _text(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.read(_MOST_BYTES).decode(errors="replace")


def plan_of(vm: ProxmoxVm, run_dir: str, known: QemuPlan | None = None) -> QemuPlan | None:
    """How a VM that runs is resumed; None: it does not run."""
    if known is not None and alive(known.vmm.pid, known.vmm.start_ticks):
        return known
    file = pid_file_of(run_dir, vm.vmid)
    try:
        pid = int(Path(file).read_text(encoding="ascii"))
        process = read_process(pid)
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (OSError, ValueError):
        return None
    if process is None or not started_with(arguments, file):
        return None
    return QemuPlan(vm.name, Vmm(pid, process.start_ticks, sockets_of(run_dir, vm.vmid)[0]))
