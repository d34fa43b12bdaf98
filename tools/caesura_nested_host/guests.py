"""What the guests of a nested host say on their serial lines, and what it tells of a pause. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from caesura_nested_host.machine import SerialLine

MEMORY = r"memory \d+ bad=\d+"
"""The line in which a guest says whether its memory is what it was."""


@dataclass(frozen=True)
class Beat:
    """One line of a guest: see ``inside/guest.c`` and ``guest-init``.

    Args:
        at: seconds, CLOCK_MONOTONIC of the machine that reads.
        number: counts from the guest's boot on.
        up_s: the guest's own monotonic clock.
        boot: its boot id.
    """

    at: float
    number: int
    up_s: float
    boot: str


@dataclass(frozen=True)
class GuestPause:
    """What became of a guest over a pause.

    Args:
        before: its last beat before the longest silence.
        after: the first one after it.
        memory: what it said of its memory afterwards.
        faults: what must not be, as sentences; empty: the guest continued as it was.
    """

    before: Beat
    after: Beat
    memory: str
    faults: tuple[str, ...]

    @property
    def silence_s(self) -> float:
        """Seconds between the two beats, on the clock of the machine that reads."""
        return self.after.at - self.before.at

    @property
    def own_s(self) -> float:
        """The same on the guest's clock."""
        return self.after.up_s - self.before.up_s


def beats(lines: Sequence[SerialLine]) -> list[Beat]:
    """The beats among a guest's lines, in their order."""
    found = (re.search(r"\bbeat (\d+) ([\d.]+) ([0-9a-f-]{8,36})$", each.text) for each in lines)
    return [
        Beat(each.at, int(m[1]), float(m[2]), m[3])
        for each, m in zip(lines, found, strict=True)
        if m is not None
    ]


def longest_silence(found: Sequence[Beat]) -> tuple[Beat, Beat]:
    """The two beats in a row with the most time between them. Raises ValueError: there are not two."""
    return max(pairwise(found), key=lambda pair: pair[1].at - pair[0].at)


def guest_pause(lines: Sequence[SerialLine], since: float, memory: str) -> GuestPause:
    """Whether a guest had one pause, beats again, without a gap in its numbers, in the same boot, with its memory as it was.

    Args:
        lines: all that it said.
        since: an instant before the pause, at which it beat.
        memory: the line with which it last said, after the pause, what its memory is.

    Raises:
        ValueError: it did not beat before the instant, or not twice since.
    """
    found = beats(lines)
    boots = [beat.boot for beat in found if beat.at < since]
    if not boots:
        raise ValueError("the guest did not beat before")
    before, after = longest_silence([beat for beat in found if beat.at >= since])
    numbers = [beat.number for beat in found if beat.boot == boots[-1]]
    silence_s = after.at - before.at
    faults = []
    if {beat.boot for beat in found if beat.at >= since} != {boots[-1]}:
        faults.append("it booted again")
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        faults.append("a beat is missing, or came twice")
    if not memory.endswith("bad=0"):
        faults.append(f"its memory is not what it was: {memory}")
    if not 0 < after.up_s - before.up_s < 0.5 * silence_s + 1:
        faults.append("its clock ran in the pause")
    return GuestPause(before, after, memory, tuple(faults))
