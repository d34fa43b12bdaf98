"""Requests that the coordinator does not accept: the refusal with its code, and the age limit. Pure."""

from __future__ import annotations

from datetime import datetime

from caesura.contract.reasons import ReasonCode
from caesura.runtime.errors import CaesuraError

REQUEST_AGE_S = 60.0
"""s: by then the client has long reported that there was no answer, and its operator no longer expects the request to run."""


class RequestRefused(CaesuraError):
    """A request that cannot be carried out; the text says why, and what to do."""

    def __init__(self, code: ReasonCode, why: str) -> None:
        self.code: ReasonCode = code
        super().__init__(why)


def request_expired(asked_at: datetime, now: datetime) -> str:
    """Why a request is too old to be carried out; empty while it is fresh.

    The broker keeps requests while the coordinator is down. The age is measured by the clocks of two machines, so only much
    older requests are refused.
    """
    age_s = (now - asked_at).total_seconds()
    if age_s <= REQUEST_AGE_S:
        return ""
    return (
        f"asked {age_s:.0f} s ago by the clock of your machine, which is too long ago: nothing was done, ask again "
        "(if that is not so, the clocks of your machine and of the coordinator differ)"
    )
