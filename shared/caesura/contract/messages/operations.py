"""Commands to a host, and its reports."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from caesura.contract.envelope import Instant, Message
from caesura.contract.messages.fields import (
    EPOCH_MOST,
    MAX_BUDGET_S,
    MOST_PARTS,
    MOST_TARGETS,
    Budget,
    Count,
    ExitCode,
    Id,
    Method,
    OperationStatus,
    OptionalId,
    OptionalName,
    PartNumber,
    Positive,
    ProofCode,
    Record,
    Seconds,
    Text,
    UpdateDomain,
    VmState,
)
from caesura.contract.names import Name
from caesura.contract.reasons import Code


class OperationTarget(Record, frozen=True, kw_only=True):
    """One VM of an operation."""

    vm: Name
    set: Name
    update_domain: UpdateDomain
    event_id: OptionalId = ""


class StartOperation(Message, frozen=True, kw_only=True):
    """Start one operation on a host: apply the named update to these VMs by one method, or hold them paused.

    Names an update; never carries a command line.
    """

    TYPE: ClassVar[str] = "caesura.operation.start.v1"

    operation: Id
    epoch: Annotated[int, Meta(ge=1, le=EPOCH_MOST)]
    coordinator: Id
    host: Name
    rollout: Id
    wave: Count
    method: Method
    targets: Annotated[tuple[OperationTarget, ...], Meta(min_length=1, max_length=MOST_TARGETS)]
    update: OptionalName = ""
    hold_s: Annotated[float, Meta(ge=0, le=MAX_BUDGET_S)] = 0.0
    """Seconds to stay frozen when no update is named (freeze on demand)."""
    budget_s: Budget
    clock_bound_s: Positive = 0.1
    not_after: Instant
    """A host that reads the command after this time refuses it."""


class AbortOperation(Message, frozen=True, kw_only=True):
    """Abort this operation: resume its VMs if it runs, never start it if it has not begun."""

    TYPE: ClassVar[str] = "caesura.operation.abort.v1"

    operation: Id
    epoch: Annotated[int, Meta(ge=1, le=EPOCH_MOST)]
    coordinator: Id
    host: Name
    reason: Text = ""


class MemoryProof(Record, frozen=True, kw_only=True):
    """What was shown about the guest's memory. `held` and `broken` are authoritative; `proof` and `ok` are for readers of the first v1."""

    proof: Literal["digest", "heartbeat", "none"]
    """`digest`: of all pages, or one that differs. `heartbeat`: reported by the guest itself. `none`: also where only pages were sampled."""
    ok: bool
    """Whether nothing is `broken`."""
    detail: Text = ""
    held: tuple[ProofCode, ...] = ()
    """What was shown."""
    broken: tuple[ProofCode, ...] = ()
    """What was checked and does not hold: memory changed, or the guest rebooted."""


class VmResult(Record, frozen=True, kw_only=True):
    """What an operation did to one VM."""

    vm: Name
    set: Name
    update_domain: UpdateDomain
    state: VmState
    frozen: bool
    """Whether it was paused."""
    pause_s: Seconds = 0.0
    """Seconds on the host's monotonic clock, from just before the freeze to just after the resume."""
    resumed_by: Literal["updater", "guard", "nobody"] = "nobody"
    memory: MemoryProof | None = None
    error: Text = ""
    detail: Text = ""
    """After a swap or replace: what runs the guest now, and what ran it before."""


class UpdateOutcome(Record, frozen=True, kw_only=True):
    """How the update itself ended."""

    update: OptionalName
    outcome: Literal["succeeded", "failed", "timeout", "interrupted", "not_run"]
    exit_code: ExitCode | None = None
    seconds: Seconds = 0.0
    output_tail: Text = ""


class OperationReported(Message, frozen=True, kw_only=True):
    """Status of a commanded operation: accepted while it runs, then exactly one of the others."""

    TYPE: ClassVar[str] = "caesura.operation.reported.v1"

    operation: Id
    host: Name
    epoch: Annotated[int, Meta(ge=0, le=EPOCH_MOST)]
    rollout: OptionalId = ""
    wave: Count = 0
    status: OperationStatus
    reason: Text = ""
    codes: tuple[Code, ...] = ()
    """The codes of everything in `reason`, each once; the first is why it ended."""
    vms: tuple[VmResult, ...] = ()
    """All of them, or none where there are parts."""
    vm_parts: Annotated[int, Meta(ge=0, le=MOST_PARTS)] = 0
    """The number of parts, on topics of their own, with the results of the VMs."""
    update: UpdateOutcome | None = None
    overhead_s: Seconds | None = None
    """Longest pause minus the update's own seconds; a swap's update runs before the pause and is not subtracted."""
    at: Instant


class ReportPart(Message, frozen=True, kw_only=True):
    """The results of some of an operation's VMs, where they do not fit into the report."""

    TYPE: ClassVar[str] = "caesura.operation.report-part.v1"

    host: Name
    operation: Id
    part: PartNumber
    vms: Annotated[tuple[VmResult, ...], Meta(max_length=MOST_TARGETS)]
