"""How a rollout and its waves stand, and who leads."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from caesura.contract.envelope import Instant, Message
from caesura.contract.messages.fields import (
    EPOCH_MOST,
    Count,
    Etag,
    ExitCode,
    Id,
    MessageType,
    OptionalId,
    OptionalName,
    Record,
    RolloutStatus,
    Seconds,
    Text,
    WaveStatus,
)
from caesura.contract.messages.plans import Policy
from caesura.contract.names import Name
from caesura.contract.reasons import Code

MOST_RIVALS = 16


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
    """Maps a set name to the id of its scheduled event; of several, that of the first host by name. The set's document has all of them."""
    event_count: Count = 0
    """Its scheduled events: one for each set and host. 0 with an entry in `events`: version 0.1.0, which had one for each set."""
    not_before: Instant | None = None
    approved: tuple[Name, ...] = ()
    """Sets of which every event was approved."""
    approved_count: Count = 0
    """The events that were approved."""
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
    queued_behind: OptionalId = ""
    """The rollout that it waits for, while it is `running` and another one holds one of its sets: its first wave may be announced, and
    starts when the others have ended."""
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


class CoordinatorStatus(Message, frozen=True, kw_only=True):
    """A coordinator of several that share a store: whether it leads or stands by, and what it waits for. Nobody decides on it.

    There is none of a coordinator that has a store of its own."""

    TYPE: ClassVar[str] = "caesura.coordinator.status.v1"

    coordinator: Name
    """The name of its settings, which stays over restarts."""
    online: bool
    leads: bool
    epoch: Annotated[int, Meta(ge=0, le=EPOCH_MOST)] = 0
    """The one that it has claimed; 0: none in this run."""
    waits_for: Annotated[str, Meta(max_length=500)] = ""
    """What keeps it from its work, such as a database that does not answer: then no rollout moves. Of a standby: its turn."""


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
