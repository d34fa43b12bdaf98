"""How much of each rollout stays: on the bus, in the store and in memory. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from caesura.contract.messages import RolloutState
from caesura_coordinator.records import Rollout

_SHOWN = 50
"""How many ended rollouts remain on the bus as retained messages; the store keeps more."""
_SHOWN_WITH_WAVES = 5
"""How many of these keep their waves, which a new subscriber receives all at once."""
KEPT = 500
"""How many rollouts the store and memory keep."""

_MOST_WAVES = 10_000
"""A rollout on the bus may claim any number of waves; one of 10,000 VMs has no more than this."""

Shown = Literal["with waves", "without waves", "hidden"]
"""How much of a rollout is retained on the bus."""


class Removal(msgspec.Struct, frozen=True):
    """What must be removed from the bus for a rollout: its waves and, unless it remains shown, the rollout itself."""

    rollout: str
    waves: int
    whole: bool


def how_shown(rollouts: Iterable[Rollout]) -> dict[str, Shown]:
    """Maps a rollout to how much of it is on the bus: every active one, and the newest of the ended ones.

    Args:
        rollouts: all of them, oldest first.
    """
    rollouts = list(rollouts)
    shown: dict[str, Shown] = {}
    ended = sum(not each.active for each in rollouts)
    for each in rollouts:
        if each.active or ended <= _SHOWN_WITH_WAVES:
            shown[each.id] = "with waves"
        else:
            shown[each.id] = "without waves" if ended <= _SHOWN else "hidden"
        ended -= not each.active
    return shown


def no_longer_kept(shown: Mapping[str, Shown]) -> list[str]:
    """The oldest rollouts beyond the number that is kept; one that still holds its sets is never among them."""
    hidden = [name for name, how in shown.items() if how == "hidden"]
    return hidden[: max(0, len(shown) - KEPT)]


def excess(published: RolloutState, shown: Shown | None) -> Removal | None:
    """The parts to remove of a rollout that is on the bus although it should not be: a broker may restore old retained messages."""
    if shown is None or shown == "with waves" or (shown == "without waves" and not published.wave_etags):
        return None
    return Removal(published.rollout, _wave_count(published), whole=shown == "hidden")


def all_waves(published: RolloutState) -> Removal:
    """All waves that a rollout on the bus may have there."""
    return Removal(published.rollout, _wave_count(published), whole=False)


def _wave_count(published: RolloutState) -> int:
    return min(published.wave_count, _MOST_WAVES)
