"""Every message body that crosses the bus, and the records inside them.

Units are part of the names: ``_s`` seconds, ``_ns`` nanoseconds, ``_bytes`` bytes. Wall-clock instants are
RFC 3339 in UTC. Unknown members are ignored on decode, so v1 can grow.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from caesura.contract.envelope import Instant, Message
from caesura.contract.names import Name
from caesura.contract.reasons import Code

MAX_BUDGET_S = 30.0  # s: the seed's promise, "resumed within 30 seconds of being paused"

EPOCH_MOST = 2**53 - 1
"""Integers that every JSON reader (RFC 8259, section 6) and SQLite represent exactly."""

MOST_TARGETS = 1024
"""The most VMs of one command, hence of one operation of a host, and hence of one host."""

VMS_IN_PART = 4
"""The least number of VMs in every part of an inventory or report but the last: a VM with the longest texts takes 50 kB."""

MOST_PARTS = MOST_TARGETS // VMS_IN_PART
"""The most parts of one inventory, plan or report."""

SECONDS_MOST = 1e9
"""Some 31 years: the sum with an instant must still be a valid instant."""

Count = Annotated[int, Meta(ge=0, le=EPOCH_MOST)]
Nanoseconds = Annotated[int, Meta(ge=0, le=2**63 - 1, description="Since 1970, on a wall clock.")]
ExitCode = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Epoch = Annotated[int, Meta(ge=0, le=EPOCH_MOST)]
Seconds = Annotated[float, Meta(ge=0, le=SECONDS_MOST)]
Positive = Annotated[float, Meta(gt=0, le=SECONDS_MOST)]
Budget = Annotated[
    float, Meta(gt=0, le=MAX_BUDGET_S, description="Seconds; the most a pause may last; at most 30.")
]
Id = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_-]{1,64}\Z",
        description="An identifier: letters, digits, `_` and `-`, 1 to 64 of them.",
    ),
]
"""It becomes a file name, part of an environment, a log line: so it is limited to what a topic level allows."""
OptionalId = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z0-9_-]{0,64}\Z", description="An identifier, or empty where there is none."),
]
OptionalName = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9_-]{0,63}\Z", description="A name, or empty where there is none.")
]
Text = Annotated[str, Meta(max_length=4096)]
MessageType = Annotated[
    str, Meta(min_length=1, max_length=128, description="A CloudEvents `type`, as in the message's envelope.")
]
Etag = Annotated[
    str,
    Meta(pattern=r"^[0-9a-f]{12}\Z", description="Opaque; changes whenever the content changes, as in HTTP."),
]
PartNumber = Annotated[int, Meta(ge=1, le=MOST_PARTS)]
UpdateDomain = Annotated[int, Meta(ge=0, le=19)]
FaultDomain = Annotated[int, Meta(ge=0, le=2)]

Method = Literal["live", "swap", "freeze", "replace", "reboot", "skip"]
Impact = Literal["none", "pause", "reboot"]
Scope = Literal["vm", "host"]
DomainKey = Literal["update_domain", "fault_domain"]
EventType = Literal["Freeze", "Reboot", "Redeploy", "Preempt", "Terminate"]
"""As in Azure's Scheduled Events. Caesura announces Freeze and Reboot; the others are reserved for later."""
EventStatus = Literal["scheduled", "started", "completed", "cancelled", "failed"]
VmState = Literal["running", "paused", "stopped", "unknown"]
RolloutStatus = Literal["running", "aborting", "halted", "completed", "aborted"]
WaveStatus = Literal[
    "pending", "scheduled", "started", "verifying", "soaking", "completed", "failed", "cancelled"
]
OperationStatus = Literal["accepted", "refused", "completed", "failed", "cancelled"]
ProofCode = Literal["not_rebooted", "canary_equal", "sampled_digest_equal", "digest_equal"]
"""What can be shown about a guest's memory after a pause; empty: nothing was shown.

`not_rebooted`: the boot id is the same as before the pause. It shows that the guest did not reboot and says nothing about any
other page. `canary_equal`: every page that the agent holds and rewrites has the content written last. `sampled_digest_equal`: some
pages, chosen at random for the operation, have the same digest at the pause's beginning and end; in a swap: in the old and in the
new process. `digest_equal`: the same for all pages of the guest's memory file.
"""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The base of the records inside message bodies."""


# --- inventory -------------------------------------------------------------------------------------------


class VmRecord(Record, frozen=True, kw_only=True):
    """A VM as its host knows it. ``methods`` lists what the driver can do with it; ``methods_missing`` says why not."""

    vm: Name
    set: Name
    update_domain: UpdateDomain
    fault_domain: FaultDomain = 0
    state: VmState
    state_detail: Text = ""
    """Details of the state, for people: who paused it, if that was not Caesura, and how to resume it."""
    methods: tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,63}\Z")], ...] = ()
    """Open on the wire: a host lists everything it can do, and a reader ignores what it does not know (ADR 14)."""
    methods_missing: dict[str, str] = {}
    clock: Literal["simulated", "system", "none"] = "none"
    agent: bool = True
    """Whether an agent is expected to answer in this VM."""
    proofs: dict[str, tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}\Z")], ...]] | None = None
    """Maps a method to what can be shown about the VM's memory after a pause by it: proof codes, open on the wire as `methods` is. None: the host
    updater does not say."""
    no_digest: Text = ""
    """Why the host cannot take a digest of its memory; empty if it can."""


VmmChange = Literal["", "beside", "instead"]
"""What an update does to the VMM (the QEMU binary and its libraries): nothing; it installs a new one beside the one that
runs (method swap); the old one must not run during the update (method replace)."""


class UpdateRecord(Record, frozen=True, kw_only=True):
    """An update that this host knows how to apply. The command line stays on the host."""

    update: Name
    version: Annotated[str, Meta(max_length=64)] = ""
    impact: Impact
    scope: Scope
    expected_s: Seconds
    timeout_s: Positive
    description: Text = ""
    vmm: VmmChange = ""


class RefusedUpdate(Record, frozen=True, kw_only=True):
    """A file in `updates.d` that cannot be used, and why; the others remain usable."""

    file: Text
    line: Count = 0
    reason: Text
    code: Code = "update_unusable"


class InstalledUpdate(Record, frozen=True, kw_only=True):
    """An update that a host already has in the version that it defines: plans skip it there, unless it is requested again."""

    update: Name
    version: Annotated[str, Meta(max_length=64)] = ""
    vms: tuple[Name, ...] = ()
    """The VMs that have it, where not all of the host's do (scope vm). Empty: the whole host has it."""
    at: Instant | None = None
    """When it last succeeded here. None: only the update's own command (`installed`) says that it is installed."""


