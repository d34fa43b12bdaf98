"""A host that names another host's VM, on a broker as it is shipped: the VM stays where it is, and so does everything else."""

from __future__ import annotations

import json
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from caesura.bus.local_broker import LocalBroker
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Delivery
from caesura.contract import messages as m
from caesura.contract.access import Principal, access_rules
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura.runtime.identity import new_id
from caesura.runtime.settings import Secret
from caesura_coordinator.service import Coordinator
from caesura_testing.broker import mosquitto_installed, shipped_mosquitto
from caesura_testing.collector import eventually, running
from caesura_testing.coordinators import leading_coordinator

_FLEET = (
    Principal("coordinator"),
    Principal("host", "h1"),
    Principal("host", "h2"),
    Principal("ctl", "ops"),
    Principal("exporter"),
)
_PASSWORDS = {each.username: f"password of {each.username}" for each in _FLEET}
_OF_VM = m.UpdateRecord(update="guest", impact="pause", scope="vm", expected_s=1.0, timeout_s=5.0)
_OF_HOST = m.UpdateRecord(update="patch", impact="pause", scope="host", expected_s=1.0, timeout_s=5.0)

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")


def options(broker: LocalBroker, user: str, **more: Any) -> BrokerOptions:
    return BrokerOptions(
        url=broker.url, username=user, password=Secret(_PASSWORDS[user]), protocol="5", client_id=user, **more
    )


def vm(name: str, set_name: str, domain: int = 0) -> m.VmRecord:
    return m.VmRecord(
        vm=name, set=set_name, update_domain=domain, state="running", methods=("freeze",), agent=False
    )


class Host:
    """A host's account, and what it says with it."""

    def __init__(self, broker: LocalBroker, name: str) -> None:
        self.name = name
        self.post = MessageClient(MqttBus(options(broker, f"host_{name}")), f"/caesura/host/{name}")

    async def here(self, *, online: bool) -> None:
        await self.post.send(m.HostPresence(host=self.name, online=online, instance="i"), host=self.name)

    async def has(self, *vms: m.VmRecord) -> None:
        await self.post.send(
            m.HostInventory(
                host=self.name,
                driver="process",
                epoch=0,
                vms=vms,
                updates=(_OF_VM, _OF_HOST),
                guard="ready",
                commands=COMMANDS,
            ),
            host=self.name,
        )


class Operator:
    """An operator's account, and a reader's: plans, and what the broker shows of whose VM it is."""

    def __init__(self, broker: LocalBroker) -> None:
        self.bus = MqttBus(options(broker, "ctl_ops"), filters=["caesura/v1/fleet/ctl/ops/answer"])
        self.post = MessageClient(self.bus, "/caesura/ctl/ops")
        self.post.subscribe(m.RequestAnswered, self._keep)
        self.answers: dict[str, m.RequestAnswered] = {}
        self.reader = MqttBus(options(broker, "exporter"), filters=["caesura/v1/fleet/vm/#"])
        self.owners: dict[str, Any] = {}

    async def _keep(self, answer: m.RequestAnswered, _: object) -> None:
        self.answers[answer.request] = answer

    async def read(self, delivery: Delivery) -> None:
        name = delivery.topic.split("/")[4]
        self.owners[name] = json.loads(delivery.payload)["data"] if delivery.payload else None

    async def shows(self, name: str, host: str | None, *rivals: str) -> None:
        def so() -> bool:
            owner = self.owners.get(name)
            if host is None or owner is None:
                return host is None and owner is None
            return bool(owner["host"] == host and owner.get("contested_by", []) == list(rivals))

        try:
            await eventually(so)
        except TimeoutError:
            raise AssertionError(f"{name} is shown as {self.owners.get(name)}") from None

    async def plan(self, update: str, **selection: tuple[str, ...]) -> m.RequestAnswered:
        request = new_id()
        await self.post.send(
            m.RolloutRequested(
                request=request,
                update=update,
                selection=m.Selection(**selection),
                plan_only=True,
            ),
            client="ops",
        )
        await eventually(lambda: request in self.answers)
        return self.answers[request]


def coordinator(broker: LocalBroker, folder: Path) -> AbstractAsyncContextManager[Coordinator]:
    return leading_coordinator(options(broker, "coordinator", clean=False), folder)


