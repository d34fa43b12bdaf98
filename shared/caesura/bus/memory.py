"""The bus without a network: for tests of services, and for a whole suite in one process.

Deterministic: no threads, no sockets, no clock but the loop's. It keeps the port's promises and passes
the same conformance suite as MQTT. Failures of real brokers can be provoked here:
``MemoryBroker.kill``, ``down`` and ``up``, ``stall``, ``may_publish``.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from caesura.bus.base import QueuedDelivery, ReconnectingBus
from caesura.bus.filters import check_topic
from caesura.bus.port import BusUnavailable, Delivery, PublishRefused, Will
from caesura.bus.routes import FilterTree, RetainedTopics
from caesura.runtime.logs import get_logger

_log = get_logger("caesura.bus")

_WINDOW = 100  # unacknowledged QoS 1 messages a client may have, as in our Mosquitto settings


class MemoryMessage(msgspec.Struct, frozen=True):
    """A message inside the broker."""

    topic: str
    payload: bytes
    qos: int
    retained: bool = False


class MemorySession(msgspec.Struct):
    """What the broker knows about one client, connected or not."""

    clean: bool
    number: int
    """In the order in which sessions began, which is the order of delivery."""
    connection: MemoryConnection | None = None
    filters: tuple[str, ...] = ()
    queue: deque[MemoryMessage] = msgspec.field(default_factory=deque)
    in_flight: dict[int, MemoryMessage] = msgspec.field(default_factory=dict)
    next_id: int = 1


class MemoryConnection:
    """One client's connection; a new one after every drop."""

    def __init__(
        self,
        client_id: str,
        deliver: Callable[[MemoryConnection, MemoryMessage, int], None],
        will: Will | None,
    ) -> None:
        self.client_id = client_id
        self.deliver = deliver
        self.will = will
        self.ended = asyncio.Event()
        self.taken_over = False
        self.why = ""


