"""A host with more VMs than a message holds: it says so, goes on, and stays in everybody's fence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from caesura.bus.memory import MemoryBus
from caesura.contract.codec import decode, size_bytes
from caesura.contract.fitting import fits, fitted
from caesura.contract.messages import (
    MOST_TARGETS,
    HostInventory,
    OperationReported,
    OperationTarget,
    StartOperation,
    VmRecord,
)
from caesura.testing.collector import Collector, eventually, running
from caesura_host_updater.command import Authority
from caesura_host_updater.drivers.port import Capabilities
from caesura_host_updater.hostfile import HostFile, HostFileError, VmSpec, parse_host_file
from caesura_host_updater.inventory import TOO_MANY_VMS, inventory
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation_state import Operation, VmPause
from caesura_host_updater.report import final_report, unreportable
from caesura_host_updater.service import HostUpdater
from caesura_host_updater.updates import Catalogue

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def record(number: int, **changes: Any) -> VmRecord:
    facts: dict[str, Any] = {
        "vm": f"web-{number:04d}",
        "set": "web",
        "update_domain": 0,
        "state": "running",
        "state_detail": "it is as it is; " * 50,
        "methods": ("live", "swap", "freeze", "replace"),
        "methods_missing": {"kexec": "no other kernel; " * 50},
        "clock": "system",
        "proofs": dict.fromkeys(
            ("swap", "freeze", "replace"),
            ("digest_equal", "sampled_digest_equal", "canary_equal", "not_rebooted"),
        ),
    }
    return VmRecord(**(facts | changes))


def inventory_of(count: int) -> HostInventory:
    return inventory(
        "host-1",
        "qemu",
        "9.1",
        authority=Authority(7, "c"),
        vms={f"web-{number:04d}": record(number) for number in range(count)},
        catalogue=Catalogue({}),
        operation="",
        guard="ready",
    )


def test_texts_give_way_before_facts() -> None:
    few, many = inventory_of(3), inventory_of(300)
    assert few.vms[0] == record(0), "nothing is cut without need"
    assert fits(many)
    for number, vm in enumerate(many.vms):
        assert vm.state_detail.endswith("…")
        assert vm.methods_missing["kexec"].startswith("no other kernel")
        cut = {"state_detail": vm.state_detail, "methods_missing": vm.methods_missing}
        assert vm == record(number, **cut), "all else is as it was"


def test_too_many_vms_are_all_there_and_none_can_be_updated() -> None:
    crowd = inventory_of(MOST_TARGETS)
    assert fits(crowd)
    assert [vm.vm for vm in crowd.vms] == [f"web-{number:04d}" for number in range(MOST_TARGETS)]
    assert {(vm.state, vm.methods) for vm in crowd.vms} == {("running", ())}
    assert crowd.driver_detail.startswith(TOO_MANY_VMS)
    assert (crowd.epoch, crowd.coordinator, crowd.guard) == (7, "c", "ready")


def test_what_fits_is_not_touched() -> None:
    report = OperationReported(operation="o", host="h", epoch=1, status="refused", reason="x" * 4096, at=NOW)
    assert fitted(report) is report


@pytest.mark.parametrize("count", [MOST_TARGETS, MOST_TARGETS + 1])
def test_a_host_file_with_more_vms_than_a_command_names_is_refused(count: int) -> None:
    vms = "".join(f'[[vm]]\nname = "v{number}"\n[[vm.process]]\nargv = ["x"]\n' for number in range(count))
    text = f'host = "h"\n{vms}'
    if count <= MOST_TARGETS:
        assert len(parse_host_file(text, "h.toml").vm) == count
    else:
        with pytest.raises(HostFileError, match="1025 VMs; one operation holds at most 1024"):
            parse_host_file(text, "h.toml")


class Driver:
    """A driver of as many VMs as are asked for, and the guard."""

    name = "made-up"
    on_lost: Any = None
    state = "ready"

    def __init__(self, missing: str) -> None:
        self.missing = missing

    async def run(self) -> None:
        """The guard: not started."""

    def resume_plan(self, _: str) -> None:
        return None

    def ping(self) -> str:
        return ""

    def detail(self) -> str:
        return ""

    def complaint(self, _: str) -> str:
        return ""

    async def read_states(self) -> dict[str, str]:
        return {}

    def capabilities(self, _: str) -> Capabilities:
        return Capabilities(methods=("freeze",), missing={"swap": self.missing}, clock="none")


@pytest.mark.parametrize("name_length", [10, 62])
async def test_the_updater_does_not_end_for_it(
    name_length: int, tmp_path: Path, updater_with: Callable[..., HostUpdater]
) -> None:
    """With the longest names not even the bare list of VMs fits: what was published before stays, and the probe says why."""
    names = [f"v{number:04d}".ljust(name_length, "x") for number in range(MOST_TARGETS)]
    vms = tuple(VmSpec(name=name, set="s" * name_length, update_domain=0) for name in names)
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))
    updater = updater_with(
        HostFile(host="host-1", vm=vms), journal, driver=Driver("no " * 300), metrics=SimpleNamespace()
    )
    broker = updater.bus._broker  # type: ignore[attr-defined]
    got = Collector()
    ear = MemoryBus(broker, client_id="ear", filters=["caesura/v1/host/+/inventory"])
    with capture_logs() as logs:
        async with running(updater.bus), running(ear, got.receive):
            keeping = asyncio.ensure_future(updater.tasks()["inventory"]())
            await eventually(lambda: bool(updater.pings()["inventory"]()) or keeping.done())
            for _ in range(3):  # not once only: nothing changes, and it is said once
                updater._changed.set()
                await asyncio.sleep(0)
            assert not keeping.done()
            assert TOO_MANY_VMS in updater.pings()["inventory"]()
            keeping.cancel()
    assert sum(each["event"] == "inventory.too_large" for each in logs) == 1
    if name_length == 10:
        message = decode(got.deliveries[0].topic, got.deliveries[0].payload).message
        assert isinstance(message, HostInventory)
        assert len(message.vms) == MOST_TARGETS
    else:
        assert got.deliveries == []
    await journal.close()


def operation(count: int, text: str) -> Operation:
    return Operation(
        operation="op",
        method="freeze",
        budget_s=10.0,
        hold_s=1.0,
        update="",
        update_timeout_s=0.0,
        vms=tuple(
            VmPause(
                vm=f"web-{number:04d}",
                set="web",
                update_domain=0,
                event_id="",
                frozen_at=1.0,
                end="running",
                error=text,
                detail=text,
                digest_note=text,
            )
            for number in range(count)
        ),
        runs=(),
    )


def targets(count: int) -> tuple[OperationTarget, ...]:
    return tuple(
        OperationTarget(vm=f"web-{number:04d}", set="web", update_domain=0) for number in range(count)
    )


def test_a_report_on_many_vms_can_be_sent(freeze_one: Callable[..., StartOperation]) -> None:
    """Without its one report an operation has no end for its coordinator, whatever became of it."""
    count = 600
    command = freeze_one(targets=targets(count))
    assert unreportable(command, NOW) == ""
    report = final_report("host-1", command, operation(count, "it went wrong " * 20), 1, {}, NOW)
    assert fits(report), size_bytes(report)
    assert [vm.vm for vm in report.vms] == [target.vm for target in command.targets]


def test_an_operation_whose_end_could_not_be_reported_does_not_begin(
    freeze_one: Callable[..., StartOperation],
) -> None:
    why = unreportable(freeze_one(targets=targets(MOST_TARGETS)), NOW)
    assert "1024 VMs does not fit into a message" in why
    assert "pause fewer at a time" in why
    shortest = msgspec.structs.replace(freeze_one(), targets=targets(1))
    assert unreportable(shortest, NOW) == ""
