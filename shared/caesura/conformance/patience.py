"""How long a test waits before it calls something late: one factor for every upper bound on wall-clock time."""

from __future__ import annotations

import os

VARIABLE = "CAESURA_TEST_PATIENCE"
"""The factor, 1 or more; without it the load of the machine at the start of the tests decides."""

_MOST = 5.0


def factor_from(text: str, load: float, cores: int) -> float:
    """The factor: what was asked for, but at least 1; else 1 and how many runnable processes share a core, at most 5.

    Raises:
        ValueError: ``text`` is not a number.
    """
    wanted = float(text) if text else min(1 + load / max(cores, 1), _MOST)
    return max(1.0, wanted)


FACTOR = factor_from(os.environ.get(VARIABLE, ""), os.getloadavg()[0], os.cpu_count() or 1)


def patient(seconds: float) -> float:
    """An upper bound that a machine at rest keeps with ease, for this machine as it is now.

    For bounds that only say "this hangs" or "this took far too long"; never for what the product itself promises,
    such as a pause budget.
    """
    return seconds * FACTOR
