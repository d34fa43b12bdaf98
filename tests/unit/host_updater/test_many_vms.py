"""A host with many VMs: its inventory in parts, its reports within a message, its file refused where it has too many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from structlog.testing import capture_logs

from caesura.bus.memory import MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.port import BusUnavailable, PublishRefused
from caesura.contract.codec import Oversized, decode
from caesura.contract.envelope import Message
from caesura.contract.fitting import fits, fitted
from caesura.contract.messages import (
    MOST_PARTS,
    MOST_TARGETS,
    HostInventory,
    InventoryPart,
    OperationReported,
    OperationTarget,
    StartOperation,
    VmRecord,
)
from caesura.contract.parts import Joiner, inventory_in_parts
from caesura_host_updater.drivers.port import Capabilities
from caesura_host_updater.epoch_authority import EpochAuthority
from caesura_host_updater.inventory.builder import inventory
from caesura_host_updater.inventory.host_config import HostFile, HostFileError, parse_host_file
from caesura_host_updater.inventory.publisher import InventoryPublisher
from caesura_host_updater.inventory.updates import Catalogue
from caesura_host_updater.inventory.vm_spec import VmSpec
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.operation.facts import FactFactory
from caesura_host_updater.operation.report import final_report
from caesura_host_updater.operation.state import Operation, VmPause
from caesura_host_updater.service import HostUpdater
from caesura_testing.collector import Collector, eventually, running

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
        authority=EpochAuthority(7, "c"),
        vms={f"web-{number:04d}": record(number) for number in range(count)},
        catalogue=Catalogue({}),
        operation="",
        guard="ready",
    )


def test_a_few_vms_are_one_message() -> None:
    few = inventory_of(3)
    assert inventory_in_parts(few) == (few, [])


def test_many_vms_come_in_parts_with_every_word_of_theirs() -> None:
    whole = inventory_of(MOST_TARGETS)
    head, parts = inventory_in_parts(whole)
    assert fits(head)
    assert all(fits(each) for each in parts)
    assert head == msgspec.structs.replace(whole, vms=(), part_etags=tuple(each.etag for each in parts))
    assert tuple(vm for each in parts for vm in each.vms) == whole.vms
    assert [each.part for each in parts] == list(range(1, len(parts) + 1))


def test_a_part_in_which_nothing_changed_has_the_same_etag() -> None:
    whole = inventory_of(300)
    vms = list(whole.vms)
    vms[-1] = msgspec.structs.replace(vms[-1], state="paused")
    before = inventory_in_parts(whole)[1]
    after = inventory_in_parts(msgspec.structs.replace(whole, vms=tuple(vms)))[1]
    assert len(after) == len(before) > 2
    assert [one.etag == two.etag for one, two in zip(before, after, strict=True)] == [
        *[True] * (len(before) - 1),
        False,
    ]


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

    def pause_risk(self, _vm: str) -> str:
        return ""

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

    def health_error(self, _: str) -> str:
        return ""

    async def read_states(self) -> dict[str, str]:
        return {}

    def capabilities(self, _: str) -> Capabilities:
        return Capabilities(methods=("freeze",), missing={"swap": self.missing}, clock="none")


async def test_the_updater_publishes_the_parts_before_the_inventory_that_names_them(
    tmp_path: Path, updater_with: Callable[..., HostUpdater]
) -> None:
    names = [f"v{number:04d}".ljust(62, "x") for number in range(MOST_TARGETS)]
    vms = tuple(VmSpec(name=name, set="s" * 62, update_domain=0) for name in names)
    journal = JournalThread()
    await journal.open(str(tmp_path / "journal.sqlite"))
    updater = updater_with(
        HostFile(host="host-1", vm=vms), journal, driver=Driver("no " * 300), metrics=SimpleNamespace()
    )
    broker = updater.bus._broker  # type: ignore[attr-defined]
    got = Collector()
    ear = MemoryBus(broker, client_id="ear", filters=["caesura/v1/host/+/inventory/#"])
    async with running(updater.bus), running(ear, got.receive):
        keeping = asyncio.ensure_future(updater.tasks()["inventory"]())
        await eventually(lambda: any(each.topic.endswith("/inventory") for each in got.deliveries))
        keeping.cancel()
    received = [decode(each.topic, each.payload) for each in got.deliveries]
    joiner = Joiner()
    wholes = [joiner.take(each) for each in received]
    assert [each is not None for each in wholes] == [*[False] * (len(wholes) - 1), True]
    whole = wholes[-1].message if wholes[-1] is not None else None
    assert isinstance(whole, HostInventory)
    assert [vm.vm for vm in whole.vms] == names
    assert updater.pings()["inventory"]() == ""
    await journal.close()


class Heard:
    """What a publisher's post is given."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.refused = False
        self.on_sent: Callable[[Message], object] = lambda _: None
        """What happens between a message and its acknowledgement."""

    async def send(self, message: Message, **parameters: str | int) -> None:
        if self.refused:
            raise Oversized("t", "300000 bytes")
        self.sent.append((type(message).TYPE.split(".")[2], int(parameters.get("part", 0))))
        self.on_sent(message)

    async def clear(self, _: type[Message], **parameters: str | int) -> None:
        self.sent.append(("cleared", int(parameters["part"])))

    def new(self) -> list[tuple[str, int]]:
        sent, self.sent = self.sent, []
        return sent


