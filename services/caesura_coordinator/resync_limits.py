"""How often a fleet publishes its retained state again, and on whose request. Pure.

Two limits: what one requester may cause, so that a client with a fault, or one VM's password, cannot make a fleet resend without end;
and what all of them may cause together. A request within the first that exceeds the second waits, together with those that come in
the meantime: one publication answers them all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from caesura.bus.rates import Limit
from caesura.contract.messages import RESYNC_SPREAD_MOST_S

FLEET = Limit(per_s=1 / 10, burst=6)
"""Publications by all writers."""
REQUESTERS: Mapping[str, Limit] = {
    # A command asks at each start: an operator calls several in a row.
    "ctl": Limit(per_s=1 / 10, burst=20),
    "exporter": Limit(per_s=1 / 60, burst=5),
    "metadata": Limit(per_s=1 / 60, burst=5),
    "vm": Limit(per_s=1 / 300, burst=3),
}
_REQUESTERS_KEPT = 20_000
_VMS_PER_S = 2_000
"""Messages per second that all writers together aim at."""
_SPREAD_LEAST_S = 0.2


def spread_s(vms: int) -> float:
    """Within how many seconds the writers of a fleet with so many VMs publish."""
    return min(RESYNC_SPREAD_MOST_S, max(_SPREAD_LEAST_S, vms / _VMS_PER_S))


class TokenBucket:
    """Counts publications. Times are seconds on one monotonic clock."""

    def __init__(self, limit: Limit, now_s: float) -> None:
        self._limit = limit
        self._tokens = limit.burst
        self._at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until one more is allowed; 0: now."""
        self._refill(now_s)
        return max(0.0, (1.0 - self._tokens) / self._limit.per_s)

    def take(self, now_s: float) -> bool:
        """Count one, if it is allowed now."""
        self._refill(now_s)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _refill(self, now_s: float) -> None:
        self._tokens = min(self._limit.burst, self._tokens + (now_s - self._at_s) * self._limit.per_s)
        self._at_s = now_s


class RequesterLimits:
    """What each requester may still cause."""

    def __init__(self, limits: Mapping[str, Limit] = REQUESTERS) -> None:
        self._limits = limits
        self._buckets: OrderedDict[tuple[str, str], TokenBucket] = OrderedDict()
        """By party and name, the one that asked last at the end."""

    def admits(self, party: str, name: str, now_s: float) -> bool:
        """Count a request; whether it is answered."""
        limit = self._limits.get(party)
        if limit is None:
            return False
        bucket = self._buckets.pop((party, name), None) or TokenBucket(limit, now_s)
        self._buckets[party, name] = bucket
        if len(self._buckets) > _REQUESTERS_KEPT:
            self._buckets.popitem(last=False)
        return bucket.take(now_s)
