"""One guest's password sends as much as it can, on a broker as it is shipped: its host still gets its commands, an operator his plan.

Bounds are counts of messages, not seconds: how long a reader takes for what was queued before it unsubscribed is a matter of the
machine, that nothing is queued afterwards is not. Timeouts only say that something hangs.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from caesura.bus import base
from caesura.bus.local_broker import LocalBroker
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Bus, BusUnavailable
from caesura.bus.rates import LIMITS, Limit, Rates
from caesura.contract import messages as m
from caesura.contract.access import Principal, access_rules
from caesura.contract.codec import encode
from caesura.contract.topics import channel_of
from caesura.runtime.identity import new_id
from caesura.runtime.settings import Secret
from caesura_testing.broker import mosquitto_installed, shipped_mosquitto
from caesura_testing.collector import eventually, running
from caesura_testing.coordinators import leading_coordinator
from caesura_testing.patience import patient

pytestmark = [
    pytest.mark.skipif(not mosquitto_installed(), reason="mosquitto is not installed"),
    pytest.mark.timeout(400),
]

_USERS = (
    Principal("coordinator"),
    Principal("host", "h1"),
    Principal("ctl", "ops"),
    Principal("ctl", "thief"),
    Principal("vm", "web-1", "web"),
    Principal("vm", "web-2", "web"),
)
_RATES = {party: Limit(per_s=0.001, burst=each.burst) for party, each in LIMITS.items()}
"""The rates as they are, but nothing comes back: on a slow machine a flood is no more than what is granted a second."""
_HANG_S = patient(180)
_STRAY = 200
"""Messages of a flood that may still arrive when it was unsubscribed from: what the broker had begun to send, and no more."""
_PASSWORDS = {each.username: f"password of {each.username}" for each in _USERS}

# MQTT 3.1.1 by hand: a client in Python would be slower than the broker. Each batch waits for its PUBACKs (4 bytes each), so that
# what is on its way is bounded, however slow the machine.
_FLOODER = r"""
import socket, struct, sys
port, user, password, topic = int(sys.argv[1]), *sys.argv[2:5]
payload = sys.stdin.buffer.read()
def text(each): return struct.pack("!H", len(each)) + each.encode()
def packet(kind, body):
    size, head = len(body), bytearray([kind])
    while True:
        size, digit = divmod(size, 128)
        head.append(digit | (0x80 if size else 0))
        if not size: return bytes(head) + body
link = socket.create_connection(("127.0.0.1", port))
link.sendall(packet(0x10, text("MQTT") + b"\x04\xc2\x00\x3c" + text(user) + text(user) + text(password)))
assert link.recv(4)[3] == 0
batch = b"".join(packet(0x32, text(topic) + struct.pack("!H", number) + payload) for number in range(1, 201))
print("on", flush=True)
while True:
    link.sendall(batch)
    due = 4 * 200
    while due:
        due -= len(link.recv(due)) or sys.exit("the broker closed the connection")
"""


@pytest.fixture(autouse=True)
def muted_for_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is muted stays so: on a slow machine its time would end within a test, and the next burst would be counted."""
    monkeypatch.setattr(base, "MUTED_S", 3600.0)


async def until_quiet(bus: Bus, ask: Callable[[], Awaitable[None]]) -> None:
    """Ask until an answer comes before nearly everything else: what was queued first is handled, and no more comes.

    Raises:
        TimeoutError: each answer comes behind a flood, for as long as only a hang takes.
    """
    async with asyncio.timeout(_HANG_S):
        while True:
            before = bus.stats.received
            await ask()
            if bus.stats.received - before < _STRAY:
                return


async def until_answered(send: Callable[[], Awaitable[None]], wanted: str, among: list[str]) -> None:
    """Send until it is answered, as every sender of a command does: the broker's queue may be full.

    Raises:
        TimeoutError: it is not, for as long as only a hang takes.
    """
    async with asyncio.timeout(_HANG_S):
        while wanted not in among:
            with suppress(BusUnavailable):
                await send()
            with suppress(TimeoutError):
                await eventually(lambda: wanted in among, 1.0)