class HostInventory(Message, frozen=True, kw_only=True):
    """What a host has: its VMs with their sets and domains, its updates, the operation under way.

    Its VMs are listed here or, where they do not fit into one message, in parts on topics of their own.
    """

    TYPE: ClassVar[str] = "caesura.host.inventory.v1"

    host: Name
    driver: Name
    driver_detail: Text = ""
    """How the driver works here, for people: the freezer, or QEMU's version and accelerator."""
    epoch: Annotated[int, Meta(ge=0, le=EPOCH_MOST)]
    coordinator: OptionalId = ""
    vms: tuple[VmRecord, ...]
    """All of them, or none where there are parts."""
    part_etags: Annotated[tuple[Etag, ...], Meta(max_length=MOST_PARTS)] = ()
    """Etags of the parts 1, 2 and so on. The inventory is complete with the parts of exactly these etags; others belong to an older one or to
    the next."""
    updates: tuple[UpdateRecord, ...] = ()
    refused_updates: tuple[RefusedUpdate, ...] = ()
    operation: OptionalId = ""
    """The operation under way, empty when idle."""
    guard: Literal["ready", "armed", "absent"] = "absent"
    refused_epoch: Text = ""
    """Why the epoch that was announced last is not obeyed, if it is too far above the current one."""
    installed: tuple[InstalledUpdate, ...] = ()
    """Which of `updates` it has already."""
    commands: tuple[MessageType, ...] = ()
    """Types of the commands that its host updater reads. A coordinator sends no command to a host that does not list the types it would
    need. Empty: a host updater from before 0.1.0."""


class InventoryPart(Message, frozen=True, kw_only=True):
    """Some of a host's VMs, where they do not fit into its inventory. Retained; removed when there are fewer parts."""

    TYPE: ClassVar[str] = "caesura.host.inventory-part.v1"

    host: Name
    part: PartNumber
    etag: Etag
    vms: Annotated[tuple[VmRecord, ...], Meta(max_length=MOST_TARGETS)]


class HostPresence(Message, frozen=True, kw_only=True):
    """Whether a host updater is on the bus. `offline` during a pause does not mean dead."""

    TYPE: ClassVar[str] = "caesura.host.presence.v1"

    host: Name
    online: bool
    instance: Id


# --- rollouts --------------------------------------------------------------------------------------------


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


class FailedUpdate(Record, frozen=True, kw_only=True):
    """How the update failed on one host of a wave."""

    host: Name
    outcome: Literal["failed", "timeout", "interrupted"]
    exit_code: ExitCode | None = None
    output_tail: Text = ""
    """The end of its output, unchanged: the reader has to escape control characters. Empty: there was none, or it
    did not fit, or the update says that its output stays on the host."""


