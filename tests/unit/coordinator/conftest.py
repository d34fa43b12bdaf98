"""Builders of fleets and rollouts for the coordinator's pure modules."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from caesura.contract import messages as m
from caesura.fleet.fold import apply
from caesura.fleet.state import FleetState
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura_coordinator.authority import Authority
from caesura_coordinator.fleet_lookup import FleetLookup

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)
PATCH = m.UpdateRecord(
    update="patch", version="1", impact="pause", scope="host", expected_s=2.0, timeout_s=9.0
)


def record(vm: str, set_name: str = "web", domain: int = 0, **changes: object) -> m.VmRecord:
    """A running VM that can be frozen."""
    values: dict[str, object] = {
        "vm": vm,
        "set": set_name,
        "update_domain": domain,
        "state": "running",
        "clock": "none" if changes.get("agent") is False else "simulated",
        "methods": ("live", "freeze"),
        "methods_missing": {"swap": "no second process to swap to", "reboot": "cannot reboot"},
        "proofs": {
            "swap": ("sampled_digest_equal", "not_rebooted"),
            "freeze": ("digest_equal", "sampled_digest_equal", "not_rebooted"),
            "replace": ("digest_equal", "sampled_digest_equal", "not_rebooted"),
        },
    }
    return m.VmRecord(**{**values, **changes})  # type: ignore[arg-type]


def inventory(host: str, *vms: m.VmRecord, **changes: object) -> m.HostInventory:
    """An idle, guarded host that has acknowledged epoch 1 of coordinator c."""
    values: dict[str, object] = {
        "host": host,
        "driver": "process",
        "epoch": 1,
        "coordinator": "c",
        "vms": vms,
        "updates": (PATCH,),
        "guard": "ready",
        "commands": COMMANDS,
    }
    return m.HostInventory(**{**values, **changes})  # type: ignore[arg-type]


def fleet_of(*inventories: m.HostInventory, offline: tuple[str, ...] = ()) -> FleetLookup:
    """A fleet with all these hosts and their agents on the bus."""
    state = FleetState()
    for each in inventories:
        apply(state, each, 0.0)
        apply(state, m.HostPresence(host=each.host, online=each.host not in offline, instance="i"), 0.0)
        for vm in each.vms:
            apply(state, m.AgentPresence(vm=vm.vm, online=True, boot_id="b"), 0.0)
    return FleetLookup(state)


@pytest.fixture
def authority() -> Authority:
    return Authority(coordinator="c", epoch=1)


@pytest.fixture
def build() -> Callable[..., m.VmRecord]:
    return record


@pytest.fixture
def host() -> Callable[..., m.HostInventory]:
    return inventory


@pytest.fixture
def fleet() -> Callable[..., FleetLookup]:
    return fleet_of
