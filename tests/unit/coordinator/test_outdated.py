"""A host that would not receive this coordinator's commands pauses nothing, and is named: in the fence, and in the log once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from caesura.contract import messages as m
from caesura.contract.reasons import TRANSIENT
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.wave_gates import fence_blockers

Build = Callable[..., m.VmRecord]
Host = Callable[..., m.HostInventory]
MakeFleet = Callable[..., FleetLookup]


def test_the_fence_stays_closed_for_a_host_that_was_set_back_to_an_old_version(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    """It has acknowledged the epoch, is idle and guarded: only what it reads is missing."""
    back = fleet(host("h1", build("w1")), host("h2", build("w2", domain=1), commands=()))
    ahead = fleet(host("h1", build("w1")), host("h2", build("w2", domain=1)))

    def blockers(of: FleetLookup) -> list[Any]:
        return fence_blockers(of, ["web"], [], epoch=1, coordinator="c")

    (found,) = blockers(back)
    assert found.code == "host_outdated"
    assert "h2: " in found.text
    assert "docs/operate/upgrade.md" in found.text
    assert blockers(ahead) == []


def test_a_rollout_that_halted_for_an_outdated_host_is_not_resumed_by_itself() -> None:
    assert "host_outdated" not in TRANSIENT
