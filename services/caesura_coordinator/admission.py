"""What the coordinator does not take at its word: an epoch that nobody can have claimed, a request from long ago. Pure."""

from __future__ import annotations

from datetime import datetime

import msgspec

from caesura.contract.messages import HostInventory

EPOCH_LEAP = 1_000_000
"""An epoch rises by one with each start of a coordinator: one that is further ahead was claimed by none."""
REQUEST_AGE_S = 60.0
"""s: whoever asked was told long before that nobody answered, and does not expect it to happen any more."""


def believable(inventory: HostInventory, known_epoch: int) -> HostInventory:
    """The inventory, without an epoch that no coordinator can have claimed.

    One host with a broken memory, or in strange hands, must not send coordinator after coordinator away. Without an
    epoch the host has acknowledged none, so nothing is paused in its sets.
    """
    if inventory.epoch <= known_epoch + EPOCH_LEAP:
        return inventory
    return msgspec.structs.replace(inventory, epoch=0, coordinator="")


def outlived(asked_at: datetime, now: datetime) -> str:
    """Why a request is not acted on any more; empty while it is fresh.

    The broker keeps requests while the coordinator is away. Judged by the clocks of two machines, so only what is
    older by far is refused.
    """
    age_s = (now - asked_at).total_seconds()
    if age_s <= REQUEST_AGE_S:
        return ""
    return (
        f"asked {age_s:.0f} s ago by the clock of your machine, which is too long: nothing was done, ask again "
        "(if that is not so, the clocks of your machine and of the coordinator differ)"
    )
