"""Constrained types, closed sets of words, and limits that several messages share."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MAX_BUDGET_S = 30.0  # s: the seed's promise, "resumed within 30 seconds of being paused"

INTEGER_MOST = 2**53 - 1
"""Integers that every JSON reader (RFC 8259, section 6) and SQLite represent exactly."""

EPOCH_MOST = INTEGER_MOST

MOST_TARGETS = 1024
"""The most VMs of one command, hence of one operation of a host, and hence of one host."""

VMS_IN_PART = 4
"""The least number of VMs in every part of an inventory or report but the last: a VM with the longest texts takes 50 kB."""

MOST_PARTS = MOST_TARGETS // VMS_IN_PART
"""The most parts of one inventory, plan or report."""

SECONDS_MOST = 1e9
"""Some 31 years: the sum with an instant must still be a valid instant."""

Count = Annotated[int, Meta(ge=0, le=INTEGER_MOST)]
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
KernelRelease = Annotated[
    str,
    Meta(
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._+~-]{0,63})?\Z",
        description="A kernel as `uname -r` names it, or empty where none is meant.",
    ),
]
Method = Literal["live", "swap", "freeze", "replace", "kexec", "reboot", "skip"]
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
