"""Services of other versions as processes, on one broker with those of this one. What is on the bus is read as JSON: the shapes are
those of whichever version wrote them."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caesura.bus.local_broker import LocalBroker
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Delivery
from caesura.runtime.identity import new_id
from caesura_testing.patience import patient
from caesura_testing.sandbox import Sandbox, Vm

_FOLDER = Path(__file__).parent / "versions"


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A version that runs beside this one."""

    name: str
    start: tuple[str, str] = ("operation/start", "caesura.operation.start.v1")
    """Under which topic of a host, and as which type, it is told to start an operation."""
    speaks: bool = True
    """Whether it reads and sends today's commands: otherwise it must be refused by name."""


THIS = Version(name="")
BEFORE = Version(name="before-0.1.0", start=("freeze", "caesura.freeze.commanded.v1"), speaks=False)
VERSIONS = (BEFORE,)


class Wire:
    """Everything on the bus, as JSON, and a mouth that says any JSON."""

    def __init__(self, bus: MqttBus) -> None:
        self.bus = bus
        self.heard: list[tuple[str, Any]] = []
        self.last: dict[str, Any] = {}
        """Topic to the data of the last message on it."""

    async def receive(self, delivery: Delivery) -> None:
        if delivery.payload:
            data = json.loads(delivery.payload)["data"]
            self.heard.append((delivery.topic, data))
            self.last[delivery.topic] = data

    def of(self, topic: str) -> list[Any]:
        """The data of every message on this topic."""
        return [data for each, data in self.heard if each == topic]

    async def say(self, topic: str, kind: str, data: dict[str, Any]) -> None:
        """Publish a CloudEvent."""
        event = {
            "specversion": "1.0",
            "id": new_id(),
            "source": "/caesura/test",
            "type": kind,
            "time": datetime.now(UTC).isoformat(),
            "data": data,
        }
        await self.bus.publish(topic, json.dumps(event).encode(), qos=1)


