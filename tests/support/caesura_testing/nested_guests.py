"""What must hold of the guests of a nested host after its kernel was replaced."""

from __future__ import annotations

from caesura_nested_host.fleet_host import FleetHost

SLOW = {"prepare_failed", "freeze_failed"}
"""Codes of a host whose guest stayed in the old kernel since its QEMU was too slow: nothing is quick in the emulation of a busy machine."""


def assert_continued(host: FleetHost, since: float, release: str) -> None:
    """Each guest had one pause, beats again, without a gap in its numbers, in the same boot, with its memory as it was.

    Args:
        since: an instant before the pause, at which the guests beat.
        release: what the host went to, for the line that is printed.
    """
    for vm, found in host.guest_pauses(since).items():
        assert not found.faults, f"{vm}: {found}"
        print(
            f"\n{host.name} to {release}: {vm}: beat {found.before.number} -> {found.after.number},"
            f" silence {found.silence_s:.1f} s, its clock +{found.own_s:.2f} s, {found.memory}"
        )