class MemoryBroker:
    """Routes messages between the buses that share it.

    Args:
        may_publish: access rule; takes client id and topic. A refusal raises ``PublishRefused`` in the publisher.
        window: unacknowledged QoS 1 messages a client may have before the rest waits.
    """

    def __init__(
        self,
        *,
        may_publish: Callable[[str, str], bool] = lambda _client_id, _topic: True,
        window: int = _WINDOW,
    ) -> None:
        self.may_publish = may_publish
        self.retained = RetainedTopics()
        self._window = window
        self._sessions: dict[str, MemorySession] = {}
        self._begun = 0
        self._subscribed: FilterTree[str] = FilterTree()
        """Filters with the ids of the clients that subscribed to them."""
        self._up = asyncio.Event()
        self._up.set()
        self._answering = asyncio.Event()
        self._answering.set()

    @property
    def clients(self) -> set[str]:
        """The ids of the connected clients."""
        return {client for client, session in self._sessions.items() if session.connection is not None}

    def down(self) -> None:
        """Stop without a DISCONNECT: connections end, no will is sent; sessions and retained messages are kept."""
        self._up.clear()
        for session in list(self._sessions.values()):
            if session.connection is not None:
                self._end(session.connection, "the broker went down")

    def up(self) -> None:
        """Accept connections again."""
        self._up.set()
        self._answering.set()

    def stall(self) -> None:
        """Accept publishes without acknowledging them, until ``up`` or ``down``."""
        self._answering.clear()

    async def answer(self, connection: MemoryConnection) -> None:
        """Wait while stalled, or until the connection ends."""
        if not self._answering.is_set():
            waits = {asyncio.ensure_future(each.wait()) for each in (self._answering, connection.ended)}
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waits:
                    each.cancel()

    def kill(self, client_id: str) -> None:
        """Drop a client's connection as if its host had vanished: its will is published."""
        session = self._sessions.get(client_id)
        if session is not None and session.connection is not None:
            connection = session.connection
            self._end(connection, "the connection was cut")
            self._send_will(connection)

    async def connect(self, connection: MemoryConnection, *, clean: bool) -> None:
        """Wait until the broker is up, then connect; takes the id over from an older connection."""
        await self._up.wait()
        old = self._sessions.get(connection.client_id)
        if old is not None and old.connection is not None:
            taken = old.connection
            taken.taken_over = True
            self._end(taken, f"another client connected with the id {connection.client_id!r}")
            self._send_will(taken)
            old = self._sessions.get(connection.client_id)
        if old is None or clean:
            self._unsubscribe(connection.client_id)
            self._begun += 1
            session = MemorySession(clean=clean, number=self._begun)
        else:
            session = old
        session.clean = clean
        session.connection = connection
        self._sessions[connection.client_id] = session
        # Sent and not acknowledged when the last connection ended: send it again, before anything newer.
        session.queue.extendleft(reversed(session.in_flight.values()))
        session.in_flight.clear()
        self._pump(session)

    def subscribe(self, connection: MemoryConnection, filters: tuple[str, ...]) -> None:
        """Replace the subscriptions, and get the retained messages."""
        self._unsubscribe(connection.client_id)
        session = self._sessions[connection.client_id]
        session.filters = filters
        for each in filters:
            self._subscribed.add(each, connection.client_id)
        topics = dict.fromkeys(topic for each in filters for topic in self.retained.covered_by(each))
        for topic in topics:
            self._hand(session, MemoryMessage(topic, self.retained[topic], qos=1, retained=True))

    def _unsubscribe(self, client_id: str) -> None:
        session = self._sessions.get(client_id)
        if session is not None:
            for each in session.filters:
                self._subscribed.discard(each, client_id)
            session.filters = ()

    def disconnect(self, connection: MemoryConnection) -> None:
        """The client's DISCONNECT."""
        if not connection.ended.is_set():
            self._end(connection, "closed")

    def accept(self, connection: MemoryConnection, message: MemoryMessage, *, retain: bool) -> None:
        """Accept a message from a client.

        Raises:
            PublishRefused: ``may_publish`` refuses.
        """
        if not self.may_publish(connection.client_id, message.topic):
            raise PublishRefused(message.topic, "Not authorized")
        self._route(message, retain=retain)

    def _route(self, message: MemoryMessage, *, retain: bool) -> None:
        if retain:
            if message.payload:
                self.retained[message.topic] = message.payload
            else:
                self.retained.pop(message.topic, None)
        sessions = [self._sessions[client_id] for client_id in self._subscribed.covering(message.topic)]
        for session in sorted(sessions, key=lambda each: each.number):
            self._hand(session, message)

    def _hand(self, session: MemorySession, message: MemoryMessage) -> None:
        if message.qos == 0:
            if session.connection is not None:
                session.connection.deliver(session.connection, message, 0)
        else:
            session.queue.append(message)
            self._pump(session)

    def _pump(self, session: MemorySession) -> None:
        while session.connection is not None and session.queue and len(session.in_flight) < self._window:
            message = session.queue.popleft()
            message_id = session.next_id
            session.next_id += 1
            session.in_flight[message_id] = message
            session.connection.deliver(session.connection, message, message_id)

    def acknowledge(self, connection: MemoryConnection, message_id: int) -> None:
        """The client acknowledged a QoS 1 message; the next one may follow."""
        session = self._sessions.get(connection.client_id)
        if session is not None and session.connection is connection:
            session.in_flight.pop(message_id, None)
            self._pump(session)

    def _end(self, connection: MemoryConnection, why: str) -> None:
        session = self._sessions[connection.client_id]
        session.connection = None
        if session.clean:
            self._unsubscribe(connection.client_id)
            del self._sessions[connection.client_id]
        connection.why = why
        connection.ended.set()

    def _send_will(self, connection: MemoryConnection) -> None:
        will = connection.will
        if will is not None and self.may_publish(connection.client_id, will.topic):
            self._route(MemoryMessage(will.topic, will.payload, qos=1), retain=True)


