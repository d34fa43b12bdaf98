"""Durations as arguments: a number of seconds, or a text such as 1m30s. Pure."""

from __future__ import annotations

from caesura_ctl.durations import parse_duration


def seconds_in(value: float | str) -> float:
    """Seconds.

    Raises:
        ValueError: it is not a duration.
    """
    return parse_duration(value) if isinstance(value, str) else float(value)
