"""What a host has: its VMs, its updates, the operation under way."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from caesura.contract.envelope import Instant, Message
from caesura.contract.messages.fields import (
    EPOCH_MOST,
    MOST_PARTS,
    MOST_TARGETS,
    Count,
    Etag,
    FaultDomain,
    Id,
    Impact,
    KernelRelease,
    MessageType,
    OptionalId,
    PartNumber,
    Positive,
    Record,
    Scope,
    Seconds,
    Text,
    UpdateDomain,
    VmState,
)
from caesura.contract.names import Name
from caesura.contract.reasons import Code


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
    methods_missing: dict[str, str] = {}  # noqa: RUF012 - msgspec gives each its own
    clock: Literal["simulated", "system", "none"] = "none"
    agent: bool = True
    """Whether an agent is expected to answer in this VM."""
    proofs: dict[str, tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}\Z")], ...]] | None = None
    """Maps a method to what can be shown about the VM's memory after a pause by it: proof codes, open on the wire as `methods` is. None: the host
    updater does not say."""
    no_digest: Text = ""
    """Why the host cannot take a digest of its memory; empty if it can."""
    pause_risk: Text = ""
    """What could end it in a pause though its host does everything right, and what to do about that; empty: nothing that is known."""


VmmChange = Literal["", "beside", "instead"]
"""What an update does to the VMM (the QEMU binary and its libraries): nothing; it installs a new one beside the one that
runs (method swap); the old one must not run during the update (method replace)."""


KernelUpdate = Literal["", "kexec"]
"""What an update does to the host's kernel: nothing that Caesura must know; the host starts another one with its guests' memory in
RAM (method kexec)."""


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
    shutdown_s: Positive = 120.0
    """Impact reboot: the most that a VM may take to shut down, from the request to its end."""
    kill_after_timeout: bool = False
    """Impact reboot: whether a VM that takes longer is killed; else nothing is, and the update does not run."""
    kernel: KernelUpdate = ""
    kernel_release: KernelRelease = ""
    """The kernel that runs afterwards; empty unless `kernel` is `kexec`."""


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


class KernelFigure(Record, frozen=True, kw_only=True):
    """How long one change of the host's kernel took, from the first guest that stopped to the last one that ran."""

    to: KernelRelease
    former: KernelRelease
    """The kernel before."""
    seconds: Positive
    at: Instant
    rehearsal: bool = False
    """Whether it was measured without guests of users."""
    early: bool = True
    """Whether the initramfs resumed the guests, which is the shorter way; else user space did."""


class HostKernel(Record, frozen=True, kw_only=True):
    """The host's kernel, and whether another one can be started under its guests."""

    release: KernelRelease
    kexec: bool = False
    """Whether the operator allows it on this host."""
    problems: Annotated[tuple[Text, ...], Meta(max_length=32)] = ()
    """What is in the way now, whatever the kernel: each with its remedy, for people."""
    figures: Annotated[tuple[KernelFigure, ...], Meta(max_length=32)] = ()
    """The newest measurement of each kernel. A kernel without one is not planned."""


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
    kernel: HostKernel | None = None
    """None: the host updater does not say, or its driver keeps no guest's memory over a change of the kernel."""


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
