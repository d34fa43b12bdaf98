"""Which coordinator this host obeys: the one of the highest epoch, unless that cannot be right. Pure."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from caesura.lifecycle.command_compatibility import COMMANDS, UPGRADE, missing
from caesura.lifecycle.epoch import EPOCH_LEAP, leaps


class EpochAuthority(msgspec.Struct, frozen=True):
    """The coordinator this host obeys: the highest epoch observed, and its coordinator."""

    epoch: int = 0
    coordinator: str = ""


class NotObeyed(msgspec.Struct, frozen=True):
    """A coordinator that has no authority here, and why."""

    why: str
    outdated: bool = False
    """Its version is one whose commands this host would never receive."""


def observe_epoch(
    authority: EpochAuthority, epoch: int, coordinator: str, commands: Collection[str] = COMMANDS
) -> EpochAuthority | NotObeyed:
    """The effect of a coordinator's epoch: the authority to hold from now on, or why it is not obeyed.

    Args:
        commands: types of the commands that it sends. A coordinator whose command was received sends what this host reads.
    """
    if leaps(authority.epoch, epoch):
        return NotObeyed(
            f"epoch {epoch} is more than {EPOCH_LEAP} above epoch {authority.epoch} of {authority.coordinator}, which this host "
            "obeys: no coordinator can have claimed it"
        )
    if epoch < authority.epoch:
        return NotObeyed(
            f"epoch {epoch} is old: this host obeys epoch {authority.epoch} of {authority.coordinator}"
        )
    if unsent := missing(commands):
        return NotObeyed(
            f"coordinator {coordinator} of epoch {epoch} is of a version that does not send {', '.join(unsent)}, and this host "
            f"would not receive what it sends: upgrade the coordinator ({UPGRADE})",
            outdated=True,
        )
    if epoch > authority.epoch:
        return EpochAuthority(epoch, coordinator)
    if coordinator != authority.coordinator:
        return NotObeyed(
            f"epoch {epoch} belongs to coordinator {authority.coordinator}, not to {coordinator}"
        )
    return authority
