"""The delivery policy of a message: what differs between a fact, a state, an answer and a request."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class DeliveryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How persistently, and for how long, a message is published."""

    newest_only: bool = False
    """It replaces messages that still wait on its topic: for retained state."""
    give_up_s: float | None = None
    """Seconds after which it is given up if the broker has not accepted it; None: never."""
    refusal_ends: bool = False
    """After a refusal by the broker it is not tried again."""
    repeat_s: float | None = None
    """Seconds after which it is published again although the broker accepted it, for as long as ``wanted`` says so."""
    wanted: Callable[[], bool] = lambda: False


EVERY = DeliveryPolicy()
"""Published once, with retries without limit: a fact."""
NEWEST = DeliveryPolicy(newest_only=True)
"""Published once unless a newer one of its topic comes first: retained state."""
