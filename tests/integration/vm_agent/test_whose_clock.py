"""A host that answers for another host's guest, on a broker as it is shipped: the guest's clock stays right."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from caesura.bus.local_broker import LocalBroker
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Delivery
from caesura.contract.access import Principal, access_rules
from caesura.contract.codec import decode
from caesura.contract.messages import (
    AgentClockSynced,
    ClockSyncAnswered,
    ClockSyncRequested,
)
from caesura.runtime.settings import Secret
from caesura_testing.broker import mosquitto_installed, shipped_mosquitto
from caesura_testing.collector import eventually, running
from caesura_testing.patience import patient
from caesura_vm_agent.ntp import NS_PER_S
from caesura_vm_agent.service import VmAgent, filters
from caesura_vm_agent.settings import VmAgentSettings

pytestmark = pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed")

HOUR_S = 3600


class Guest:
    """A guest clock of the test's making, right at first."""

    simulated = True

    def __init__(self) -> None:
        self.error_ns = 0

    def now_ns(self) -> int:
        return time.time_ns() + self.error_ns

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def step(self, by_ns: int) -> None:
        self.error_ns += by_ns

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()


class Host:
    """A host's account; it answers every clock request that it may read, off by so much."""

    def __init__(self, bus: MqttBus, name: str, off_s: float) -> None:
        self.bus = bus
        self.name = name
        self.off_ns = round(off_s * NS_PER_S)
        self.post = MessageClient(self.bus, f"/caesura/host/{name}")
        self.asked = self.answered = 0
        self.after: Host | None = None
        """The host that answers before this one."""
        self.found: list[AgentClockSynced] = []

    async def receive(self, delivery: Delivery) -> None:
        now_ns = time.time_ns() + self.off_ns
        message = decode(delivery.topic, delivery.payload).message
        if isinstance(message, AgentClockSynced):
            self.found.append(message)
        if not isinstance(message, ClockSyncRequested):
            return
        self.asked += 1
        if (other := self.after) is not None:
            await eventually(lambda: other.answered >= self.asked)
        answer = ClockSyncAnswered(
            vm=message.vm,
            host=self.name,
            exchange=message.exchange,
            t1_ns=message.t1_ns,
            t2_ns=now_ns,
            t3_ns=time.time_ns() + self.off_ns,
        )
        await self.post.send(answer, host=self.name, vm=message.vm)
        self.answered += 1


@asynccontextmanager
async def fleet(folder: Path, *, vm: Principal, hosts: dict[str, float]) -> AsyncIterator[Any]:
    """A broker as it is shipped, and hosts that answer."""
    users = [vm, Principal("coordinator"), *(Principal("host", name) for name in hosts)]
    passwords = {each.username: f"password of {each.username}" for each in users}

    def bus(user: str, filters: tuple[str, ...] = ()) -> MqttBus:
        options = BrokerOptions(
            url=broker.url, username=user, password=Secret(passwords[user]), protocol="5", client_id=user
        )
        return MqttBus(options, filters=filters)

    broker: LocalBroker = shipped_mosquitto("broker", folder, users=passwords, acl=access_rules(users))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(broker)
        made = {
            name: Host(bus(f"host_{name}", ("caesura/v1/vm/#",)), name, off_s)
            for name, off_s in hosts.items()
        }
        for each in made.values():
            await stack.enter_async_context(running(each.bus, each.receive))
        yield bus, made


@asynccontextmanager
async def agent(bus: Any, **settings: Any) -> AsyncIterator[tuple[VmAgent, Guest]]:
    """An agent that checks its clock all the time."""
    chosen = VmAgentSettings(
        vm="web-1",
        set="web",
        sync_answer_timeout_s=patient(2),
        sync_interval_s=0.05,
        canary_bytes=0,
        **settings,
    )
    guest = Guest()
    made = VmAgent(chosen, bus("vm_web-1", filters(chosen)), guest, boot_id="boot-1")
    tasks = [asyncio.ensure_future(each()) for each in (made.run_bus, made.run_clock, made.run_publisher)]
    try:
        yield made, guest
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await made.drain()


