"""Durations as people write them: ``9``, ``9s``, ``1m30s``, ``15m``, ``2h``."""

from __future__ import annotations

import math
import re
from typing import Any

import click

from caesura.contract.messages import MAX_BUDGET_S

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
_WHOLE = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_duration(text: str) -> float:
    """Seconds in ``text``.

    Raises:
        ValueError: it is not a duration.
    """
    found = _WHOLE.fullmatch(text.strip())
    if not found or not any(found.groups()):
        raise ValueError(f"{text!r} is not a duration: write 9s, 1m30s, 15m or 2h")
    return sum(
        float(value) * unit for value, unit in zip(found.groups(), _UNITS.values(), strict=True) if value
    )


def show_duration(seconds: float) -> str:
    """``seconds`` in the same notation, whole above a minute."""
    if seconds < 60:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return "".join(f"{value}{unit}" for value, unit in ((hours, "h"), (minutes, "m"), (rest, "s")) if value)


def show_pause(seconds: float) -> str:
    """A pause as measured: milliseconds below a second."""
    return f"{seconds * 1000:.1f}ms" if seconds < 1 else f"{seconds:.3f}s"


class Duration(click.ParamType[float]):
    """A click parameter of seconds.

    Args:
        some: zero (0s) is not allowed.
        most_s: the longest allowed.
    """

    name = "duration"

    def __init__(self, *, some: bool = False, most_s: float = math.inf) -> None:
        self._some = some
        self._most_s = most_s

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds as a float; fails the command line on anything else."""
        if isinstance(value, int | float):
            return float(value)
        try:
            seconds = parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if self._some and seconds <= 0:
            self.fail("it must be longer than zero", param, ctx)
        if seconds > self._most_s:
            self.fail(f"{value} is too long: at most {show_duration(self._most_s)}", param, ctx)
        return seconds


DURATION = Duration()
SOME_TIME = Duration(some=True)
BUDGET = Duration(some=True, most_s=MAX_BUDGET_S)
"""The limit of a pause, or a part of it."""
