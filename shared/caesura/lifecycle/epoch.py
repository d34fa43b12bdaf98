"""How far an epoch may rise at once, so that no single word can use all of them up. Pure.

An epoch rises by one with each start of a coordinator. Whoever could make hosts and coordinators take any number for it
would have them obey nobody afterwards, since none is left above it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from statistics import median_low

from caesura.contract.messages import EPOCH_MOST

EPOCH_LEAP = 1000
"""Starts of a coordinator that a host may have missed, or that a store may be behind."""


HOST_LEAP = 100
"""So far a single host's word may raise the next claim: far less, since hosts that missed some starts must follow it."""


def leaps(known: int, claimed: int) -> bool:
    """Whether ``claimed`` is further above ``known`` than can have happened. Who knows of none yet takes what comes first."""
    return claimed > (known + EPOCH_LEAP if known else EPOCH_MOST - EPOCH_LEAP)


def epoch_floor(stored: int, announced: Iterable[int], hosts: Collection[int]) -> int:
    """The epoch above which a coordinator claims its own.

    Args:
        stored: what it claimed last; 0: a new store, or a lost one.
        announced: what coordinators have claimed on the bus.
        hosts: what each host obeys. A host is no coordinator: only what is near to what is known counts. With a lost store
            nothing is; then what half of those that obey anybody have not passed is known.
    """
    known = stored
    obeying = [each for each in hosts if each]
    if not known and obeying and not leaps(0, median_low(obeying)):
        known = median_low(obeying)
    # None of them makes another believable: they are all held against the same.
    believed = [each for each in announced if not leaps(known, each + 1)]
    believed += [each for each in hosts if each <= known + HOST_LEAP]
    return max((known, *believed))
