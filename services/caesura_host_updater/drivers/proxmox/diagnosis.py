"""What is missing on a host that is a node of Proxmox VE. Blocking."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, warning, wrong
from caesura_host_updater.drivers.proxmox.definition import ProxmoxOptions, ProxmoxVm
from caesura_host_updater.drivers.proxmox.monitor import ask_state
from caesura_host_updater.drivers.proxmox.node_files import NodeView, look_at_node
from caesura_vmcontrol.bounded_calls import within
from caesura_vmcontrol.qemu_plans import QemuPlan
from caesura_vmcontrol.qmp_commands import NOT_OURS, OVER

_FILES_S = 5.0
_QMP_S = 2.0
_RIGHTS = "run host updater and pause guard as root: deploy/systemd/proxmox, docs/drivers/proxmox.md"


def diagnose(options: ProxmoxOptions) -> Iterator[Diagnosis]:
    """See the module."""
    try:
        view = within(_FILES_S, lambda: look_at_node(options, lambda _: None), key="look at Proxmox's files")
    except OSError as error:
        yield wrong(
            "proxmox.configs",
            f"{options.config_dir} cannot be read: {error.strerror or error}",
            f"systemctl status pve-cluster; or: {_RIGHTS}",
        )
        return
    yield ok("proxmox.configs", f"{len(view.vms)} VMs in {options.config_dir}, {len(view.plans)} run")
    for file, why in sorted(view.passed.items()):
        yield wrong("proxmox.configs", f"{file} cannot be read: {why}", _RIGHTS)
    for vm in view.vms.values():
        yield from _of_vm(vm, view)


def _of_vm(vm: ProxmoxVm, view: NodeView) -> Iterator[Diagnosis]:
    called = f"{vm.name}, {vm.title}" if vm.title else vm.name
    if vm.template:
        yield ok("proxmox.vm", f"{called} is a template")
        return
    if vm.tag_error:
        yield wrong("proxmox.tags", f"{called}: {vm.tag_error}", "as the text says")
    elif not vm.set:
        yield warning(
            "proxmox.tags",
            f"{called} is in no set: nothing keeps it and its peers from being paused at once",
            f"qm set {vm.vmid} --tags 'caesura-set-SET;caesura-ud-N' (with its other tags)",
        )
    if vm.lock:
        yield warning("proxmox.lock", f"{called}: {vm.not_now}", "wait for what Proxmox does, or qm unlock")
    plan = view.plans.get(vm.name)
    if plan is None:
        yield ok("proxmox.vm", f"{called} does not run")
        return
    yield from _of_process(vm, called, plan)


def _of_process(vm: ProxmoxVm, called: str, plan: QemuPlan) -> Iterator[Diagnosis]:
    socket = plan.vmm.qmp
    if not Path(socket).exists():
        yield wrong("proxmox.socket", f"{called}: {socket} is not there", "qm shutdown and qm start make it")
        return
    if not os.access(socket, os.W_OK):
        yield wrong("proxmox.socket", f"{called}: {socket} may not be used by this user", _RIGHTS)
        return
    try:
        guest = ask_state(plan, time.monotonic() + _QMP_S, agent=True)
    except OSError as error:
        yield wrong(
            "proxmox.socket", f"{called}: {error}", f"`qm status {vm.vmid} --verbose` must answer, too"
        )
        return
    if guest.status == "paused" or guest.status in NOT_OURS or guest.status in OVER:
        yield warning(
            "proxmox.vm",
            f"{called} does not run: {NOT_OURS.get(guest.status, f'QEMU says {guest.status}')}",
            f"qm resume {vm.vmid}, if nothing is under way",
        )
    else:
        yield ok("proxmox.socket", f"{called} is paused and resumed by {socket}")
    if not vm.guest_agent:
        yield warning(
            "proxmox.agent",
            f"{called} has no guest agent: its clock is corrected by its own time service, and there is no verdict",
            f"install qemu-guest-agent in it; qm set {vm.vmid} --agent 1, and shut it down and start it once",
        )
    elif not guest.agent_open:
        yield warning(
            "proxmox.agent",
            f"{called}: its guest agent is enabled, and does not run in the guest",
            "install and start qemu-guest-agent in it; an agent that was enabled while it ran needs a shutdown and a start",
        )
    else:
        yield ok("proxmox.agent", f"{called} has a guest agent")
