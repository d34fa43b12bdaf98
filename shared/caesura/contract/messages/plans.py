"""What a rollout would do: its policy, its waves, and the VMs that it leaves out."""

from __future__ import annotations

from typing import Literal

from caesura.contract.messages.fields import (
    MAX_BUDGET_S,
    Budget,
    Count,
    DomainKey,
    EventType,
    FaultDomain,
    Method,
    OptionalName,
    Positive,
    ProofCode,
    Record,
    Scope,
    Seconds,
    Text,
    UpdateDomain,
)
from caesura.contract.names import Name
from caesura.contract.reasons import Code


class Policy(Record, frozen=True, kw_only=True):
    """How careful a rollout is. The defaults are Azure's minimum notice and this suite's invariants."""

    notice_s: Positive = 900.0
    """Seconds from publication to NotBefore; Azure's minimum for Freeze and Reboot is 900 s."""
    budget_s: Budget = MAX_BUDGET_S
    soak_s: Seconds = 0.0
    """Seconds of quiet health after a wave before the next one is announced."""
    clock_bound_s: Positive = 0.1
    """Seconds that a guest clock may be off after its sync."""
    verify_timeout_s: Positive = 60.0
    """Seconds after the last report within which all VMs must be verified healthy."""
    on_not_ready: Literal["halt", "proceed"] = "halt"
    """What to do about an agent whose prepare hook failed, or that did not answer by NotBefore."""
    on_unsynced: Literal["halt", "proceed"] = "halt"
    """What to do about a VM whose clock could not be corrected in time."""
    on_unproven: Literal["halt", "proceed"] | None = None
    """What to do about a VM for whose memory neither an equal digest nor an equal canary was shown after its pause; that it did not reboot is not
    enough. None: `halt` for the methods swap and replace, where another process takes the memory over, `proceed` for freeze. With `halt`
    a plan refuses VMs for which no such proof is possible."""
    domain_key: DomainKey = "update_domain"
    allow_reboot: bool = False
    event_source: Literal["Platform", "User"] = "Platform"
    """Shown as the EventSource of its events. Clients approve what a user ordered at once, which ends the notice."""


SkipCode = Literal["", "stopped", "undefined", "excluded", "installed", "contested"]
"""Why a plan does nothing with a VM; empty where it does something. `undefined`: its host does not define the update.
`installed`: it has it already. `contested`: more than one host names it."""


class PlannedVm(Record, frozen=True, kw_only=True):
    """What happens to one VM, and why a less invasive method is not enough."""

    vm: Name
    set: Name
    update_domain: UpdateDomain
    fault_domain: FaultDomain = 0
    host: Name
    method: Method
    reason: Text
    agent: bool = True
    clock: Literal["simulated", "system", "none"] = "system"
    """``none``: it has no clock of its own, or none that can be measured, and gets no verdict on one."""
    proofs: tuple[ProofCode, ...] = ()
    """What will be shown about its memory after the pause; empty: nothing."""
    skip: SkipCode = ""


class PlannedWave(Record, frozen=True, kw_only=True):
    """The VMs handled together: from every set, VMs of one domain only."""

    wave: Count
    domains: dict[str, int]
    """Maps a set name to the one domain of it that this wave touches."""
    hosts: tuple[Name, ...]
    vms: tuple[PlannedVm, ...]
    canary: bool = False
    """Whether it runs first and alone, so that the rollout halts early if it fails."""


class Refusal(Record, frozen=True, kw_only=True):
    """Why a plan cannot be carried out, naming the obstacle."""

    subject: Text
    reason: Text
    code: Code = "unexplained"
    """Always written; a coordinator from before 0.1.0 had no codes."""


class Plan(Record, frozen=True, kw_only=True):
    """Waves in order, what is skipped, what is refused, the expected duration."""

    update: OptionalName
    event_type: EventType = "Freeze"
    waves: tuple[PlannedWave, ...] = ()
    skipped: tuple[PlannedVm, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    estimate_s: Seconds = 0.0
    expected_pause_s: Seconds = 0.0
    outside_pause_s: Seconds = 0.0
    """Upper bound in seconds on a host's work while its VMs run: the time of a live update or a swap itself."""
    hold_s: Seconds = 0.0
    scope: Scope = "host"
    max_hosts: Count = 0
    """The most hosts of one wave; 0: only the domains of the sets limit it."""
    max_hosts_by_default: bool = False
    """`max_hosts` is a default, not from the request: it counts only hosts with VMs that are in no set."""


class Selection(Record, frozen=True, kw_only=True):
    """The VMs that a request selects. All lists empty: everything."""

    sets: tuple[Name, ...] = ()
    hosts: tuple[Name, ...] = ()
    vms: tuple[Name, ...] = ()


class Limits(Record, frozen=True, kw_only=True):
    """How much of the fleet a rollout may touch at once, and what it leaves out."""

    max_hosts: Count = 0
    """The most hosts of one wave. 0: of the hosts with VMs in no set, a tenth of all that are planned and at least one;
    where every VM is in a set, its domains are the limit."""
    canary_host: OptionalName = ""
    """This host runs first and alone."""
    canary_count: Count = 0
    """This many hosts run first and alone, from one domain of each set; 0: none."""
    exclude_hosts: tuple[Name, ...] = ()
    exclude_sets: tuple[Name, ...] = ()
    """An update of scope host leaves out every host that holds a VM of such a set."""
    exclude_vms: tuple[Name, ...] = ()
    """An update of scope host leaves out the VM's whole host."""
    again: bool = False
    """Apply it even where it is already installed."""
