"""What the coordinator does not take at its word: a request from long ago. Pure."""

from __future__ import annotations

from datetime import datetime

REQUEST_AGE_S = 60.0
"""s: whoever asked was told long before that nobody answered, and does not expect it to happen any more."""


def request_expired(asked_at: datetime, now: datetime) -> str:
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
