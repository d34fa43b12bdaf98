"""Reasons as text that fits into a message. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from caesura.contract.reasons import Reason

_NAMED = 8
"""How many items a reason names; the others are only counted."""
REASON_CHARACTERS = 1000
"""The contract allows 4096, and a reason is repeated in several places of one message; the hosts' own reports are complete."""


def join_reasons(items: Sequence[Reason | str], between: str = "; ") -> str:
    """The text of the first ones, and how many more there are."""
    shown = items[:_NAMED]
    room = (REASON_CHARACTERS - 100) // max(1, len(shown))  # 100: for prefix and suffix
    text = between.join(truncate(str(each), room) for each in shown)
    return text if len(items) <= _NAMED else f"{text}{between}and {len(items) - _NAMED} more"


def truncate(text: str, limit: int = REASON_CHARACTERS) -> str:
    """At most ``limit`` characters of it; dots mark a cut."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
