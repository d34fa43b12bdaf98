"""How surely a message is to be published: what differs between a fact, a state, an answer and a request."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How surely, and for how long, a message is to be published."""

    newest_only: bool = False
    """It replaces what still waits on its topic: for retained state."""
    give_up_s: float | None = None
    """Seconds after which it is given up if the broker has not taken it; None: never."""
    refusal_ends: bool = False
    """A broker that refuses it is not asked again."""
    repeat_s: float | None = None
    """Seconds after which it is published again though the broker took it, for as long as ``wanted`` says so."""
    wanted: Callable[[], bool] = lambda: False


EVERY = Policy()
"""Published once, whatever it takes: a fact."""
NEWEST = Policy(newest_only=True)
"""Published once unless a newer one of its topic comes first: retained state."""
