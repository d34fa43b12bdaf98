"""What a pause over a change of the host's kernel consists of, from what the host's console said and when. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from caesura_nested_host.machine import SerialLine

_MARKS = (
    ("kernel", r"\] Linux version "),
    ("initramfs", r"^Loading, please wait"),
    ("guard's Python", r"caesura: guard begins"),
    ("QEMU start, load, cont", r"arrival\.clock_set|arrival\.clock_not_set"),
)
"""A part, and the line of the console with which it begins."""


def pause_parts(console: Sequence[SerialLine], stopped: float, resumed: float) -> dict[str, float]:
    """Seconds of each part of a pause, in order, from what a host's console said and when. Pure.

    Args:
        stopped: the last instant at which a guest was seen to run before.
        resumed: the first one after.
    """
    within = [line for line in console if stopped <= line.at <= resumed]
    marks = [("save, leave, jump", stopped)]
    for name, pattern in _MARKS:
        at = next((line.at for line in within if re.search(pattern, line.text)), None)
        if at is not None:
            marks.append((name, at))
    ends = [*(at for _, at in marks[1:]), resumed]
    return {name: end - at for (name, at), end in zip(marks, ends, strict=True)}
