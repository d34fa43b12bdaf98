"""What an operation requests: the effects of ``machine``, which ``runner`` carries out. Pure vocabulary."""

from __future__ import annotations

import msgspec


class Persist(msgspec.Struct, frozen=True):
    """Write the phase to the journal, without waiting for the disk."""


class Arm(msgspec.Struct, frozen=True):
    """Arm the guard for all VMs of the operation."""

    deadline: float


class PrepareVms(msgspec.Struct, frozen=True):
    """Prepare what the method needs, while the VMs run."""

    vms: tuple[str, ...]


class SwapVms(msgspec.Struct, frozen=True):
    """Hand over the guests one after the other; do not begin with one after ``by``, nor after a failure."""

    by: float


class ShutDownVms(msgspec.Struct, frozen=True):
    """Have these VMs shut down in an orderly way, all at once, by this instant. Nothing is killed."""

    vms: tuple[str, ...]
    by: float


class KillVm(msgspec.Struct, frozen=True):
    """Kill a VM that was asked to shut down and did not, and have it gone by this instant."""

    vm: str
    by: float


class StartVms(msgspec.Struct, frozen=True):
    """Start these VMs again, all at once; one that is still shutting down is started as soon as it has ended."""

    vms: tuple[str, ...]


class FreezeVms(msgspec.Struct, frozen=True):
    """Freeze all VMs at once; do not even begin with one after ``by``."""

    by: float


class DigestVms(msgspec.Struct, frozen=True):
    """Digest the memory of these VMs, in the background: sampled pages first, then all of it where there is time."""

    vms: tuple[str, ...]
    until: float
    whole: frozenset[str] = frozenset()
    """Those whose whole memory is digested too."""


class CheckKernel(msgspec.Struct, frozen=True):
    """See whether the host can start this kernel under its VMs, and that it is the one that is loaded."""

    release: str


class LeaveKernel(msgspec.Struct, frozen=True):
    """Have the broker and the disk take what is known, then have the guard start the loaded kernel; not after ``by``."""

    by: float


class RunUpdate(msgspec.Struct, frozen=True):
    """Start the update, once for each key."""

    keys: tuple[str, ...]


class StopUpdate(msgspec.Struct, frozen=True):
    """End every run of the update that is left: terminate, or kill. Never wait for it."""

    kill: bool


class ResumeVms(msgspec.Struct, frozen=True):
    """Stop freezing and digesting; resume these VMs, and retry until they run."""

    vms: tuple[str, ...]


class Disarm(msgspec.Struct, frozen=True):
    """Notify the guard that the operation is over, and ask whether it fired."""

    untouched: tuple[str, ...] = ()
    """VMs to which nothing was done: one that is paused was paused by somebody else, and the guard is to forget it first."""


class PublishFrozen(msgspec.Struct, frozen=True):
    """Announce that a VM is paused."""

    vm: str


class PublishResumed(msgspec.Struct, frozen=True):
    """Announce that a VM runs again."""

    vm: str


class Finish(msgspec.Struct, frozen=True):
    """The operation has ended: its report is persisted and published."""


Effect = (
    Persist
    | Arm
    | PrepareVms
    | SwapVms
    | ShutDownVms
    | KillVm
    | StartVms
    | FreezeVms
    | DigestVms
    | CheckKernel
    | LeaveKernel
    | RunUpdate
    | StopUpdate
    | ResumeVms
    | Disarm
    | PublishFrozen
    | PublishResumed
    | Finish
)