class Mixed:
    """A sandbox of which each service has a version."""

    def __init__(self, sandbox: Sandbox, wire: Wire, sources: Callable[[Version], Path | None]) -> None:
        self.sandbox = sandbox
        self.wire = wire
        self._sources = sources

    async def start(self, name: str, version: Version) -> None:
        """Start a service of the sandbox as this version."""
        sources = self._sources(version)
        if sources is None:
            self.sandbox.versions.pop(name, None)
        else:
            self.sandbox.versions[name] = sources
        await self.sandbox.start(name)

    def inventory(self, host: str = "host-1") -> dict[str, Any]:
        """What the host said last."""
        found: dict[str, Any] = self.wire.last.get(f"caesura/v1/host/{host}/inventory", {})
        return found

    async def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
        await self.sandbox.until(holds, timeout_s, what)

    async def up(self, host: str, version: Version) -> None:
        """Start a host updater, until it has said that it is on the bus with a guard."""
        before = len(self.wire.heard)
        topic = f"caesura/v1/host/{host}/inventory"
        await self.start(host, version)
        await self.until(
            lambda: any(
                each == topic and data["guard"] == "ready" and not data["operation"]
                for each, data in self.wire.heard[before:]
            ),
            f"{host} idle, with a guard",
        )
        self.sandbox.watch.learn()

    async def coordinator_up(self, version: Version) -> dict[str, Any]:
        """Start the coordinator, until it has claimed an epoch; its presence."""
        topic = "caesura/v1/fleet/coordinator"
        before = len(self.wire.of(topic))
        await self.start("coordinator", version)

        def claimed() -> dict[str, Any] | None:
            found = [each for each in self.wire.of(topic)[before:] if each["online"] and each["epoch"]]
            return found[-1] if found else None

        await self.until(lambda: claimed() is not None, "the coordinator claims an epoch")
        presence = claimed()
        assert presence is not None
        return presence

    async def hold(self, version: Version, *, hold_s: float, budget_s: float, host: str = "host-1") -> str:
        """Have a host of this version pause all its VMs for so long; the operation."""
        operation = new_id()
        topic, kind = version.start
        vms = self.inventory(host)["vms"]
        await self.wire.say(
            f"caesura/v1/fleet/host/{host}/{topic}",
            kind,
            {
                "operation": operation,
                "epoch": max(1, self.inventory(host)["epoch"]),
                "coordinator": self.inventory(host)["coordinator"] or "c",
                "host": host,
                "rollout": "r",
                "wave": 0,
                "method": "freeze",
                "targets": [
                    {"vm": vm["vm"], "set": vm["set"], "update_domain": vm["update_domain"]} for vm in vms
                ],
                "hold_s": hold_s,
                "budget_s": budget_s,
                "not_after": (datetime.now(UTC) + timedelta(seconds=patient(30))).isoformat(),
            },
        )
        return operation

    async def report(self, operation: str, host: str = "host-1") -> dict[str, Any]:
        """How the operation ended."""

        def ended() -> list[dict[str, Any]]:
            reports = self.wire.of(f"caesura/v1/host/{host}/operation")
            return [
                each for each in reports if each["operation"] == operation and each["status"] != "accepted"
            ]

        await self.until(lambda: bool(ended()), f"the report of {operation}")
        return ended()[-1]

    async def refused_store(self, host: str, operation: str) -> bool:
        """Whether a host updater ended since its journal is of a newer version; waits for that or for its report."""

        def why() -> list[str]:
            return [each["why"] for each in self.logged(host, "service.failed")]

        def reported() -> bool:
            reports = self.wire.of(f"caesura/v1/host/{host}/operation")
            return any(each["operation"] == operation and each["status"] != "accepted" for each in reports)

        await self.until(
            lambda: bool(why()) or reported(), f"{host} reports {operation}, or says why it does not"
        )
        if reported():
            return False
        assert "run the newer version" in why()[-1]
        assert await self.sandbox.until_exit(host, 30) != 0
        return True

    async def ask(self, kind: str = "rollout", **data: Any) -> dict[str, Any]:
        """Ask the coordinator for a rollout (or ``plan_only``), as an operator does; its answer."""
        request = new_id()
        body = {
            "request": request,
            "update": "patch",
            "policy": {"notice_s": 1.0, "budget_s": 8.0, "verify_timeout_s": patient(20.0)},
            "limits": {"again": True},
            **data,
        }
        await self.wire.say("caesura/v1/ctl/ops/start", f"caesura.{kind}.requested.v1", body)

        def answers() -> list[dict[str, Any]]:
            said = self.wire.of("caesura/v1/fleet/ctl/ops/answer")
            return [each for each in said if each["request"] == request]

        await self.until(lambda: bool(answers()), f"an answer to {request}")
        return answers()[-1]

    def rollout(self, rollout: str) -> dict[str, Any]:
        """The rollout as it was published last."""
        found: dict[str, Any] = self.wire.last.get(f"caesura/v1/fleet/rollout/{rollout}", {})
        return found

    async def frozen(self, *vms: str) -> None:
        """Wait until the kernel says that these VMs are paused."""
        await self.until(lambda: set(vms) <= self.sandbox.watch.standing(), f"{', '.join(vms)} paused")

    async def journalled(self, host: str, operation: str) -> None:
        """Wait until the host's journal has the pause: it follows the pause, which waits for no disk."""
        path = f"file:{self.sandbox.folder}/{host}/journal.sqlite?mode=ro"

        def there() -> bool:
            with closing(sqlite3.connect(path, uri=True)) as journal:
                rows = journal.execute("SELECT state FROM operation WHERE id = ?", (operation,)).fetchall()
            state = json.loads(rows[0][0]) if rows and rows[0][0] else {}
            return any(vm.get("frozen_at") is not None for vm in state.get("vms", ()))

        await self.until(there, "the pause in the journal")

    async def running(self) -> None:
        """Wait until the kernel says that no VM is paused."""
        await self.until(lambda: not self.sandbox.watch.frozen(), "every VM runs")

    def logged(self, name: str, event: str) -> list[dict[str, Any]]:
        """Lines of a service's log with this event."""
        return [each for each in self.sandbox.events(name) if each.get("event") == event]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Version], Path | None]:
    """The folder with a version's sources; None for this one."""
    unpacked: dict[str, Path] = {}

    def find(version: Version) -> Path | None:
        if version is THIS:
            return None
        if version.name not in unpacked:
            folder = tmp_path_factory.mktemp(version.name)
            with tarfile.open(_FOLDER / f"{version.name}.tar.xz") as archive:
                archive.extractall(folder, filter="data")
            unpacked[version.name] = folder
        return unpacked[version.name]

    return find


@pytest.fixture
async def mixed(
    broker: LocalBroker, sources: Callable[[Version], Path | None]
) -> AsyncIterator[Callable[..., Mixed]]:
    """Make a sandbox with a coordinator and hosts, none of them started: ``mixed(host_1=[Vm, ...])``."""
    async with AsyncExitStack() as stack:
        bus = MqttBus(BrokerOptions(url=broker.url, client_id="wire"), filters=["caesura/v1/#"])
        wire = Wire(bus)
        listening = asyncio.create_task(bus.run(wire.receive), name="wire")
        assert await bus.wait_connected(patient(10))
        sandbox = await stack.enter_async_context(Sandbox(broker))

        def make(**hosts: list[Vm]) -> Mixed:
            sandbox.coordinator()
            sandbox.update("patch", ["sleep", "1"])
            for name, vms in hosts.items():
                sandbox.host(name.replace("_", "-"), *vms)
            return Mixed(sandbox, wire, sources)

        yield make
        await bus.close()
        await listening


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
def other(request: pytest.FixtureRequest) -> Version:
    """Each version that runs beside this one."""
    version: Version = request.param
    return version


@pytest.fixture
def this() -> Version:
    return THIS
