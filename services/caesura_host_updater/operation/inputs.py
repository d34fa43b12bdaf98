"""What can happen to an operation: the inputs of ``machine``. Pure vocabulary."""

from __future__ import annotations

from typing import Literal

import msgspec

from caesura.contract.reasons import ReasonCode

Outcome = Literal["succeeded", "failed", "timeout", "interrupted", "not_run"]


class Start(msgspec.Struct, frozen=True):
    """The intent is on disk: begin."""


class Armed(msgspec.Struct, frozen=True):
    """The guard has it on disk."""


class ArmRefused(msgspec.Struct, frozen=True):
    """The guard refused, or did not answer; or the pause markers could not be written. ``what``: which of them."""

    why: str
    what: str = "the pause guard could not be armed"


class VmPrepared(msgspec.Struct, frozen=True):
    """What its swap or replace needs is ready."""

    vm: str


class VmNotPrepared(msgspec.Struct, frozen=True):
    """It cannot be swapped or replaced. It was not paused."""

    vm: str
    why: str


class VmSwapped(msgspec.Struct, frozen=True):
    """A new process runs the guest."""

    vm: str
    called_at: float
    frozen_at: float
    resumed_at: float
    detail: str = ""
    sampled: bool | None = None
    """Whether sampled pages of its memory were the same in both processes; None: not compared, ``sampled_note`` says why."""
    sampled_note: str = ""


class VmNotSwapped(msgspec.Struct, frozen=True):
    """The guest stays where it was. ``called_at`` None: it was not touched.

    ``frozen_at`` and ``resumed_at``: the pause that the try cost, as far as it is known.
    """

    vm: str
    called_at: float | None
    why: str
    frozen_at: float | None = None
    resumed_at: float | None = None
    differs: str = ""
    """Where the memory of the new process differed, if that was the reason."""


class VmShutDown(msgspec.Struct, frozen=True):
    """It has shut down by itself, and nothing of it runs. ``detail``: by what it was asked."""

    vm: str
    at: float
    detail: str = ""


class VmNotShutDown(msgspec.Struct, frozen=True):
    """It did not shut down in time, or could not be asked, or what was killed did not end."""

    vm: str
    why: str
    asked: bool = False
    """Whether it was asked, and had its time."""


class VmStarted(msgspec.Struct, frozen=True):
    """It runs. ``again`` False: it had never ended."""

    vm: str
    at: float
    again: bool = True


class VmNotStarted(msgspec.Struct, frozen=True):
    """It could not be started, or is not up."""

    vm: str
    why: str


class KernelReady(msgspec.Struct, frozen=True):
    """The host can start the loaded kernel under its VMs, and it is the update's."""


class KernelNotReady(msgspec.Struct, frozen=True):
    """It cannot, or another one is loaded. Nothing was paused."""

    why: str


class NotLeft(msgspec.Struct, frozen=True):
    """The guard could not start the other kernel: this one still runs."""

    why: str


class VmFroze(msgspec.Struct, frozen=True):
    """Confirmed to be paused."""

    vm: str
    called_at: float
    at: float


class VmNotFrozen(msgspec.Struct, frozen=True):
    """It is not paused. ``called_at`` None: it was not even asked."""

    vm: str
    called_at: float | None
    why: str


class VmLost(msgspec.Struct, frozen=True):
    """It ended, or runs although it should be paused (``thawed``)."""

    vm: str
    thawed: bool
    why: str


class Sampled(msgspec.Struct, frozen=True):
    """A digest of sampled pages of its memory, or why there is none. ``Digested`` follows, which ends the wait."""

    vm: str
    digest: str
    note: str = ""


class Digested(msgspec.Struct, frozen=True):
    """A digest of all its memory, or why there is none."""

    vm: str
    digest: str
    note: str = ""


class UpdateEnded(msgspec.Struct, frozen=True):
    """A run of the update ended by itself or on request."""

    key: str
    outcome: Outcome
    exit_code: int | None
    seconds: float
    output_tail: str


class AbortReceived(msgspec.Struct, frozen=True):
    """An operation is to be aborted, or the host updater is stopping."""

    code: ReasonCode
    why: str


class GuardLost(msgspec.Struct, frozen=True):
    """The guard's connection ended."""


class ResumeEnded(msgspec.Struct, frozen=True):
    """Confirmed to run again, or gone, or left to somebody else who paused it."""

    vm: str
    at: float
    end: Literal["running", "gone", "left"]
    was_held: bool = False
    """It was paused, at least partly, although its freeze had not been confirmed."""
    detail: str = ""
    """What runs the guest now and what ran it before, where that changed; why it was left."""


class GuardIntervention(msgspec.Struct, frozen=True):
    """What the guard did to one VM. Instants as in ``caesura_vmcontrol.intent.Intervention``."""

    vm: str
    was_frozen: bool
    frozen_after: float | None
    running_at: float | None


class Disarmed(msgspec.Struct, frozen=True):
    """The guard released the operation, or could not be asked. ``why``: why it had fired; empty if it had not."""

    why: str = ""
    interventions: tuple[GuardIntervention, ...] = ()


class TimePassed(msgspec.Struct, frozen=True):
    """Time has passed."""


Event = (
    Start
    | Armed
    | ArmRefused
    | VmPrepared
    | VmNotPrepared
    | VmSwapped
    | VmShutDown
    | VmNotShutDown
    | VmStarted
    | VmNotStarted
    | VmNotSwapped
    | KernelReady
    | KernelNotReady
    | NotLeft
    | VmFroze
    | VmNotFrozen
    | VmLost
    | Sampled
    | Digested
    | UpdateEnded
    | AbortReceived
    | GuardLost
    | ResumeEnded
    | Disarmed
    | TimePassed
)
