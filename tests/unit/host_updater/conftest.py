"""A command, and a host updater on a bus in memory with a driver and a guard of the test's making."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import Delivery
from caesura.contract.codec import encode
from caesura.contract.messages import OperationTarget, StartOperation
from caesura.contract.topics import channel_of
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.pause_markers import PauseMarkers
from caesura_host_updater.service import HostUpdater
from caesura_host_updater.settings import HostUpdaterSettings
from caesura_vmcontrol import markers
from caesura_vmcontrol.markers import Marker
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.resume_plans import CgroupPlan


@pytest.fixture
def freeze_one() -> Callable[..., StartOperation]:
    """``freeze_one(**changes)``: a command to hold VM ``a`` of host-1 for a second."""

    def make(vm: str = "a", domain: int = 0, **changes: Any) -> StartOperation:
        facts: dict[str, Any] = {
            "operation": "op",
            "epoch": 1,
            "coordinator": "c",
            "host": "host-1",
            "rollout": "r",
            "wave": 0,
            "method": "freeze",
            "targets": (OperationTarget(vm=vm, set="web", update_domain=domain),),
            "budget_s": 10.0,
            "hold_s": 1.0,
            "not_after": datetime.now(UTC) + timedelta(seconds=30),
        }
        return StartOperation(**(facts | changes))

    return make


def plan(vm: str) -> CgroupPlan:
    """How a VM that is made up is resumed."""
    return CgroupPlan(vm, "cgroup2", f"/sys/fs/cgroup/caesura-made-up/{vm}/cgroup.freeze")


@pytest.fixture
def marked(tmp_path: Path) -> Callable[..., PauseMarkers]:
    """``marked("a", "b")``: the pause markers of a state folder in which a previous run marked these VMs."""

    def make(*vms: str) -> PauseMarkers:
        markers.write(str(tmp_path), [Marker("op", boot_id(), 1.0, plan(vm)) for vm in vms])
        return PauseMarkers(tmp_path)

    return make


@pytest.fixture
def updater_with(tmp_path: Path) -> Callable[..., HostUpdater]:
    """``updater_with(file, journal, driver=..., metrics=...)``: not started; the driver is the guard as well."""

    def make(file: HostFile, journal: JournalThread, *, driver: Any, metrics: Any) -> HostUpdater:
        return HostUpdater(
            HostUpdaterSettings(host_file="h.toml", updates_dir=str(tmp_path), state_dir=str(tmp_path)),
            file,
            bus=MemoryBus(MemoryBroker(), client_id="h", filters=[]),
            driver=driver,
            guard=driver,
            journal=journal,
            metrics=metrics,
            pauses=PauseMarkers(tmp_path),
            instance="i",
            environ={},
        )

    return make


@pytest.fixture
def hand() -> Callable[..., Any]:
    """``await hand(updater, command)``: as if the broker had delivered it."""

    async def deliver(updater: HostUpdater, command: StartOperation) -> None:
        topic = channel_of(StartOperation).topic(host=command.host)
        payload = encode(command, source="/c", event_id="e", time=datetime.now(UTC))
        await updater.post.deliver(Delivery(topic, payload))

    return deliver
