"""How far an epoch may rise at once, so that no single message can exhaust the epochs. Pure.

An epoch rises by one with each start of a coordinator. If hosts and coordinators accepted any number, one message with the highest
could stop them from obeying any coordinator afterwards, since no number is left above it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from statistics import median_low

from caesura.contract.messages import EPOCH_MOST

EPOCH_LEAP = 1000
"""Starts of a coordinator that a host may have missed, or that a store may be behind."""


HOST_LEAP = 100
"""How far a single host's report may raise the next claim: far less, since hosts that missed some starts must follow it."""


def leaps(known: int, claimed: int) -> bool:
    """Whether ``claimed`` is further above ``known`` than can have happened. A reader that does not know any epoch yet accepts the first one."""
    return claimed > (known + EPOCH_LEAP if known else EPOCH_MOST - EPOCH_LEAP)


def epoch_floor(stored: int, announced: Iterable[int], hosts: Collection[int]) -> int:
    """The epoch above which a coordinator claims its own.

    Args:
        stored: what it claimed last; 0: the store is new, or was lost.
        announced: what coordinators have claimed on the bus.
        hosts: what each host obeys. A host is not a coordinator: only an epoch close to a known one counts. With a lost store
            no epoch is known; then the known one is that which half of the hosts that obey a coordinator have not passed.
    """
    known = stored
    obeying = [each for each in hosts if each]
    if not known and obeying and not leaps(0, median_low(obeying)):
        known = median_low(obeying)
    # None of them makes another plausible: all are compared with the same value.
    believed = [each for each in announced if not leaps(known, each + 1)]
    believed += [each for each in hosts if each <= known + HOST_LEAP]
    return max((known, *believed))