async def test_only_parts_that_changed_are_sent_again_and_those_too_many_removed() -> None:
    heard = Heard()
    publisher = InventoryPublisher("host-1", cast("MessageClient", heard))
    whole = inventory_of(300)
    parts = len(inventory_in_parts(whole)[1])
    await publisher.publish(whole)
    everything = [*(("inventory-part", number) for number in range(1, parts + 1)), ("inventory", 0)]
    assert heard.new() == everything
    await publisher.publish(whole)
    assert heard.new() == [("inventory", 0)]
    publisher.connected()
    await publisher.publish(whole)
    assert heard.new() == everything, "a broker may have lost them"
    await publisher.publish(inventory_of(3))
    assert heard.new() == [("inventory", 0), *(("cleared", number) for number in range(1, parts + 1))]
    assert publisher.retained(InventoryPart(host="host-1", part=9, etag="0" * 12, vms=()))
    await publisher.publish(inventory_of(3))
    assert heard.new() == [("inventory", 0), ("cleared", 9)], "an earlier run left it"


async def test_parts_that_somebody_removes_or_overwrites_are_published_again() -> None:
    """As an operator does who makes the fleet forget a host that is on the bus after all."""
    heard = Heard()
    publisher = InventoryPublisher("host-1", cast("MessageClient", heard))
    whole = inventory_of(300)
    parts = inventory_in_parts(whole)[1]
    await publisher.publish(whole)
    heard.new()
    assert not publisher.retained(parts[0]), "its own comes back to it"
    assert publisher.removed(1)
    assert publisher.retained(msgspec.structs.replace(parts[1], etag="0" * 12))
    assert not publisher.removed(99)
    await publisher.publish(whole)
    assert heard.new() == [("inventory-part", 1), ("inventory-part", 2), ("inventory", 0)]


async def test_a_part_that_comes_back_before_it_is_acknowledged_is_known() -> None:
    """A broker delivers it first: the inventory would be published once more for each part."""
    publisher = InventoryPublisher("host-1", cast("MessageClient", heard := Heard()))
    again = []

    def comes_back(message: Message) -> None:
        if isinstance(message, InventoryPart):
            again.append(publisher.retained(message))

    heard.on_sent = comes_back
    await publisher.publish(inventory_of(300))
    assert again
    assert not any(again)


