"""The outcome of an operation whose host updater died: from the journal, the guard's record and what was found. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from caesura.contract.reasons import ReasonCode
from caesura_host_updater.operation.state import Operation, VmPause
from caesura_vmcontrol.intent import Intent, Intervention


def recovered(
    op: Operation,
    record: Intent | None,
    resumed_now: Mapping[str, float],
    *,
    same_boot: bool,
    not_started: Mapping[str, str] = MappingProxyType({}),
) -> Operation:
    """The operation with its end: always failed, for the update may be half complete.

    Args:
        op: as the journal has it; it may lag a few milliseconds behind what was done.
        record: what the guard holds or did, of whatever operation.
        resumed_now: VMs that were still frozen at our start, and when they ran (CLOCK_MONOTONIC).
        same_boot: false after a reboot of the host: instants of another boot mean nothing, and no memory is left.
        not_started: VMs of an operation by method reboot that could not be started again, to the reason.
    """
    if not_started:
        op = msgspec.structs.replace(
            op,
            vms=tuple(
                msgspec.structs.replace(vm, error=not_started.get(vm.vm, "") or vm.error) for vm in op.vms
            ),
        )
    if not same_boot:
        return _ended(op, "host_rebooted", "the host was restarted during the operation")
    if op.method == "reboot":
        return _ended(op, "updater_died", _of_reboot(op, not_started))
    if record is not None and record.operation != op.operation:
        record = None
    vms = tuple(_vm(vm, op, record, resumed_now.get(vm.vm)) for vm in op.vms)
    why = record.fired.why if record is not None and record.fired is not None else ""
    return _ended(msgspec.structs.replace(op, vms=vms), "updater_died", _reason(vms, why))


def _vm(vm: VmPause, op: Operation, record: Intent | None, resumed_now: float | None) -> VmPause:
    if vm.resumed_at is not None:
        return vm
    intervention = record.fired.vms.get(vm.vm) if record is not None and record.fired is not None else None
    called_at = _called_at(vm, op, record, intervention)
    if (
        intervention is not None
        and intervention.running_at is not None
        and (intervention.was_frozen or vm.frozen_at is not None)
    ):
        gone = intervention.end == "gone"
        return msgspec.structs.replace(
            vm,
            called_at=called_at,
            frozen_at=vm.frozen_at if vm.frozen_at is not None else called_at,
            resumed_at=intervention.running_at,
            # Not frozen when the guard looked: the updater resumed it and died before it recorded that.
            resumed_by="nobody" if gone else "guard" if intervention.was_frozen else "updater",
            end="gone" if gone else "running",
            error="ended while it was paused" if gone else vm.error,
        )
    if resumed_now is not None:
        called_at = resumed_now if called_at is None else called_at
        return msgspec.structs.replace(
            vm,
            called_at=called_at,
            frozen_at=vm.frozen_at if vm.frozen_at is not None else called_at,
            resumed_at=resumed_now,
            resumed_by="updater",
            end="running",
        )
    if vm.frozen_at is not None:
        return msgspec.structs.replace(vm, error="it was not frozen any more when the host updater came back")
    return vm


def _called_at(
    vm: VmPause, op: Operation, record: Intent | None, intervention: Intervention | None
) -> float | None:
    """The freeze call; where it was not recorded, an instant just before it: the pause was at most that long."""
    called_at = vm.called_at
    if called_at is None:
        called_at = (
            record.armed_at if record is not None else op.deadlines.started_at if op.deadlines else None
        )
    if called_at is not None and intervention is not None and intervention.frozen_after is not None:
        return max(called_at, intervention.frozen_after)
    return called_at


def _reason(vms: tuple[VmPause, ...], guard_why: str) -> str:
    by_guard = [vm.pause_s for vm in vms if vm.resumed_by == "guard"]
    if by_guard:
        return (
            f"host updater died while VMs were frozen; the pause guard resumed them after {max(by_guard):.1f} s "
            f"({guard_why})"
        )
    paused = [vm for vm in vms if vm.frozen_at is not None]
    if not paused:
        return "host updater died before anything was frozen"
    longest_s = max(vm.pause_s for vm in paused)
    return f"host updater died during the operation; the VMs were paused for {longest_s:.1f} s at most"


def _of_reboot(op: Operation, not_started: Mapping[str, str]) -> str:
    failed = "; ".join(f"VM {vm} was not started again: {why}" for vm, why in sorted(not_started.items()))
    if failed:
        return f"host updater died during the operation; {failed}"
    ran = any(run.started for run in op.runs)
    what = "the update may be half complete" if ran else "the update did not run"
    return (
        f"host updater died during the operation; every VM that was shut down was started again, and {what}"
    )


def _ended(op: Operation, code: ReasonCode, why: str) -> Operation:
    runs = tuple(
        run
        if run.outcome is not None
        else msgspec.structs.replace(run, outcome="interrupted" if run.started else "not_run")
        for run in op.runs
    )
    if not op.failure:
        op = msgspec.structs.replace(op, failure=why, codes=(code,))
    return msgspec.structs.replace(op, runs=runs, phase="ended", end="failed", wake_at=None)