def options(broker: LocalBroker, user: str, **more: Any) -> BrokerOptions:
    return BrokerOptions(
        url=broker.url, username=user, password=Secret(_PASSWORDS[user]), protocol="5", client_id=user, **more
    )


@asynccontextmanager
async def flood(broker: LocalBroker, topic: str, payload: bytes) -> AsyncIterator[None]:
    """A guest that sends this for the block, as fast as the broker takes it."""
    words = [str(broker.port), "vm_web-1", _PASSWORDS["vm_web-1"], topic]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _FLOODER,
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(payload)
        process.stdin.close()
        assert await process.stdout.readline() == b"on\n"
        yield
        assert process.returncode is None, "it went on to the end"
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def message(body: Any) -> bytes:
    return encode(body, source="/test", event_id=new_id(), time=datetime.now(UTC))


def freeze(number: int) -> m.StartOperation:
    return m.StartOperation(
        operation=f"o{number}",
        epoch=1,
        coordinator="c",
        host="h1",
        rollout="r",
        wave=0,
        method="freeze",
        targets=(m.OperationTarget(vm="web-1", set="web", update_domain=0),),
        budget_s=5,
        hold_s=1,
        not_after=datetime.now(UTC) + timedelta(seconds=60),
    )


async def test_a_flooding_guest_keeps_its_host_from_no_command(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(
            shipped_mosquitto("broker", tmp_path, users=_PASSWORDS, acl=access_rules(_USERS))
        )
        filters = [channel_of(m.StartOperation).filter(host="h1")]
        for vm in ("web-1", "web-2"):
            filters += [
                channel_of(kind).filter(vm=vm)
                for kind in (m.AgentPresence, m.AgentClockSynced, m.ClockSyncRequested)
            ]
        host = MqttBus(options(broker, "host_h1"), filters=filters, rates=Rates(_RATES))
        post = MessageClient(host, "/caesura/host/h1")
        commands: list[str] = []
        others: list[str] = []

        async def on_freeze(command: m.StartOperation, _: object) -> None:
            commands.append(command.operation)

        async def on_agent(presence: m.AgentPresence, _: object) -> None:
            others.append(presence.vm)

        post.subscribe(m.StartOperation, on_freeze)
        post.subscribe(m.AgentPresence, on_agent)
        coordinator = MessageClient(MqttBus(options(broker, "coordinator")), "/caesura/c")
        neighbour = MessageClient(MqttBus(options(broker, "vm_web-2")), "/caesura/vm/web-2")
        for bus, receive in ((host, post.deliver), (coordinator.bus, None), (neighbour.bus, None)):
            await stack.enter_async_context(running(bus, receive))
        payload = message(
            m.AgentClockSynced(vm="web-1", boot_id="b", trigger="periodic", synced=True, reason="x" * 500)
        )
        async with flood(broker, "caesura/v1/vm/web-1/clock-synced", payload):
            # Above what may be handled: from then on the flood is in the way of everything, if it is at all.
            await eventually(lambda: host.stats.refused.get("vm", 0) > 0, _HANG_S)
            numbers = count()

            async def command() -> None:
                made = freeze(next(numbers))
                await until_answered(partial(coordinator.send, made, host="h1"), made.operation, commands)

            # The first comes behind what was queued by then, others behind nothing.
            await until_quiet(host, command)
            before = host.stats.received
            for _ in range(3):
                await command()
            await neighbour.send(m.AgentPresence(vm="web-2", online=True, boot_id="b"), vm="web-2")
            await eventually(lambda: "web-2" in others, _HANG_S)
            assert host.stats.received - before < _STRAY
            assert host.stats.connects == 1
            assert host.stats.refused["vm"] > 0


def operator_of(broker: LocalBroker) -> tuple[MessageClient, list[str]]:
    """An operator's connection, and the ids of the requests that were answered."""
    asking = MessageClient(
        MqttBus(options(broker, "ctl_ops"), filters=["caesura/v1/fleet/ctl/ops/answer"]), "/caesura/ctl/ops"
    )
    answers: list[str] = []

    async def on_answer(answer: m.RequestAnswered, _: object) -> None:
        answers.append(answer.request)

    asking.subscribe(m.RequestAnswered, on_answer)
    return asking, answers


async def test_a_flooding_guest_keeps_an_operator_from_no_plan(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(
            shipped_mosquitto("broker", tmp_path, users=_PASSWORDS, acl=access_rules(_USERS))
        )
        made = await stack.enter_async_context(
            leading_coordinator(
                options(broker, "coordinator", clean=False), tmp_path, rates=Rates(_RATES), within_s=_HANG_S
            )
        )
        bus = made.bus
        asking, answers = operator_of(broker)
        host = MessageClient(MqttBus(options(broker, "host_h1")), "/caesura/host/h1")
        neighbour = MessageClient(MqttBus(options(broker, "vm_web-2")), "/caesura/vm/web-2")
        for each, receive in ((asking.bus, asking.deliver), (host.bus, None), (neighbour.bus, None)):
            await stack.enter_async_context(running(each, receive))
        vms = tuple(
            m.VmRecord(vm=name, set="web", update_domain=0, state="running") for name in ("web-1", "web-2")
        )
        await host.send(m.HostInventory(host="h1", driver="process", epoch=0, vms=vms), host="h1")
        await eventually(lambda: len(made.known("vm")) == 2, _HANG_S)
        payload = message(m.VmReady(vm="web-1", event_id="e", ready=True, reason="x" * 500))
        async with flood(broker, "caesura/v1/vm/web-1/ready", payload):
            await eventually(lambda: bus.stats.refused.get("vm", 0) > 0, _HANG_S)

            async def plan() -> None:
                made = m.RolloutRequested(request=new_id(), update="patch")
                await until_answered(partial(asking.send, made, client="ops"), made.request, answers)

            await until_quiet(bus, plan)
            before = bus.stats.received
            for _ in range(3):
                await plan()
            await neighbour.send(m.AgentPresence(vm="web-2", online=True, boot_id="b"), vm="web-2")
            await eventually(lambda: made.state.agents_online.get("web-2", False), _HANG_S)
            assert bus.stats.received - before < _STRAY
            assert bus.stats.connects == 1
            assert bus.stats.refused["vm"] > 0


async def test_a_flooding_operator_keeps_another_from_no_abort(tmp_path: Path) -> None:
    """Nobody knows who else is an operator: a filter for all of them has nothing to stand in for it, and stays."""
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(
            shipped_mosquitto("broker", tmp_path, users=_PASSWORDS, acl=access_rules(_USERS))
        )
        made = await stack.enter_async_context(
            leading_coordinator(
                options(broker, "coordinator", clean=False), tmp_path, rates=Rates(_RATES), within_s=_HANG_S
            )
        )
        bus = made.bus
        asking, answers = operator_of(broker)
        thief = MqttBus(options(broker, "ctl_thief"))
        for each, receive in ((asking.bus, asking.deliver), (thief, None)):
            await stack.enter_async_context(running(each, receive))
        for number in range(4 * int(LIMITS["ctl"].burst)):
            kind = ("start", "freeze", "abort", "resume")[number % 4]
            await thief.publish(f"caesura/v1/ctl/thief/{kind}", b"x", qos=0)
        await eventually(lambda: bus.stats.refused.get("ctl", 0) > LIMITS["ctl"].burst, _HANG_S)
        request = m.AbortRequested(request=new_id(), reason="stop it")
        await until_answered(partial(asking.send, request, client="ops"), request.request, answers)
        assert bus.stats.connects == 1
