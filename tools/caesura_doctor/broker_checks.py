"""Whether the host can do at its broker what it must, and no more: by really doing it, harmlessly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime

from caesura.bus.diagnosis import explain
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptionsError, options_from
from caesura.bus.port import BusError, Delivery, PublishRefused
from caesura.contract.codec import ContractError, decode, encode
from caesura.contract.envelope import source_of
from caesura.contract.messages import ClockSyncAnswered, CoordinatorPresence
from caesura.contract.topics import channel_of
from caesura.runtime.identity import new_id
from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, warning, wrong
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.settings import HostUpdaterSettings
from caesura_host_updater.subscriptions import filters

_CONNECT_S = 5.0
_PUBLISH_S = 5.0
BEAT_S = 25.0
"""s: within which a coordinator that leads announces itself: it does every 20."""
_RETAINED_S = 1.0  # s: for what the broker remembers of a coordinator
_CLOCK_WARNING_S, _CLOCK_WRONG_S = 0.5, 5.0
_NOBODY = "caesura-doctor"
"""A VM that no host has: nobody reads what is published about it."""


class _CoordinatorClock:
    """How far this host's clock is from that of the coordinator, by its next announcement."""

    def __init__(self) -> None:
        self.seen = asyncio.Event()
        self.remembered = asyncio.Event()
        self.offset_s = 0.0

    async def receive(self, delivery: Delivery) -> None:
        now = time.time()
        with suppress(ContractError):
            received = decode(delivery.topic, delivery.payload)
            if not isinstance(received.message, CoordinatorPresence) or not received.message.online:
                return
            if delivery.retained:
                self.remembered.set()
            else:
                self.offset_s = now - received.header.time.timestamp()
                self.seen.set()


async def check_broker(settings: HostUpdaterSettings, host: HostFile) -> AsyncIterator[Diagnosis]:
    """Connects as the host's user, beside a host updater that may run, and publishes about a VM that nobody has."""
    try:
        options = options_from(settings, client_id=f"caesura-doctor-{host.host}-{new_id()[:8]}", new_id=True)
    except BrokerOptionsError as error:
        yield wrong("broker.settings", str(error), "mend the broker's settings")
        return
    bus = MqttBus(options, filters=filters(host))
    clock = _CoordinatorClock()
    running = asyncio.create_task(bus.run(clock.receive), name="bus")
    try:
        if not await bus.wait_connected(_CONNECT_S * len(options.addresses)):
            tried = ", ".join(str(each) for each in options.addresses)
            problem = bus.stats.last_error or f"{tried}: no answer"
            yield wrong("broker.connection", problem, _hint(bus))
            return
        yield ok("broker.connection", f"connected to {bus.broker}, and subscribed to this host's commands")
        async for finding in _rights(bus, settings, host):
            yield finding
        yield await _clock(clock)
    finally:
        await bus.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _hint(bus: MqttBus) -> str:
    failure = bus.last_failure
    if failure is None:
        return "is the broker running, and does nothing on the way hold its port closed?"
    return explain(failure, bus.options).hint


async def _rights(bus: MqttBus, settings: HostUpdaterSettings, host: HostFile) -> AsyncIterator[Diagnosis]:
    post = MessageClient(bus, source_of(settings.fleet, "host", host.host))
    try:
        await _publish(post, host.host)
    except PublishRefused as error:
        yield wrong("broker.rights", str(error), "give the host's user its access rules: deploy/broker")
        return
    except BusError as error:
        yield wrong(
            "broker.rights",
            f"a message about this host was not accepted: {error}",
            "look in the broker's log",
        )
        return
    yield ok("broker.rights", "may publish about this host")
    other = f"{host.host[:40]}-not-this-host"
    try:
        await _publish(post, other)
    except PublishRefused:
        yield ok("broker.least_rights", "may not publish about another host")
    except BusError as error:
        yield warning(
            "broker.least_rights",
            f"whether it may publish about another host is not known: {error}",
            "try again",
        )
    else:
        yield warning(
            "broker.least_rights",
            f"the broker took a message about another host ({other}): who has this host's password can speak for the whole fleet"
            " (or the broker speaks MQTT 3.1.1, which does not say that it refuses)",
            "give each host a user of its own, with the access rules of deploy/broker",
        )


async def _publish(post: MessageClient, host: str) -> None:
    now = time.time_ns()
    message = ClockSyncAnswered(vm=_NOBODY, host=host, exchange=new_id(), t1_ns=now, t2_ns=now, t3_ns=now)
    topic = channel_of(ClockSyncAnswered).topic(host=host, vm=_NOBODY)
    payload = encode(message, source=post.source, event_id=new_id(), time=datetime.now(UTC))
    await post.bus.publish(topic, payload, qos=1, retain=False, timeout_s=_PUBLISH_S)


async def _clock(clock: _CoordinatorClock) -> Diagnosis:
    with suppress(TimeoutError):
        async with asyncio.timeout(_RETAINED_S):
            await clock.remembered.wait()
    if clock.remembered.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await clock.seen.wait()
    if not clock.seen.is_set():
        about = (
            f"the coordinator that the broker remembers did not announce itself within {BEAT_S:g} s"
            if clock.remembered.is_set()
            else "there is no coordinator on this bus"
        )
        return warning("coordinator", about, "start a coordinator, or see `caesura status`")
    off = f"this host's clock is {clock.offset_s:+.3f} s from the coordinator's, as far as a message shows"
    if abs(clock.offset_s) > _CLOCK_WRONG_S:
        return wrong("coordinator.clock", off, "run chrony, ntpd or systemd-timesyncd on both")
    if abs(clock.offset_s) > _CLOCK_WARNING_S:
        return warning("coordinator.clock", off, "run chrony, ntpd or systemd-timesyncd on both")
    return ok("coordinator.clock", off)