class WaveState(Message, frozen=True, kw_only=True):
    """Where a wave is. Retained, one message per wave, until a newer rollout has ended."""

    TYPE: ClassVar[str] = "caesura.wave.state.v1"

    rollout: Id
    wave: Count
    etag: Etag
    status: WaveStatus
    domains: dict[str, int]
    hosts: tuple[Name, ...]
    vms: tuple[Name, ...]
    events: dict[str, str] = msgspec.field(default_factory=dict)
    """Maps a set name to the id of its scheduled event."""
    not_before: Instant | None = None
    approved: tuple[Name, ...] = ()
    """Sets whose event was approved."""
    started_at: Instant | None = None
    ended_at: Instant | None = None
    reason: Text = ""
    """Why it failed or was cancelled, or what it waits for."""
    codes: tuple[Code, ...] = ()
    """The codes of everything in `reason`, each once."""
    failed_updates: tuple[FailedUpdate, ...] = ()


class RolloutState(Message, frozen=True, kw_only=True):
    """A rollout: what, how, where it is. Retained, one message per rollout; its waves have messages of their own."""

    TYPE: ClassVar[str] = "caesura.rollout.state.v1"

    rollout: Id
    update: OptionalName
    hold_s: Seconds = 0.0
    status: RolloutStatus
    reason: Text = ""
    codes: tuple[Code, ...] = ()
    """The codes of everything in `reason`, each once."""
    policy: Policy
    sets: tuple[Name, ...]
    wave_count: Count
    waves_completed: Count = 0
    current_wave: Count | None = None
    """The first wave that is not completed. None: all are completed."""
    current_status: WaveStatus | None = None
    """The state of that wave."""
    wave_etags: tuple[Etag, ...] = ()
    """Etags of the waves in order: together with the wave states of exactly these etags this is the rollout at one moment. Empty: newer rollouts
    have ended since, and its waves are no longer retained."""
    estimate_s: Seconds = 0.0
    requested_by: OptionalName = ""
    created_at: Instant
    ended_at: Instant | None = None


class WaveChanged(Message, frozen=True, kw_only=True):
    """A wave changed its state: the fact for annotations and logs."""

    TYPE: ClassVar[str] = "caesura.wave.changed.v1"

    rollout: Id
    wave: Count
    status: WaveStatus
    domains: dict[str, int]
    hosts: tuple[Name, ...] = ()
    reason: Text = ""
    codes: tuple[Code, ...] = ()
    at: Instant


class CoordinatorPresence(Message, frozen=True, kw_only=True):
    """Which coordinator leads, with which epoch. Hosts refuse an epoch lower than the highest they have seen."""

    TYPE: ClassVar[str] = "caesura.coordinator.presence.v1"

    coordinator: Id
    epoch: Annotated[int, Meta(ge=0, le=EPOCH_MOST)]
    online: bool
    commands: tuple[MessageType, ...] = ()
    """Types of the commands that it sends to hosts. A host does not obey a coordinator whose commands it would not receive, and says so
    in its inventory. Empty: a coordinator from before 0.1.0."""


MOST_RIVALS = 16


class VmOwner(Message, frozen=True, kw_only=True):
    """Which host a VM belongs to. Retained; removed when no host names the VM any more. Only what this host says about the VM counts."""

    TYPE: ClassVar[str] = "caesura.vm.owner.v1"

    vm: Name
    host: OptionalName
    """Empty: several hosts name it and none has it on record, so it does not belong to any host."""
    epoch: Annotated[int, Meta(ge=0, le=EPOCH_MOST)]
    """Epoch of the coordinator that made the record: of two records, the one with the higher epoch is newer."""
    contested_by: Annotated[tuple[Name, ...], Meta(max_length=MOST_RIVALS)] = ()
    """Hosts that name the VM although it does not belong to them."""


# --- scheduled events ------------------------------------------------------------------------------------


class ScheduledEvent(Record, frozen=True, kw_only=True):
    """One scheduled event of a set, open (scheduled or started)."""

    event_id: Id
    event_type: EventType
    status: Literal["scheduled", "started"]
    resources: tuple[Name, ...]
    host: OptionalName = ""
    """The host concerned; empty: all hosts of its resources, as for every event today."""
    not_before: Instant
    description: Text = ""
    source: Literal["Platform", "User"] = "Platform"
    duration_s: Annotated[int, Meta(ge=-1, le=EPOCH_MOST)] = -1
    """Expected seconds of interruption; 0 none, -1 unknown."""
    approved: bool = False
    rollout: OptionalId = ""
    wave: Count = 0


