"""The instructions for the first process of a VM, in a file: see ``guest_init``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from caesura_host_updater.drivers.process.definition import ProcessVm
from caesura_host_updater.drivers.shutdown_requests import ShutdownRequests
from caesura_vmcontrol.procfs import boot_id


def memory_file(folder: Path, vm: str) -> Path:
    """What the VM's processes map."""
    return folder / f"{vm}.ram"


def ended_file(folder: Path, vm: str) -> Path:
    """Where the first process notes which of the VM's processes failed."""
    return folder / f"{vm}.ended"


def init_spec(
    vm: ProcessVm, host: str, folder: Path, kind: str, control: str, environ: Mapping[str, str]
) -> bytes:
    """The file's text; the VM's memory file has its size afterwards. Blocking.

    Args:
        vm: the VM.
        host: the host's name.
        folder: where the VMs' files are.
        kind: of the freezer.
        control: the file that freezes the VM's cgroup; empty: it has none.
        environ: what its processes inherit.
    """
    environ = {**environ, "CAESURA_VM": vm.name, "CAESURA_HOST": host}
    if vm.ram_bytes:
        memory = memory_file(folder, vm.name)
        with memory.open("ab") as file:
            file.truncate(vm.ram_bytes)
        environ["CAESURA_VM_RAM"] = str(memory)
    files = folder / vm.name
    return msgspec.json.encode(
        {
            "lock_file": f"{files}.lock",
            "run_file": f"{files}.run.json",
            "ended_file": str(ended_file(folder, vm.name)),
            "shutdown_file": str(ShutdownRequests(folder).file(vm.name)),
            "cgroup_procs": str(Path(control).parent / "cgroup.procs") if control else "",
            "run": {"kind": kind, "control": control, "boot_id": boot_id()},
            "processes": [
                {"argv": process.argv, "environ": {**environ, **process.environ}} for process in vm.process
            ],
        }
    )
