"""What an operator says about process VMs in the host file. Pure: structs and their checks."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from caesura_host_updater.drivers.process.daemon_clients import hands_over
from caesura_host_updater.inventory.vm_spec import VmSpec
from caesura_vmcontrol.freezer_control import FreezerChoice


class GuestProcess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One process of a process VM, run as it stands: no shell, program found on PATH."""

    argv: Annotated[tuple[str, ...], Meta(min_length=1)]
    environ: dict[str, str] = {}


class ProcessVm(VmSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM of the process driver."""

    process: tuple[GuestProcess, ...] = ()
    ram_bytes: Annotated[int, Meta(ge=0, le=2**40)] = 0
    """Size of the memory file that its processes map, named in CAESURA_VM_RAM; 0: none."""


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[process]``: what holds for all VMs of the host."""

    freezer: FreezerChoice = "auto"


def vm_error(vm: ProcessVm) -> str:
    """What is wrong with a VM beyond its types: names the key. Empty: nothing."""
    if not vm.process:
        return "has no [[vm.process]]: give it at least one argv"
    if "" in (process.argv[0] for process in vm.process):
        return "has a process whose argv starts with an empty word"
    return next((why for process in vm.process if (why := hands_over(process.argv))), "")