def planned(answer: m.RequestAnswered) -> dict[str, str]:
    """VM to the host that it is paused on."""
    assert answer.accepted, answer.reason
    assert answer.plan is not None
    return {each.vm: each.host for wave in answer.plan.waves for each in wave.vms}


async def test_a_host_that_names_anothers_vm_stops_that_vm_only(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(
            shipped_mosquitto("broker", tmp_path, users=_PASSWORDS, acl=access_rules(_FLEET))
        )
        first, thief, operator = Host(broker, "h1"), Host(broker, "h2"), Operator(broker)
        for bus, receive in (
            (first.post.bus, None),
            (thief.post.bus, None),
            (operator.bus, operator.post.deliver),
            (operator.reader, operator.read),
        ):
            await stack.enter_async_context(running(bus, receive))
        async with coordinator(broker, tmp_path) as made:
            for host, vms in ((first, [vm("web-1", "web"), vm("web-2", "web")]), (thief, [vm("db-1", "db")])):
                await host.here(online=True)
                await host.has(*vms)
            await eventually(lambda: len(list(made.fleet.snapshot().vms())) == 3)
            await thief.has(vm("db-1", "db"), vm("web-1", "mine", 7))
            assert planned(await operator.plan("patch")) == {"web-1": "h1", "web-2": "h1", "db-1": "h2"}
            answer = await operator.plan("guest")
            assert planned(answer) == {"web-2": "h1", "db-1": "h2"}
            assert answer.plan is not None
            (skipped,) = answer.plan.skipped
            assert (skipped.vm, skipped.host) == ("web-1", "h1")
            assert "belongs to h1, and h2 names" in skipped.reason
            refused = await operator.plan("guest", vms=("web-1",))
            assert not refused.accepted
            assert "web-1: it belongs to h1" in refused.reason
            await operator.shows("web-1", "h1", "h2")
            await operator.shows("db-1", "h2")
            assert {record.set for _, record in made.fleet.snapshot().vms()} == {"web", "db"}

        # The broker brings what is retained in any order, and the thief's word may come first: the store decides.
        await first.here(online=False)
        async with coordinator(broker, tmp_path) as made:
            await thief.has(vm("web-1", "mine", 7), vm("db-1", "db"))
            refused = await operator.plan("guest", vms=("web-1",))
            assert "web-1: it belongs to h1" in refused.reason
            await first.has(vm("web-2", "web"))
            await operator.shows("web-1", "h1", "h2")  # an offline host releases nothing
            await first.here(online=True)
            await operator.shows("web-1", "h2")
            assert planned(await operator.plan("guest")) == {"web-1": "h2", "web-2": "h1", "db-1": "h2"}
            await thief.has(vm("db-1", "db"))
            await operator.shows("web-1", None)
            # Forgotten for good: what it had is free for who names it.
            await thief.has(vm("db-1", "db"), vm("web-2", "web"))
            await operator.shows("web-2", "h1", "h2")
            await first.here(online=False)
            await eventually(lambda: not made.fleet.is_online("h1"))
            await first.post.clear(m.HostInventory, host="h1")
            await operator.shows("web-2", "h2")


async def test_a_coordinator_without_its_store_takes_up_what_the_bus_shows(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(
            shipped_mosquitto("broker", tmp_path, users=_PASSWORDS, acl=access_rules(_FLEET))
        )
        first, thief, operator = Host(broker, "h1"), Host(broker, "h2"), Operator(broker)
        for bus, receive in (
            (first.post.bus, None),
            (thief.post.bus, None),
            (operator.reader, operator.read),
        ):
            await stack.enter_async_context(running(bus, receive))
        async with coordinator(broker, tmp_path):
            await first.here(online=True)
            await first.has(vm("web-1", "web"))
            await operator.shows("web-1", "h1")
        await thief.here(online=True)
        await thief.has(vm("web-1", "web"), vm("new-1", "web"))
        await first.has(vm("web-1", "web"), vm("new-1", "web"))
        await first.here(online=False)
        (tmp_path / "coordinator.sqlite").unlink()
        async with coordinator(broker, tmp_path) as made:
            await operator.shows("web-1", "h1", "h2")
            await operator.shows("new-1", "", "h1", "h2")
            assert [(host, record.vm) for host, record in made.fleet.snapshot().vms()] == [("h1", "web-1")]
