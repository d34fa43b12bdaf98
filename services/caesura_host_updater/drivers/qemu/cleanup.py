"""After an operation: sockets get their settled names, the process that lost is ended, and what was prepared is removed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from caesura.runtime.logs import get_logger
from caesura_host_updater.drivers.qemu import successor
from caesura_host_updater.drivers.qemu.process_records import Records, VmProcessRecord
from caesura_host_updater.drivers.qemu.vmm import read_vmm
from caesura_host_updater.spawn import reap
from caesura_vmcontrol import claims
from caesura_vmcontrol.process_control import find_by_env, kill_and_wait
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.qemu_control import heir
from caesura_vmcontrol.qemu_plans import ReplacePlan, SwapPlan
from caesura_vmcontrol.vm_control import resume_vm

_END_S = 2.0  # s: for a killed process to be dead

_log = get_logger("caesura.qemu")


def run_of(former: VmProcessRecord, pid: int, start_ticks: int) -> VmProcessRecord:
    """The record of a process that follows another one. Raises NoVmm."""
    argv = successor.settled(read_vmm(pid).argv)
    return msgspec.structs.replace(former, pid=pid, start_ticks=start_ticks, boot_id=boot_id(), argv=argv)


def link_sockets(run: VmProcessRecord) -> None:
    """Give the sockets of a process their settled names. Their first ones stay until the operation is released:
    a guard that acts on the plan finds the process under either. Raises OSError.
    """
    for path in successor.sockets_of(run.argv):
        there = successor.next_path(path)
        part = Path(f"{there}.ln")
        part.unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # renamed in an earlier try
            os.link(there, part)
            part.replace(path)


def make_next_folders(run: VmProcessRecord) -> None:
    """Where the process that shall follow listens. Raises OSError."""
    for path in successor.sockets_of(run.argv):
        Path(successor.next_path(path)).parent.mkdir(exist_ok=True, mode=0o700)


def remove_files(*paths: str | Path) -> None:
    """Remove what is there; never fails."""
    for path in paths:
        with suppress(OSError):
            Path(path).unlink()


def end_losers(plan: SwapPlan | ReplacePlan) -> claims.Owner | None:
    """Decide for the old process if nobody has decided, and end the one that has lost; None: that cannot be done now."""
    try:
        owner = _owner(plan)
        if owner is None or owner.kind in ("file", "left"):
            return None  # not known, or the guest is nowhere but in the file
        old, until = (plan.old.pid, plan.old.start_ticks), time.monotonic() + _END_S
        if isinstance(plan, SwapPlan):
            others = [(plan.new.pid, plan.new.start_ticks)]
        else:
            others = [(each.pid, each.start_ticks) for each in find_by_env(plan.mark)]
        for process in {old, *others}:
            keeps = process == old if owner.kind == "old" else process == (owner.pid, owner.start_ticks)
            if not keeps:
                kill_and_wait(*process, until)
                reap(process[0])
    except (OSError, claims.BadClaim) as error:
        _log.error("operation.not_released", vm=plan.vm, why=str(error))
        return None
    return owner


def _owner(plan: SwapPlan | ReplacePlan) -> claims.Owner | None:
    if not Path(plan.claims).is_dir():
        # Lost in the middle, or an earlier release came so far: the one that is left has the guest.
        if heir(plan) is None:
            resume_vm(plan)
        return heir(plan)
    number, owner = claims.current(plan.claims)
    if owner is None:
        owner = claims.parse_owner(claims.claim(plan.claims, number + 1, "old"))
    return owner


def forget(
    vm: str, run: VmProcessRecord | None, operation: Path, own: Sequence[Path], records: Records, *, new: bool
) -> None:
    """Remove what an operation left. Blocking.

    Args:
        operation: its record.
        own: its files in the folder of the VM's sockets, the folder of its claims last.
        new: whether the new process has the guest; it continues with its own log.
    """
    log = records.next_log(vm)
    with suppress(OSError):
        if new:
            log.replace(records.log(vm))
        else:
            log.unlink()
    if run is not None:
        remove_files(*(successor.next_path(path) for path in successor.sockets_of(run.argv)))
    *files, folder = own
    remove_files(*files)
    records.end(operation)
    # After the record: a reader that finds that must find what was decided, too.
    remove_claims(folder)
    with suppress(OSError):
        folder.parent.rmdir()  # of a VM whose sockets are elsewhere


def remove_claims(folder: Path) -> None:
    """The operation is over and was disarmed; never fails."""
    shutil.rmtree(folder, ignore_errors=True)
