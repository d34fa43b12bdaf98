"""``--broker``: what a rehearsal says on its bus is published at a real broker, too, for consumers under test.

The rehearsal itself stays on its bus in memory: a broker that is slow or lost holds nothing up and leaves nothing paused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import options_from
from caesura.bus.port import BusError, Delivery
from caesura.bus.presence import last_will
from caesura.contract.codec import decode, encode
from caesura.contract.envelope import Message, source_of
from caesura.contract.messages import CoordinatorPresence, EventChanged, HostPresence, SetDocument
from caesura.contract.topics import PREFIX, channel_of, may_be_retained
from caesura.runtime.errors import ConfigError
from caesura.runtime.identity import new_id
from caesura_ctl.options import settings_for
from caesura_ctl.session import connect
from caesura_ctl.settings import CtlSettings
from caesura_rehearse.simulation.bus_facts import Fact, FactLog, Place
from caesura_rehearse.simulation.fleet_simulation import FleetSimulation
from caesura_rehearse.simulation.simulated_coordinator import HOST

_CONNECT_S = 5.0  # s: to the broker, which answered a moment before
_DRAIN_S = 5.0  # s: for the last messages, at the end of the rehearsal
_PUBLISH_S = 5.0  # s: for one message; milliseconds are usual


class FleetAtBroker(ConfigError):
    """The broker is a fleet's: messages of a rehearsal would be taken for its coordinator's."""


class Mirror:
    """Publishes at the broker, in order, what it is given.

    Args:
        bus: of the broker.
        source: of the messages that are made here.
        say: called with each piece of news, for people.
    """

    def __init__(self, bus: MqttBus, source: str, say: Callable[[str], None]) -> None:
        self._bus = bus
        self._source = source
        self._say = say
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._retained: dict[str, bytes] = {}
        self._lost = 0

    def put(self, topic: str, payload: bytes) -> None:
        """Publish this."""
        self._queue.put_nowait((topic, payload))

    def tell(self, message: Message, **parameters: str | int) -> None:
        """Publish a message that nobody else has sent."""
        topic = channel_of(type(message)).topic(**parameters)
        payload = encode(message, source=self._source, event_id=new_id(), time=datetime.now(UTC))
        self.put(topic, payload)

    async def publish_all(self) -> None:
        """Until cancelled."""
        while True:
            topic, payload = await self._queue.get()
            retain = may_be_retained(topic)
            if retain:
                self._retained[topic] = payload
            try:
                await self._bus.publish(topic, payload, retain=retain, timeout_s=_PUBLISH_S)
            except BusError as error:
                self._lost += 1
                if self._lost == 1:
                    self._say(f"not published at the broker: {error}")
            finally:
                self._queue.task_done()

    async def again(self) -> None:
        """After a reconnect: the broker may have lost what it kept."""
        for topic, payload in list(self._retained.items()):
            with suppress(BusError):
                await self._bus.publish(topic, payload, retain=True, timeout_s=_PUBLISH_S)

    async def end(self) -> None:
        """Publish what waits, then remove what the broker keeps."""
        with suppress(TimeoutError, BusError):
            async with asyncio.timeout(_DRAIN_S):
                await self._queue.join()
                for topic in self._retained:
                    await self._bus.publish(topic, b"", retain=True, timeout_s=_PUBLISH_S)
        if self._lost:
            self._say(f"messages that were not published at the broker: {self._lost}")


@asynccontextmanager
async def mirrored(
    simulation: FleetSimulation, broker: MemoryBroker, url: str, say: Callable[[str], None]
) -> AsyncIterator[None]:
    """Publish at the broker ``url`` while the block runs; user, password and TLS are those of ``caesura`` (``CAESURA_CTL_BROKER_...``).

    Raises:
        NoBroker, SettingsError: it cannot be reached.
        FleetAtBroker: it has a fleet's messages.
    """
    settings = settings_for(url)
    await _check_free(settings)
    source = source_of(settings.fleet, HOST)
    presence = HostPresence(host=HOST, online=True, instance=new_id())
    offline = HostPresence(host=HOST, online=False, instance=presence.instance)
    options = options_from(settings, client_id=f"rehearse-{new_id()[:8]}", new_id=True)
    bus = MqttBus(options, will=last_will(offline, source, host=HOST))
    mirror = Mirror(bus, source, say)
    began = datetime.now(UTC) - timedelta(seconds=simulation.now)
    facts = FactLog(HOST, lambda instant: began + timedelta(seconds=instant))
    inside = MemoryBus(broker, client_id="mirror", filters=(f"{PREFIX}/#",))

    async def forward(delivery: Delivery) -> None:
        mirror.put(delivery.topic, delivery.payload)
        if delivery.payload and isinstance(
            found := decode(delivery.topic, delivery.payload).message, SetDocument
        ):
            facts.document(found)
        simulation.notify()

    async def nothing(_: Delivery) -> None:
        """It subscribes to nothing."""

    async def watch() -> None:
        found: list[Fact] = []

        def pending() -> bool:
            places = {
                slot.vm: Place(
                    set=slot.set, update_domain=slot.update_domain, pausable=slot.target is not None
                )
                for slot in simulation.slots.values()
            }
            found.extend(facts.pending(simulation.events, places))
            return bool(found)

        while True:
            await simulation.until(pending, None)
            for fact in found:
                _tell(mirror, fact)
            found.clear()

    tasks = [
        asyncio.create_task(bus.run(nothing, mirror.again), name="broker"),
        asyncio.create_task(mirror.publish_all(), name="mirror"),
    ]
    try:
        if not await bus.wait_connected(_CONNECT_S):
            raise ConfigError(f"the broker at {url} was lost: {bus.stats.last_error}")
        mirror.tell(presence, host=HOST)
        tasks.append(asyncio.create_task(inside.run(forward), name="mirrored bus"))
        tasks.append(asyncio.create_task(watch(), name="mirrored facts"))
        yield
        await mirror.end()
    finally:
        await bus.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tell(mirror: Mirror, fact: Fact) -> None:
    if isinstance(fact, EventChanged):
        mirror.tell(fact, set=fact.set, status=fact.status)
    else:
        mirror.tell(fact, host=fact.host, set=fact.set, ud=fact.update_domain, vm=fact.vm)


async def _check_free(settings: CtlSettings) -> None:
    async with connect(settings, [CoordinatorPresence]) as session:
        await session.settled(_CONNECT_S)
        found = session.fleet_view.coordinator
    if found is not None:
        raise FleetAtBroker(
            f"the broker at {settings.broker_url} has a fleet with the coordinator {found.coordinator}: a rehearsal's events would be taken for "
            "the fleet's. Use a broker without one (mosquitto -p 1884)"
        )
