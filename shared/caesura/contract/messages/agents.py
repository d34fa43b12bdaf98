"""What an agent says, and the exchanges that measure its clock."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from caesura.contract.envelope import Message
from caesura.contract.messages.fields import (
    INTEGER_MOST,
    Count,
    ExitCode,
    Id,
    Nanoseconds,
    OptionalId,
    Record,
    Seconds,
    Text,
)
from caesura.contract.names import Name


class ClockSyncRequested(Message, frozen=True, kw_only=True):
    """First half of a four-timestamp exchange (RFC 5905 section 8): t1 on the guest's clock."""

    TYPE: ClassVar[str] = "caesura.clock-sync.requested.v1"

    vm: Name
    exchange: Id
    t1_ns: Nanoseconds


class ClockSyncAnswered(Message, frozen=True, kw_only=True):
    """Second half: t2 when the host received, t3 when it answered, on the host's clock."""

    TYPE: ClassVar[str] = "caesura.clock-sync.answered.v1"

    vm: Name
    host: Name
    exchange: Id
    t1_ns: Nanoseconds
    t2_ns: Nanoseconds
    t3_ns: Nanoseconds


class AgentPresence(Message, frozen=True, kw_only=True):
    """Whether a VM's agent is on the bus. ``boot_id`` lives in guest memory only."""

    TYPE: ClassVar[str] = "caesura.agent.presence.v1"

    vm: Name
    online: bool
    boot_id: Id
    clock: Literal["simulated", "system"] = "system"
    canary_bytes: Count = 0
    """Size of the guest memory that the agent holds and rewrites, to find lost pages after a pause; 0: none."""
    canary_writes: Count = 0
    """How many page writes it has made so far: fewer after a pause show that all memory is an older copy."""


class VmReady(Message, frozen=True, kw_only=True):
    """The agent's answer to a scheduled event: whether its prepare hook says the guest may be paused."""

    TYPE: ClassVar[str] = "caesura.vm.ready.v1"

    vm: Name
    event_id: Id
    ready: bool
    reason: Text = ""


class CanaryReport(Record, frozen=True, kw_only=True):
    """What the agent found when it compared every page of its canary after a pause."""

    pages: Count
    page_bytes: Annotated[int, Meta(gt=0, le=INTEGER_MOST)] = 4096
    bad_pages: Count = 0
    """Pages that do not have the content written last: lost, stale, swapped or damaged."""
    writes: Count = 0
    """How many page writes were made so far."""
    detail: Text = ""


class AgentClockSynced(Message, frozen=True, kw_only=True):
    """The agent measured its clock, stepped it if needed, and measured again."""

    TYPE: ClassVar[str] = "caesura.agent.clock-synced.v1"

    vm: Name
    boot_id: Id
    trigger: Literal["start", "resume", "periodic"]
    operation: OptionalId = ""
    synced: bool
    error_before_s: float | None = None
    error_after_s: float | None = None
    uncertainty_s: Seconds | None = None
    exchanges: Count = 0
    simulated: bool = False
    reason: Text = ""
    refused_step_s: float | None = None
    """Guest minus host, seconds: the clock is so far off that the agent does not step it outside a resume. None: nothing was refused."""
    canary: CanaryReport | None = None
    """After a resume, if the agent holds one: the same message is sent once more when its pages have been compared."""


class HookFinished(Message, frozen=True, kw_only=True):
    """A prepare or recover hook ended."""

    TYPE: ClassVar[str] = "caesura.hook.finished.v1"

    vm: Name
    hook: Literal["prepare", "recover"]
    event_id: OptionalId = ""
    outcome: Literal["succeeded", "failed", "timeout", "missing"]
    exit_code: ExitCode | None = None
    seconds: Seconds = 0.0
    output_tail: Text = ""
