"""An operation of this host and its parts, as ``machine``, ``resume`` and ``swap`` decide on it. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

from caesura.contract.messages import Method
from caesura.contract.reasons import ReasonCode
from caesura.lifecycle.budget import SHUTDOWN_S
from caesura.runtime.errors import CaesuraError
from caesura_host_updater.operation.effects import Effect
from caesura_host_updater.operation.inputs import Outcome
from caesura_host_updater.operation.pause_deadlines import PauseDeadlines

Phase = Literal[
    "accepted",
    "preparing",
    "arming",
    "swapping",
    "stopping",
    "freezing",
    "frozen",
    "updating",
    "updated",
    "leaving",
    "starting",
    "resuming",
    "resumed",
    "ended",
]
BEFORE_SAVING: frozenset[Phase] = frozenset(("accepted", "updating", "preparing", "arming"))
"""The phases of an operation by method kexec in which nothing is paused: its update runs first."""
End = Literal["completed", "failed", "cancelled"]


class UnexpectedEvent(CaesuraError):
    """An event that cannot happen in this phase: a bug in the shell, never a late message."""

    def __init__(self, phase: str, event: object, wanted: str) -> None:
        self.phase = phase
        super().__init__(f"{type(event).__name__} in phase {phase!r}: it belongs to phase {wanted!r}")


class VmPause(msgspec.Struct, frozen=True, kw_only=True):
    """One VM of an operation. ``name=``: what journals call the field, those of earlier versions, too."""

    vm: str
    set: str
    update_domain: int
    event_id: str = ""
    boot_id: str = ""
    """Its agent's boot id before the pause, empty if none was received."""
    kernel_boot_id: str = ""
    """The guest kernel's before the pause, as read through the driver; empty if it could not be read."""
    can_digest: bool = msgspec.field(default=False, name="digestible")
    """Whether a digest of all its memory can be taken."""
    can_sample: bool = msgspec.field(default=False, name="sampleable")
    """Whether a digest of sampled pages of its memory can be taken."""
    no_digest: str = ""
    """Why neither can be taken."""
    canary_writes: int = 0
    """Pages of its canary that its agent had written by its last message before the pause; 0: it holds none."""
    called_at: float | None = None
    """Just before its freeze call; None: it was never asked to freeze."""
    frozen_at: float | None = None
    """When it was confirmed to be paused."""
    resumed_at: float | None = None
    end: Literal["", "running", "gone", "left"] = ""
    """``left``: it is paused, or runs elsewhere, through somebody else, who has to resume it."""
    resumed_by: Literal["updater", "guard", "nobody"] = "nobody"
    resume_published: bool = msgspec.field(default=False, name="told")
    """Whether its `resumed` was published."""
    digest_before: str = ""
    digest_after: str = ""
    digest_note: str = ""
    """Why there is no digest."""
    sampled_before: str = ""
    sampled: Literal["", "equal", "differs"] = ""
    """The result for the sampled pages: in a swap, of both processes."""
    sampled_note: str = ""
    """Why they were not compared, or where they differ."""
    digesting: bool = False
    error: str = ""
    prepared: bool = False
    """What its method needs is ready (swap, replace)."""
    swap_finished: bool = False
    """Its swap is complete, failed, or was not begun."""
    detail: str = ""
    """What runs the guest now, and what ran it before."""
    shutdown_at: float | None = None
    """When it was asked to shut down (reboot)."""
    down_at: float | None = None
    """When it had shut down."""
    killed: bool = False
    """Whether it did not, and was to be killed."""
    up: bool = False
    """It runs again, or still, after it was asked to shut down; or it is known that it does not."""

    @property
    def pause_s(self) -> float:
        """Seconds it was paused, at most."""
        if self.called_at is None or self.resumed_at is None:
            return 0.0
        return max(0.0, self.resumed_at - self.called_at)


class UpdateRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the update. ``key``: the VM for scope vm, empty for scope host."""

    key: str = ""
    started: bool = False
    outcome: Outcome | None = None
    exit_code: int | None = None
    seconds: float = 0.0
    output_tail: str = ""


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """An operation and its phase."""

    operation: str
    method: Method
    budget_s: float
    hold_s: float = 0.0
    update: str = ""
    update_version: str = ""
    update_timeout_s: float = 0.0
    shutdown_s: float = SHUTDOWN_S
    """What a VM may take to shut down (reboot)."""
    kill_after_timeout: bool = False
    """Whether one that takes longer is killed; else it fails the operation before the update."""
    kernel_release: str = ""
    """The kernel that runs afterwards (kexec)."""
    kernel_checked: bool = False
    """Whether it is known if the host can start it; a failure says that it cannot."""
    vms: tuple[VmPause, ...]
    runs: tuple[UpdateRun, ...] = ()
    phase: Phase = "accepted"
    deadlines: PauseDeadlines | None = msgspec.field(default=None, name="schedule")
    """Journals have it by its older name."""
    failure: str = ""
    """The first failure."""
    codes: tuple[ReasonCode, ...] = ()
    """Of ``failure``."""
    aborted: bool = False
    wake_at: float | None = None
    """When the machine wants ``TimePassed``."""
    kill_at: float | None = None
    """The update was asked to end and is killed at this instant."""
    stop_outcome: Outcome = "interrupted"
    guard_why: str = ""
    """Why the guard fired, if it did."""
    end: End | None = None

    @property
    def paused(self) -> bool:
        """Whether a VM of it was shown to be paused."""
        return any(vm.frozen_at is not None for vm in self.vms)

    @property
    def touched(self) -> bool:
        """Whether anything was done to a VM or to the host."""
        return (
            self.paused
            or any(run.started for run in self.runs)
            or any(vm.shutdown_at is not None for vm in self.vms)
        )


Decision = tuple[Operation, tuple[Effect, ...]]
"""The next state and what to do."""


def changed(op: Operation, **changes: object) -> Operation:
    """The operation with these fields changed."""
    return msgspec.structs.replace(op, **changes)


def changed_vm(op: Operation, name: str, **changes: object) -> Operation:
    """The operation with these fields of one VM changed."""
    vms = tuple(msgspec.structs.replace(vm, **changes) if vm.vm == name else vm for vm in op.vms)
    return changed(op, vms=vms)


def vm_of(op: Operation, name: str) -> VmPause:
    """One VM of the operation."""
    return next(vm for vm in op.vms if vm.vm == name)


def failed(op: Operation, code: ReasonCode, why: str) -> Operation:
    """The operation with its first failure recorded."""
    return op if op.failure else changed(op, failure=why, codes=(code,))


def deadlines_of(op: Operation) -> PauseDeadlines:
    """The instants of its budget. Raises UnexpectedEvent before there is one."""
    if op.deadlines is None:
        raise UnexpectedEvent(op.phase, op, "arming")
    return op.deadlines
