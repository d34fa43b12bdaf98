"""Which of the coordinators that share a store are there. Pure.

The last will of one that is killed takes its status back for those who receive it. Who comes later finds the status as it was, retained,
and so does everybody after a broker that died together with it: what shows then is that it is not announced any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from caesura.contract.messages import CoordinatorStatus
from caesura.fleet.state import FleetState

SILENT_S = 70.0
"""s: three announcements were missed, one each 20 s."""


def announced_coordinators(state: FleetState, now_s: float) -> Mapping[str, CoordinatorStatus]:
    """Maps a coordinator to its status, without those of which none has arrived for ``SILENT_S``.

    Args:
        now_s: seconds on the clock with which messages were folded.
    """
    statuses = state.words.named(CoordinatorStatus)
    return {
        name: status
        for name, status in statuses.items()
        if now_s - (state.words.received_s(CoordinatorStatus, name) or 0.0) <= SILENT_S
    }


def silence_s(sent_at: Mapping[str, datetime], name: str) -> float:
    """Seconds for which a coordinator has announced nothing while another did; 0: it may be there.

    For those who only look once. The clocks compared are those of coordinators, which are synchronised; the reader's own may not be.

    Args:
        sent_at: maps a coordinator to when it sent its last status.
    """
    silent_s = (max(sent_at.values()) - sent_at[name]).total_seconds() if name in sent_at else 0.0
    return silent_s if silent_s > SILENT_S else 0.0
