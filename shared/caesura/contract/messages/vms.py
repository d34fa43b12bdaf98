"""What happened to a VM: paused, resumed, its clock corrected; and its current state."""

from __future__ import annotations

from typing import ClassVar, Literal

from caesura.contract.envelope import Instant, Message
from caesura.contract.messages.fields import (
    Budget,
    Id,
    Method,
    OptionalId,
    Record,
    Seconds,
    Text,
    UpdateDomain,
    VmState,
)
from caesura.contract.messages.operations import MemoryProof
from caesura.contract.names import Name


class VmFrozen(Message, frozen=True, kw_only=True):
    """A VM is paused from now on, for at most the budget."""

    TYPE: ClassVar[str] = "caesura.vm.frozen.v1"

    vm: Name
    host: Name
    set: Name
    update_domain: UpdateDomain
    operation: Id
    event_id: OptionalId = ""
    method: Method
    budget_s: Budget
    at: Instant


class VmResumed(Message, frozen=True, kw_only=True):
    """A VM runs again."""

    TYPE: ClassVar[str] = "caesura.vm.resumed.v1"

    vm: Name
    host: Name
    set: Name
    update_domain: UpdateDomain
    operation: Id
    event_id: OptionalId = ""
    method: Method
    pause_s: Seconds
    budget_s: Budget
    within_budget: bool
    resumed_by: Literal["updater", "guard"]
    memory: MemoryProof | None = None
    at: Instant


class LastPause(Record, frozen=True, kw_only=True):
    """The last pause of a VM that ended."""

    operation: Id
    method: Method
    pause_s: Seconds
    within_budget: bool
    resumed_by: Literal["updater", "guard"]
    at: Instant
    """When it ran again."""


class VmStatus(Message, frozen=True, kw_only=True):
    """The current state of a VM, for dashboards and home automation. Retained; removed when its host does not have it any more.

    The facts `frozen` and `resumed` report each pause once; this is the current state, for any reader at any time.
    """

    TYPE: ClassVar[str] = "caesura.vm.status.v1"

    vm: Name
    host: Name
    set: Name
    update_domain: UpdateDomain
    state: VmState
    state_detail: Text = ""
    paused_since: Instant | None = None
    """Since when Caesura has it paused. None: Caesura has not paused it, though somebody else may have."""
    operation: OptionalId = ""
    """By which operation it is paused."""
    last_pause: LastPause | None = None
    at: Instant
    """When any of this last changed."""


class VmClockSynced(Message, frozen=True, kw_only=True):
    """The host's verdict on a VM's clock after a resume. ``synced`` false: flagged as unsynced."""

    TYPE: ClassVar[str] = "caesura.vm.clock-synced.v1"

    vm: Name
    host: Name
    set: Name
    update_domain: UpdateDomain
    operation: OptionalId = ""
    synced: bool
    by: Literal["agent", "driver", "nobody"]
    error_before_s: float | None = None
    """Guest wall clock minus host wall clock, seconds, before the step."""
    error_after_s: float | None = None
    uncertainty_s: Seconds | None = None
    """Half the round trip of the best exchange: the true error lies within plus or minus this."""
    simulated: bool = False
    memory: MemoryProof | None = None
    """What was shown from inside the guest: its boot id, and the agent's canary."""
    reason: Text = ""
    at: Instant
