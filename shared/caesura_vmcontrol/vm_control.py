"""The condition of a paused VM and its way back, whatever paused it: each kind of plan has its module.

The host updater's drivers resume through the same code as the guard, so there is one way back from a freeze, not two.
"""

from __future__ import annotations

from collections.abc import Mapping

from caesura_vmcontrol import container_control, freezer_control, libvirt_control, qemu_control
from caesura_vmcontrol.container_engine import EnginePlan
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.procfs import Process
from caesura_vmcontrol.resume_plans import CgroupPlan, ResumePlan, SignalPlan

__all__ = ["Condition", "condition", "resume_vm"]


def condition(plan: ResumePlan, table: Mapping[int, Process] | None = None) -> Condition:
    """What the kernel says of the VM now, for QEMU guests also what QEMU says: see ``qemu_control``.

    ``table`` saves reading the process table once per VM.

    Raises:
        OSError: the kernel would not say (not: the VM is gone, which is an answer).
    """
    match plan:
        case CgroupPlan():
            return freezer_control.cgroup_condition(plan)
        case SignalPlan():
            return freezer_control.signal_condition(plan, table)
        case EnginePlan():
            return container_control.container_condition(plan)
        case LibvirtPlan():
            return libvirt_control.libvirt_condition(plan)
        case _:
            return qemu_control.condition(plan)


def resume_vm(plan: ResumePlan, table: Mapping[int, Process] | None = None) -> None:
    """Ask the kernel to let the VM run; for QEMU guests, bring what was begun to an end: see ``qemu_control``.

    Whether it runs is what ``condition`` says afterwards.

    Raises:
        OSError: the kernel refused, or QEMU did, or does not answer; a VM that is gone is not an error.
    """
    match plan:
        case CgroupPlan():
            freezer_control.thaw_cgroup(plan)
        case SignalPlan():
            freezer_control.continue_processes(plan, table)
        case EnginePlan():
            container_control.resume_container(plan)
        case LibvirtPlan():
            libvirt_control.resume_domain(plan)
        case _:
            qemu_control.resume_guest(plan)