@pytest.mark.parametrize("bound", ["by configuration", "by the record", "by access rules"])
async def test_a_foreign_host_steps_no_clock(tmp_path: Path, bound: str) -> None:
    user = Principal("vm", "web-1", "web", host="h1" if bound == "by access rules" else "")
    async with fleet(tmp_path, vm=user, hosts={"h1": 0.0, "thief": HOUR_S}) as (bus, hosts):
        hosts["h1"].after = hosts["thief"]
        if bound == "by the record":
            coordinator = bus("coordinator")
            owner = b'{"vm":"web-1","host":"h1","epoch":1}'
            envelope = (
                b'{"specversion":"1.0","id":"1","source":"/c","type":"caesura.vm.owner.v1",'
                b'"time":"2026-04-20T22:11:58Z","data":' + owner + b"}"
            )
            async with running(coordinator):
                await coordinator.publish("caesura/v1/fleet/vm/web-1/owner", envelope, retain=True)
        settings: dict[str, Any] = {"host": "h1"} if bound == "by configuration" else {}
        # However far it may be stepped: it is the host that is not believed, and not the step.
        settings["sync_step_most_s"] = 1e6
        async with agent(bus, **settings) as (_, guest):
            await eventually(lambda: sum(each.synced for each in hosts["h1"].found) >= 5)
            await eventually(lambda: hosts["thief"].asked >= 20)
            assert abs(guest.error_ns) < 10 * NS_PER_S
        assert all(each.synced for each in hosts["h1"].found[-3:])


RESUMED = (
    b'{"specversion":"1.0","id":"1","source":"/h","type":"caesura.vm.resumed.v1","time":"2026-04-20T22:11:58Z","data":'
    b'{"vm":"web-1","host":"h1","set":"web","update_domain":0,"operation":"op1","method":"freeze","pause_s":5,'
    b'"budget_s":9,"within_budget":true,"resumed_by":"updater","at":"2026-04-20T22:11:58Z"}}'
)


async def test_outside_a_resume_a_clock_is_not_stepped_by_an_hour_and_inside_one_it_is(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path, vm=Principal("vm", "web-1", "web"), hosts={"h1": HOUR_S}) as (bus, hosts):
        host = hosts["h1"]
        async with agent(bus, host="h1") as (made, guest):
            await eventually(lambda: len(host.found) >= 2)
            assert guest.error_ns == 0
            assert [each.synced for each in host.found[:2]] == [False, False]
            assert host.found[0].refused_step_s == pytest.approx(-HOUR_S, abs=5)
            assert "outside a resume" in host.found[0].reason
            assert made.steps_refused >= 2
            await host.bus.publish("caesura/v1/host/h1/set/web/ud/0/vm/web-1/resumed", RESUMED)
            await eventually(lambda: any(each.trigger == "resume" and each.synced for each in host.found))
            assert guest.error_ns == pytest.approx(HOUR_S * NS_PER_S, abs=5 * NS_PER_S)


async def test_where_no_record_names_its_host_nobodys_resume_steps_a_clock_by_an_hour(tmp_path: Path) -> None:
    """Any host's password could announce one. A real pause is at most 30 s, and is still corrected."""
    async with fleet(tmp_path, vm=Principal("vm", "web-1", "web"), hosts={"h1": HOUR_S}) as (bus, hosts):
        host = hosts["h1"]
        async with agent(bus) as (made, guest):
            await eventually(lambda: bool(host.found))
            await host.bus.publish("caesura/v1/host/h1/set/web/ud/0/vm/web-1/resumed", RESUMED)
            await eventually(lambda: any(each.trigger == "resume" for each in host.found))
            (found,) = (each for each in host.found if each.trigger == "resume")
            assert (found.synced, guest.error_ns) == (False, 0)
            assert found.refused_step_s == pytest.approx(-HOUR_S, abs=5)
            assert "no record" in found.reason
            assert made.binding.host is None
            host.off_ns = 30 * NS_PER_S
            again = RESUMED.replace(b'"op1"', b'"op2"').replace(b'"id":"1"', b'"id":"2"')
            await host.bus.publish("caesura/v1/host/h1/set/web/ud/0/vm/web-1/resumed", again)
            await eventually(lambda: any(each.operation == "op2" and each.synced for each in host.found))
            assert guest.error_ns == pytest.approx(30 * NS_PER_S, abs=5 * NS_PER_S)
