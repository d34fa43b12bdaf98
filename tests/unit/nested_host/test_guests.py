"""What guests of a nested host say, and what is made of it."""

from __future__ import annotations

import pytest

from caesura_nested_host.guests import beats, guest_pause, longest_silence
from caesura_nested_host.machine import SerialLine
from caesura_nested_host.pause_parts import pause_parts


def said(*found: tuple[float, int, float], boot: str = "0a1b2c3d") -> list[SerialLine]:
    return [SerialLine(at, f"beat {number} {up_s} {boot}") for at, number, up_s in found]


PAUSED = said((1.0, 1, 0.2), (1.2, 2, 0.4), (21.2, 3, 0.6), (21.4, 4, 0.8))


def test_lines_that_are_no_beats_are_passed_over() -> None:
    lines = [
        SerialLine(0.5, "SeaBIOS"),
        *PAUSED,
        SerialLine(22.0, "memory 3 bad=0"),
        SerialLine(22.1, "beat 5 1."),
        SerialLine(22.2, "beat"),
    ]
    assert [beat.number for beat in beats(lines)] == [1, 2, 3, 4]


def test_a_guest_that_continued_as_it_was() -> None:
    found = guest_pause(PAUSED, 1.1, "memory 3 bad=0")
    assert found.faults == ()
    assert (found.before.number, found.after.number) == (2, 3)
    assert found.silence_s == pytest.approx(20.0)
    assert found.own_s == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("lines", "memory", "fault"),
    [
        (
            said((1.0, 1, 0.2), (1.2, 2, 0.4)) + said((21.2, 1, 0.2), boot="ffffffff"),
            "bad=0",
            "it booted again",
        ),
        (said((1.0, 1, 0.2), (1.2, 2, 0.4), (21.2, 4, 0.6)), "bad=0", "a beat is missing, or came twice"),
        (said((1.0, 1, 0.2), (1.2, 2, 0.4), (21.2, 2, 0.4)), "bad=0", "a beat is missing, or came twice"),
        (PAUSED, "memory 3 bad=7", "its memory is not what it was: memory 3 bad=7"),
        (said((1.0, 1, 0.2), (1.2, 2, 0.4), (21.2, 3, 20.4)), "bad=0", "its clock ran in the pause"),
    ],
)
def test_what_must_not_be_is_named(lines: list[SerialLine], memory: str, fault: str) -> None:
    assert fault in guest_pause(lines, 1.1, memory).faults


def test_a_guest_that_did_not_beat_before_or_since_proves_nothing() -> None:
    with pytest.raises(ValueError, match="did not beat before"):
        guest_pause(PAUSED, 0.5, "bad=0")
    with pytest.raises(ValueError, match=r"empty|arg"):
        guest_pause(PAUSED, 21.3, "bad=0")
    with pytest.raises(ValueError, match=r"empty|arg"):
        longest_silence([])


def test_the_parts_of_a_pause_add_up_to_it() -> None:
    console = [
        SerialLine(0.5, "[    0.000000] Linux version 6.1.0-47-amd64 of the boot before"),
        SerialLine(4.0, "[    0.000000] Linux version 6.1.0-50-amd64"),
        SerialLine(9.0, "Loading, please wait..."),
        SerialLine(12.0, "[   12.3] caesura: guard begins"),
        SerialLine(15.0, "arrival.clock_set"),
        SerialLine(30.0, "[    0.000000] Linux version of another one"),
    ]
    parts = pause_parts(console, 1.0, 20.0)
    assert list(parts.values()) == [3.0, 5.0, 3.0, 3.0, 5.0]
    assert list(parts) == [
        "save, leave, jump",
        "kernel",
        "initramfs",
        "guard's Python",
        "QEMU start, load, cont",
    ]
    assert pause_parts([], 1.0, 20.0) == {"save, leave, jump": 19.0}