class SetDocument(Message, frozen=True, kw_only=True):
    """The document of a set: its open events and the incarnation, which rises with every change that a workload sees. Retained."""

    TYPE: ClassVar[str] = "caesura.set.document.v1"

    set: Name
    incarnation: Count
    revision: Count = 0
    """Rises with every change that only services see, such as a host's part in an event; starts at 0 with each incarnation. Of two documents,
    the one with the higher incarnation, then revision, is newer."""
    events: tuple[ScheduledEvent, ...]


class EventChanged(Message, frozen=True, kw_only=True):
    """A scheduled event reached a status. Every event reaches exactly one of completed, cancelled, failed."""

    TYPE: ClassVar[str] = "caesura.event.changed.v1"

    event_id: Id
    set: Name
    event_type: EventType
    status: EventStatus
    resources: tuple[Name, ...]
    host: OptionalName = ""
    """As in the document."""
    incarnation: Count
    rollout: OptionalId = ""
    wave: Count = 0
    not_before: Instant
    approved_by: OptionalName = ""
    reason: Text = ""
    codes: tuple[Code, ...] = ()
    notice_s: Seconds = 0.0
    """Seconds between publication and NotBefore."""
    approval_delay_s: Seconds | None = None
    """Seconds from publication to approval, when it was approved."""
    at: Instant


class EventApproved(Message, frozen=True, kw_only=True):
    """A workload approved an event through the HTTP API; one approval covers all its resources."""

    TYPE: ClassVar[str] = "caesura.event.approved.v1"

    event_id: Id
    set: Name
    vm: Name
    at: Instant


class VmApproved(EventApproved, frozen=True, kw_only=True):
    """The same, on a topic that names the VM, so that the broker's access rules can limit for which VMs a publisher may approve."""

    TYPE: ClassVar[str] = "caesura.vm.approved.v1"


# --- commands and reports --------------------------------------------------------------------------------


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


# --- clock-sync and agents -------------------------------------------------------------------------------


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
    page_bytes: Annotated[int, Meta(gt=0, le=EPOCH_MOST)] = 4096
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


class PublisherPresence(Message, frozen=True, kw_only=True):
    """Whether a metadata publisher is on the bus."""

    TYPE: ClassVar[str] = "caesura.publisher.presence.v1"

    instance: Name
    online: bool


# --- requests of operators -------------------------------------------------------------------------------


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


class RolloutRequested(Message, frozen=True, kw_only=True):
    """Start a rollout of a named update, or only plan it."""

    TYPE: ClassVar[str] = "caesura.rollout.requested.v1"

    request: Id
    update: Name
    selection: Selection = Selection()
    policy: Policy = Policy()
    plan_only: bool = False
    limits: Limits = Limits()


class FreezeRequested(Message, frozen=True, kw_only=True):
    """Freeze VMs on demand for ``hold_s`` seconds, with notice, one domain of a set at a time."""

    TYPE: ClassVar[str] = "caesura.freeze.requested.v1"

    request: Id
    selection: Selection
    hold_s: Annotated[float, Meta(gt=0, le=MAX_BUDGET_S)]
    policy: Policy = Policy()
    plan_only: bool = False
    limits: Limits = Limits()


class AbortRequested(Message, frozen=True, kw_only=True):
    """Abort a rollout, in any state. Empty ``rollout``: the only one that has not ended."""

    TYPE: ClassVar[str] = "caesura.abort.requested.v1"

    request: Id
    rollout: OptionalId = ""
    reason: Text = ""


class ResumeRequested(Message, frozen=True, kw_only=True):
    """Resume a halted rollout: the failed wave is tried again, completed ones are not."""

    TYPE: ClassVar[str] = "caesura.resume.requested.v1"

    request: Id
    rollout: OptionalId = ""


class RequestAnswered(Message, frozen=True, kw_only=True):
    """The coordinator's answer to a request. A repeated request gets the same answer.

    Accepted without a rollout, and not only planned: there is nothing to do, and `reason` says why.
    """

    TYPE: ClassVar[str] = "caesura.request.answered.v1"

    request: Id
    accepted: bool
    reason: Text = ""
    codes: tuple[Code, ...] = ()
    rollout: OptionalId = ""
    plan: Plan | None = None
    """Without waves, skipped VMs and refusals where there are parts."""
    plan_parts: Annotated[int, Meta(ge=0, le=MOST_PARTS)] = 0
    """The number of parts, on topics of their own, with the waves, the skipped VMs and the refusals of the plan."""


class PlanPart(Message, frozen=True, kw_only=True):
    """A part of the plan in an answer that does not fit into one message. A wave may continue in the next part, under the same number."""

    TYPE: ClassVar[str] = "caesura.plan.part.v1"

    request: Id
    part: PartNumber
    waves: tuple[PlannedWave, ...] = ()
    skipped: tuple[PlannedVm, ...] = ()
    refusals: tuple[Refusal, ...] = ()