async def test_a_part_that_somebody_overwrites_before_it_is_acknowledged_is_published_again() -> None:
    publisher = InventoryPublisher("host-1", cast("MessageClient", heard := Heard()))

    def overwritten(message: Message) -> None:
        if isinstance(message, InventoryPart) and message.part == 2:
            publisher.retained(message)  # its own comes back to it
            assert publisher.retained(msgspec.structs.replace(message, etag="0" * 12))

    heard.on_sent = overwritten
    await publisher.publish(inventory_of(300))
    heard.new()
    heard.on_sent = lambda _: None
    await publisher.publish(inventory_of(300))
    assert heard.new() == [("inventory-part", 2), ("inventory", 0)]


async def test_a_part_that_was_not_acknowledged_is_sent_again() -> None:
    publisher = InventoryPublisher("host-1", cast("MessageClient", heard := Heard()))

    def lost(message: Message) -> None:
        if isinstance(message, InventoryPart) and message.part == 2:
            raise BusUnavailable("the broker did not acknowledge it in time")

    heard.on_sent = lost
    await publisher.publish(inventory_of(300))
    heard.new()
    heard.on_sent = lambda _: None
    await publisher.publish(inventory_of(300))
    assert heard.new()[0] == ("inventory-part", 2)


async def test_a_part_that_may_not_be_removed_leaves_the_inventory_published() -> None:
    heard = Heard()
    publisher = InventoryPublisher("host-1", cast("MessageClient", heard))
    await publisher.publish(inventory_of(300))

    async def refused(*_: object, **__: object) -> None:
        raise PublishRefused("t", "not authorized")

    heard.clear = refused  # type: ignore[method-assign]
    with capture_logs() as logs:
        await publisher.publish(inventory_of(3))
    assert publisher.ping() == ""
    assert {each["event"] for each in logs} == {"inventory.part_not_removed"}


async def test_an_inventory_that_cannot_be_sent_is_said_once_and_shows_in_the_probe() -> None:
    heard = Heard()
    publisher = InventoryPublisher("host-1", cast("MessageClient", heard))
    heard.refused = True
    with capture_logs() as logs:
        await publisher.publish(inventory_of(3))
        await publisher.publish(inventory_of(3))
    assert [each["event"] for each in logs] == ["inventory.too_large"]
    assert "take updates out of updates.d" in publisher.ping()
    heard.refused = False
    await publisher.publish(inventory_of(3))
    assert publisher.ping() == ""


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


@pytest.mark.parametrize("text", ["", "it went wrong " * 20, "\0" * 5000])
def test_a_report_on_many_vms_comes_in_parts(freeze_one: Callable[..., StartOperation], text: str) -> None:
    """Without its one report an operation has no end for its coordinator, whatever became of it."""
    command = freeze_one(targets=targets(MOST_TARGETS))
    report = final_report("host-1", command, operation(MOST_TARGETS, text), 1, {}, NOW)
    messages = FactFactory("host-1").report(report)
    assert (len(messages) > 1) == (not fits(report))
    assert len(messages) <= MOST_PARTS + 1
    assert len({each.event_id for each in messages}) == len(messages)
    joiner = Joiner()
    joined = [joiner.take(decode(each.topic, each.payload)) for each in messages]
    assert [each is not None for each in joined] == [*[False] * (len(messages) - 1), True]
    whole = joined[-1].message if joined[-1] is not None else None
    assert whole == msgspec.structs.replace(report, vm_parts=len(messages) - 1)
    assert [vm.vm for vm in report.vms] == [target.vm for target in command.targets]


def test_a_report_on_a_few_vms_is_one_message(freeze_one: Callable[..., StartOperation]) -> None:
    command = freeze_one(targets=targets(3))
    report = final_report("host-1", command, operation(3, "it went wrong"), 1, {}, NOW)
    (message,) = FactFactory("host-1").report(report)
    assert message.read() == report


def test_reports_whose_parts_never_come_are_not_kept() -> None:
    joiner = Joiner()
    for number in range(1000):
        head = OperationReported(
            operation=f"o{number}", host="h", epoch=1, status="completed", vm_parts=2, at=NOW
        )
        (message,) = FactFactory("h").report(head)
        assert joiner.take(decode(message.topic, message.payload)) is None
    assert len(joiner.waiting()) <= 16
