"""Reasons in words that fit a message. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from caesura.contract.reasons import Reason

_NAMED = 8
"""How many things a reason names before it only counts them."""
REASON_CHARACTERS = 1000
"""The contract allows 4096, and a reason is repeated in several places of one message; hosts' own reports have it all."""


def join_reasons(items: Sequence[Reason | str], between: str = "; ") -> str:
    """The first of them in words, and how many more there are."""
    shown = items[:_NAMED]
    room = (REASON_CHARACTERS - 100) // max(1, len(shown))  # 100: for what is put before and after
    text = between.join(truncate(str(each), room) for each in shown)
    return text if len(items) <= _NAMED else f"{text}{between}and {len(items) - _NAMED} more"


def truncate(text: str, limit: int = REASON_CHARACTERS) -> str:
    """At most ``limit`` characters of it; dots where something is missing."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