class MemoryBus(ReconnectingBus):
    """A bus on a ``MemoryBroker``; takes those arguments of ``MqttBus`` that apply here.

    Args:
        broker: shared by all buses that exchange messages.
        client_id: empty for a random one.
        clean: False keeps QoS 1 messages while disconnected.
        reconnect_s: seconds before it connects again after a drop; a hundred times that after a takeover.
    """

    def __init__(
        self,
        broker: MemoryBroker,
        *,
        client_id: str = "",
        filters: Sequence[str] = (),
        will: Will | None = None,
        clean: bool = True,
        backlog_limit: int = 1_000,
        backlog_bytes: int = 64 * 1024 * 1024,
        close_timeout_s: float = 5.0,
        reconnect_s: float = 0.01,
    ) -> None:
        super().__init__(
            filters=filters,
            backlog_limit=backlog_limit,
            backlog_bytes=backlog_bytes,
            close_timeout_s=close_timeout_s,
        )
        self.client_id = client_id or f"memory-{secrets.token_hex(6)}"
        self._broker = broker
        self._will = will
        self._clean = clean
        self._reconnect_s = reconnect_s
        self._connection: MemoryConnection | None = None

    async def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout_s: float = 10.0
    ) -> None:
        """See ``Bus.publish``; a refusal is always reported here."""
        check_topic(topic)
        if qos not in {0, 1}:
            raise ValueError(f"QoS {qos} is not used here: 0 or 1")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        try:
            await self._until_ready(topic, timeout_s)
            await self._send(
                MemoryMessage(topic, payload, qos), retain=retain, timeout_s=deadline - loop.time()
            )
        except (BusUnavailable, PublishRefused):
            self._stats.publish_failures += 1
            raise
        self._stats.published += 1

    async def _send(self, message: MemoryMessage, *, retain: bool, timeout_s: float) -> None:
        connection = self._connection
        # As on a real bus: other tasks run between a publish and its acknowledgement.
        await asyncio.sleep(0)
        if connection is not None and not connection.ended.is_set():
            try:
                async with asyncio.timeout(max(0.0, timeout_s)):
                    await self._broker.answer(connection)
            except TimeoutError:
                raise BusUnavailable(
                    f"the broker did not acknowledge the message on {message.topic!r} in time"
                ) from None
        if connection is None or connection.ended.is_set():
            raise BusUnavailable(
                f"the connection ended before the message on {message.topic!r} was acknowledged"
            )
        self._broker.accept(connection, message, retain=retain)

    def _subscribe_more(self, filters: Sequence[str]) -> None:  # noqa: ARG002 - it is given all
        if self._connection is not None:
            self._broker.subscribe(self._connection, self.filters)

    async def _keep_connected(self) -> None:
        while True:
            connection = MemoryConnection(self.client_id, self._arrived, self._will)
            await self._broker.connect(connection, clean=self._clean)
            self._connection = connection
            try:
                self._broker.subscribe(connection, self.filters)
                async with self._connected():
                    _log.info("bus.connected", broker="memory", client_id=self.client_id)
                    await connection.ended.wait()
            finally:
                self._connection = None
                self._broker.disconnect(connection)
            self._stats.last_error = connection.why
            _log.warning(
                "bus.connection_lost", broker="memory", client_id=self.client_id, error=connection.why
            )
            # Two clients with one id would take each other's connection over as fast as they can connect.
            await asyncio.sleep(self._reconnect_s * (100 if connection.taken_over else 1))

    def _handled(self) -> None:
        """Nothing to do here: the broker's window holds messages back."""

    def _arrived(self, connection: MemoryConnection, message: MemoryMessage, message_id: int) -> None:
        self._take(
            QueuedDelivery(
                Delivery(message.topic, message.payload, message.retained),
                message.qos,
                partial(self._broker.acknowledge, connection, message_id),
            )
        )
