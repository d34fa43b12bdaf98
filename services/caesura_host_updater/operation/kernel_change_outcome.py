"""What became of an operation whose pause went over a change of the host's kernel: from the journal and the guard's record. Pure.

The journal's instants are on the clock of the former boot; the guard wrote both clocks down as its last act there, and the new boot
set its own from the time stamp counter. So every instant has a place on the present boot's clock, and the pause is measured.
``crash_recovery`` asks for it at a start, and ``report`` makes the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from caesura.contract.messages import KernelFigure
from caesura_host_updater.operation.kernel_jump import NO_DIGEST
from caesura_host_updater.operation.state import Operation, VmPause, failed
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.kernel_change import Arrival, KernelChange, Left, VmArrival

_NO_RECORD = "the host came back without a record of its VMs"


def arrived(op: Operation, change: KernelChange | None, *, wall_s: float, now: float) -> Operation:
    """The operation with its end.

    Args:
        op: as the journal has it.
        change: the guard's record of this operation; None: it has none.
        wall_s: CLOCK_REALTIME now, s, as the new boot corrected it.
        now: CLOCK_MONOTONIC now, s.
    """
    left = change.left if change is not None else None
    arrival = change.arrival if change is not None else None
    if left is None:
        why = "the host was reset while its VMs were paused" if change is not None else _NO_RECORD
        return _reset(op, arrival, wall_s - now, why)
    op = _in_this_boot(op, left, wall_s - now)
    if arrival is None or arrival.doubts:
        return _lost(op, "; ".join(arrival.doubts) if arrival is not None else _NO_RECORD)
    vms = tuple(_arrived(vm, arrival.vms.get(vm.vm), arrival, wall_s - now) for vm in op.vms)
    op = msgspec.structs.replace(op, vms=vms, phase="ended", wake_at=None)
    for vm in vms:
        if vm.end != "running":
            op = failed(op, "memory_lost", f"VM {vm.vm}: {vm.error}")
    if arrival.release != op.kernel_release:
        why = f"kernel {arrival.release} runs, not {op.kernel_release}: the VMs were resumed by {_BY[arrival.by]}"
        op = failed(op, "kernel_unexpected", why)
    return msgspec.structs.replace(op, end="failed" if op.failure else "completed")


def undecided(record: Intent, boot_id: str) -> list[str]:
    """The VMs of which the guard does not know yet what became of them, each with the reason: they may be resumed later.

    ``boot_id``: the present boot's.
    """
    change = record.kernel_change
    if change is None:
        return []
    if change.arrival is None or change.arrival.boot_id != boot_id:
        return ["this boot has not looked at their memory yet"]
    waiting = []
    for plan in record.plans:
        there = change.arrival.vms.get(plan.vm)
        if there is None or there.end == "undecided":
            waiting.append(
                f"VM {plan.vm}: {(there.why if there is not None else '') or 'it is in its files'}"
            )
    return waiting


def figure_of(op: Operation, change: KernelChange | None, at: datetime) -> KernelFigure | None:
    """The pause that was measured: of the VM that was paused longest. None: not every VM runs, or nothing was measured.

    A return to the former kernel after a crash does not measure a planned change to it.
    """
    if change is None or change.left is None or change.arrival is None or not op.vms:
        return None
    if change.arrival.release != change.expected_release:
        return None
    if any(vm.end != "running" or vm.called_at is None for vm in op.vms):
        return None
    seconds = max(vm.pause_s for vm in op.vms)
    if seconds <= 0:  # the clock was set back
        return None
    return KernelFigure(
        to=change.arrival.release,
        former=change.left.release,
        seconds=seconds,
        at=at,
        early=change.arrival.by == "initramfs",
    )


def rehearsal_figure(intent: Intent, at: datetime) -> KernelFigure | None:
    """What a change of the kernel without guests took, until a throw-away VMM answered; None: it was something else, or failed."""
    change = intent.kernel_change
    if change is None or not change.rehearsal or change.left is None or change.arrival is None:
        return None
    ready = [vm.running_at for vm in change.arrival.vms.values() if vm.end == "running"]
    if change.arrival.release != change.expected_release or not ready:
        return None
    seconds = max((each - change.left.pair.realtime for each in ready if each is not None), default=0.0)
    if seconds <= 0:
        return None
    return KernelFigure(
        to=change.arrival.release,
        former=change.left.release,
        seconds=seconds,
        at=at,
        rehearsal=True,
        early=change.arrival.by == "initramfs",
    )


def _in_this_boot(op: Operation, left: Left, offset_s: float) -> Operation:
    """Instants of the former boot's CLOCK_MONOTONIC on the present one's, where they may lie before its beginning.

    ``offset_s``: CLOCK_REALTIME minus CLOCK_MONOTONIC of the present boot.
    """
    shift_s = left.pair.realtime - left.monotonic - offset_s

    def moved(instant: float | None) -> float | None:
        return None if instant is None else instant + shift_s

    vms = tuple(
        msgspec.structs.replace(
            vm,
            called_at=moved(vm.called_at),
            frozen_at=moved(vm.frozen_at),
            resumed_at=moved(vm.resumed_at),
        )
        for vm in op.vms
    )
    deadlines = op.deadlines
    if deadlines is not None:
        deadlines = msgspec.structs.replace(deadlines, started_at=deadlines.started_at + shift_s)
    return msgspec.structs.replace(op, vms=vms, deadlines=deadlines)


def _arrived(vm: VmPause, found: VmArrival | None, arrival: Arrival, offset_s: float) -> VmPause:
    called_at = vm.called_at if vm.called_at is not None else vm.frozen_at
    vm = msgspec.structs.replace(
        vm,
        called_at=called_at,
        frozen_at=vm.frozen_at if vm.frozen_at is not None else called_at,
        no_digest=vm.no_digest or NO_DIGEST,
    )
    if found is None:
        return msgspec.structs.replace(vm, end="gone", error=vm.error or _NO_RECORD)
    if found.end != "running" or found.running_at is None:
        return msgspec.structs.replace(vm, end="gone", error=vm.error or found.why or _NO_RECORD)
    return msgspec.structs.replace(
        vm,
        resumed_at=found.running_at - offset_s,
        resumed_by="updater",  # as planned: the guard is how this method resumes
        end="running",
        detail=f"resumed under kernel {arrival.release} by {_BY[arrival.by]}",
    )


_BY: Mapping[str, str] = {
    "initramfs": "the initramfs",
    "unit": "a unit of the new kernel's user space",
    "crash-kernel": "the crash kernel, since the new kernel crashed",
    "guard": "the pause guard, once user space was up",
}


def _lost(op: Operation, why: str) -> Operation:
    """No VM was resumed."""
    vms = tuple(
        msgspec.structs.replace(vm, end="gone", error=vm.error or f"its memory is lost: {why}")
        for vm in op.vms
    )
    op = msgspec.structs.replace(op, vms=vms, phase="ended", wake_at=None)
    names = ", ".join(vm.vm for vm in vms)
    return msgspec.structs.replace(
        failed(op, "memory_lost", f"{why}; memory lost of VM {names}"), end="failed"
    )


def _reset(op: Operation, arrival: Arrival | None, offset_s: float, why: str) -> Operation:
    """The host was reset before it left: how long its VMs were paused is not known, for no clock of the former boot was kept."""
    vms = []
    for vm in op.vms:
        found = arrival.vms.get(vm.vm) if arrival is not None else None
        # The instants of the former boot mean nothing here.
        gone = msgspec.structs.replace(vm, called_at=None, frozen_at=None, resumed_at=None)
        if found is not None and found.end == "running" and found.running_at is not None:
            vms.append(
                msgspec.structs.replace(
                    gone, resumed_at=found.running_at - offset_s, resumed_by="guard", end="running"
                )
            )
        else:
            said = found.why if found is not None else ""
            vms.append(msgspec.structs.replace(gone, end="gone", error=vm.error or said or _NO_RECORD))
    op = msgspec.structs.replace(op, vms=tuple(vms), phase="ended", wake_at=None)
    lost = ", ".join(vm.vm for vm in vms if vm.end == "gone")
    op = failed(
        op, "memory_lost" if lost else "host_rebooted", f"{why}; memory lost of VM {lost}" if lost else why
    )
    return msgspec.structs.replace(op, end="failed")
