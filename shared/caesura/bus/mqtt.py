"""The bus over MQTT: connects, subscribes, reconnects indefinitely, and says why it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import msgspec

from caesura.bus.backoff import Backoff
from caesura.bus.base import QueuedDelivery, ReconnectingBus
from caesura.bus.diagnosis import (
    SESSION_TAKEN_OVER,
    UNSUPPORTED_PROTOCOL,
    ClosedEarly,
    ConnectionLost,
    ConnectRefused,
    ConnectTimeout,
    NoBrokerReached,
    SubscribeRefused,
    explain,
)
from caesura.bus.filters import check_topic
from caesura.bus.mqtt_connection import IncomingMessage, MqttConnection, Protocol
from caesura.bus.options import Address, BrokerOptions
from caesura.bus.port import BusError, BusUnavailable, Delivery, PublishRefused, Will
from caesura.bus.rates import Rates
from caesura.runtime.logs import get_logger

_log = get_logger("caesura.bus")

_FILTERS_AT_ONCE = 1_000  # a packet of some 100 KiB
_FILTERS_AT_ONCE_IN_CLUSTER = 4
"""A cluster makes a consumer on several nodes for each filter (NATS: some 0.2 s), and answers when it has made all of a packet."""
_SILENCE_S = 5.0
"""s: of silence after which a node of a cluster gets a ping, and after as many more is given up. It answers pings whatever its cluster does."""
_UNSTABLE = 3  # short-lived connections in a row: then the log says that another client may use our id


class MqttBus(ReconnectingBus):
    """A connection to an MQTT broker that is kept alive; see ``caesura.bus.port.Bus`` for the promises.

    Of several addresses the next is tried at once when one fails; after all have failed it waits, as with a single one. Their order
    follows from the client id, so that the clients of a fleet are spread over the nodes of a cluster, and over what remains of it.

    Args:
        options: where and who.
        filters: topic filters to subscribe to, at QoS 1, after every connect.
        will: what the broker publishes (retained) when our connection ends without a DISCONNECT.
        uniform: random source of the reconnect delays, as ``random.uniform``.
        rates: how much each writer may send. One that sends more is unsubscribed from for a while, where a filter names it:
            otherwise its messages would precede all others in the broker's queue for us.

    Raises:
        ValueError: a filter that no broker accepts.
    """

    def __init__(
        self,
        options: BrokerOptions,
        *,
        filters: Sequence[str] = (),
        will: Will | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
        rates: Rates | None = None,
    ) -> None:
        super().__init__(
            rates=rates,
            filters=filters,
            backlog_limit=options.backlog_limit,
            backlog_bytes=options.backlog_bytes,
            close_timeout_s=options.close_timeout_s,
        )
        if not options.client_id:
            options = msgspec.structs.replace(options, client_id=f"caesura-{secrets.token_hex(6)}")
        self.options = options
        order = list(options.addresses)
        random.Random(options.client_id).shuffle(order)  # noqa: S311 - spreads load
        # Where there is nowhere else to go, a silent broker is waited for until the keepalive ends.
        several = len(order) > 1 and not options.silence_s
        of_each = msgspec.structs.replace(options, silence_s=_SILENCE_S) if several else options
        self._brokers = [of_each.at(each) for each in order]
        self._turn = 0
        self._failures: dict[Address, BusError | OSError] = {}
        """The brokers that failed since the last connection, or since all of them had."""
        self._will = will
        self._backoff = Backoff(options.reconnect_min_s, options.reconnect_max_s, uniform)
        self.last_failure: BusError | OSError | None = None
        """How the last connection, or the last attempts at one, ended; ``explain`` describes it."""
        self._to_unmute = asyncio.Event()
        self._to_subscribe: list[str] = []
        self._to_drop: list[str] = []
        """Filters to drop once their replacements are subscribed to."""
        self._link: MqttConnection | None = None
        self._spoken: Protocol | None = None if options.protocol == "auto" else options.protocol
        self._short_lives = 0

    async def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout_s: float = 10.0
    ) -> None:
        """See ``Bus.publish``.

        Raises:
            BusUnavailable, PublishRefused: as the port says.
            ValueError: a topic with a wildcard, or a QoS other than 0 and 1.
        """
        check_topic(topic)
        if qos not in {0, 1}:
            raise ValueError(f"QoS {qos} is not used here: 0 or 1")
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            link = self._link
            if link is None or not self._ready.is_set():
                link = await self._link_for(topic, timeout_s)
            link.calls += 1
            if link.paused:
                self._throttle(link)
            try:
                await link.send(topic, payload, qos=qos, retain=retain, deadline=deadline)
            finally:
                link.calls -= 1
                if not link.calls:
                    self._throttle(link)
        except (BusUnavailable, PublishRefused):
            self._stats.publish_failures += 1
            if self._link is not None and self._link.ended:
                self._ready.clear()  # visible here before ``_serve`` notices
            # Up to here nothing may have been awaited. A caller that retries at once must not starve the other tasks,
            # ``_serve`` among them, which has yet to notice that the connection has ended.
            await asyncio.sleep(0)
            raise
        self._stats.published += 1

    async def _link_for(self, topic: str, timeout_s: float) -> MqttConnection:
        await self._until_ready(topic, timeout_s)
        if self._link is None:
            raise BusUnavailable(f"the connection ended before the message on {topic!r} was sent")
        return self._link

    def _handled(self) -> None:
        if self._link is not None:
            self._throttle(self._link)

    def _arrived(self, link: MqttConnection, arrival: IncomingMessage) -> None:
        if arrival.retained and self.options.ignore_retained:
            link.acknowledge(arrival)
            return
        delivery = Delivery(arrival.topic, arrival.payload, arrival.retained)
        self._take(QueuedDelivery(delivery, arrival.qos, partial(link.acknowledge, arrival)))
        self._throttle(link)

    def _throttle(self, link: MqttConnection) -> None:
        """Start or stop reading: an answer that a caller waits for comes over the same socket as the flood."""
        if link.paused:
            if self._inbox.low or (link.calls and not self._inbox.overfull):
                link.resume()
        elif self._inbox.overfull or (self._inbox.full and not link.calls):
            link.pause()

    @contextlib.contextmanager
    def _listening(self, link: MqttConnection) -> Iterator[None]:
        """While a caller waits for an answer of the broker, a full inbox does not stop reading."""
        link.calls += 1
        self._throttle(link)
        try:
            yield
        finally:
            link.calls -= 1
            self._throttle(link)

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                link = await self._open()
            except (OSError, BusError) as error:
                delay_s = self._next_broker(error, self._backoff.next_s)
                self._report("bus.connect_failed", error)
            else:
                try:
                    lost: BusError | OSError = await self._serve(link)
                except (OSError, BusError) as error:
                    lost = error
                finally:
                    self._link = None
                    await link.disconnect()
                delay_s = self._after(lost, held_s=loop.time() - began_s)
            self._turn += 1
            _log.debug("bus.reconnecting", in_s=round(delay_s, 3), broker=str(self.broker))
            await asyncio.sleep(delay_s)

    @property
    def broker(self) -> Address:
        """The broker that is connected, or that is tried now."""
        return self._at.address

    @property
    def _at(self) -> BrokerOptions:
        return self._brokers[self._turn % len(self._brokers)]

    def _next_broker(self, error: BusError | OSError, delay: Callable[[], float]) -> float:
        """Note that the present broker failed; returns the seconds to wait before the next one, ``delay`` if all have failed."""
        if len(self._failures) == len(self._brokers):
            self._failures.clear()
        self._failures[self.broker] = error
        return 0.0 if len(self._failures) < len(self._brokers) else delay()

    async def _open(self) -> MqttConnection:
        """Connect with the protocol that is configured or was learned; ``auto`` tries 5 first and remembers the result."""
        spoken = self._spoken or "5"
        link = self._new_link(spoken)
        try:
            await link.open()
        except (ConnectRefused, ClosedEarly, ConnectTimeout) as error:
            if self.options.protocol != "auto" or spoken != "5" or not self._means_no_mqtt_5(error):
                raise
            _log.info("bus.protocol_fallback", broker=str(self.broker), to="3.1.1", why=str(error))
            link = self._new_link("3.1.1")
            await link.open()
        self._spoken = link.protocol
        return link

    def _means_no_mqtt_5(self, error: ConnectRefused | ClosedEarly | ConnectTimeout) -> bool:
        if isinstance(error, ConnectRefused):
            return error.code == UNSUPPORTED_PROTOCOL
        if isinstance(error, ConnectTimeout) and len(self._brokers) > 1:
            return False  # no clustered broker does that: this node hangs, and the next one answers
        # Some brokers just close the connection on version 5, and amqtt misparses it and waits for more when there is a user
        # or a will. A broker that has used version 5 with us before is merely shutting down.
        return self._spoken is None

    def _new_link(self, protocol: Protocol) -> MqttConnection:
        return MqttConnection(self._at, protocol, will=self._will, arrived=self._arrived)

    async def _serve(self, link: MqttConnection) -> BusError:
        """Subscribe, mark the bus as connected, and wait for the end of the connection."""
        self._link = link
        self._to_subscribe, self._to_drop = [], []  # of the previous connection
        with self._listening(link):
            await self._subscribe(link, self.subscribed())
        async with self._connected():
            self._failures.clear()
            _log.info(
                "bus.connected",
                broker=str(self.broker),
                protocol=link.protocol,
                client_id=self.options.client_id,
                session_present=link.session_present,
            )
            unmuting = asyncio.create_task(self._unmute(link), name="bus-unmute")
            try:
                return await link.until_end()
            finally:
                unmuting.cancel()

    async def _subscribe(self, link: MqttConnection, filters: Sequence[str]) -> None:
        """Subscribe in packets that any broker accepts. There may be no filters at all."""
        for each in self._packets(filters):
            await link.subscribe_all(each)

    def _subscribe_more(self, filters: Sequence[str]) -> None:
        self._to_subscribe += filters
        self._to_unmute.set()

    def _mute(self, filters: Sequence[str], instead: Sequence[str]) -> None:
        if self._link is not None and not instead:
            self._link.drop(filters)
        elif self._link is not None:
            # Other writers may be received through it: it is dropped when its replacements are subscribed to.
            self._to_subscribe += instead
            self._to_drop += filters
        self._to_unmute.set()

    async def _unmute(self, link: MqttConnection) -> None:
        """Subscribe again to muted filters whose time is up."""
        loop = asyncio.get_running_loop()
        while True:
            self._to_unmute.clear()
            due = min(self._muted.values(), default=None)
            try:
                async with asyncio.timeout_at(due):
                    await self._to_unmute.wait()
            except TimeoutError:
                back = [each for each, until_s in self._muted.items() if until_s <= loop.time()]
                stood_in = [each for wide in back for each in self._instead.pop(wide, ())]
                for each in back:
                    del self._muted[each]
                self._to_drop += stood_in
                self._to_subscribe += [each for each in back if each in self.filters]
            wanted, self._to_subscribe = self._to_subscribe, []
            dropped, self._to_drop = self._to_drop, []
            with contextlib.suppress(OSError, BusError), self._listening(link):
                packets = self._packets(wanted)
                if not wanted:
                    link.drop(dropped)
                await asyncio.gather(
                    *(link.subscribe_all(each) for each in packets[:-1]),
                    *(link.subscribe_all(each, instead_of=dropped) for each in packets[-1:]),
                )

    def _after(self, lost: BusError | OSError, *, held_s: float) -> float:
        """Report the end of a connection; returns the seconds to wait before the next one."""
        held = held_s >= self.options.reconnect_max_s
        self._short_lives = 0 if held else self._short_lives + 1
        if held:
            self._backoff.reset()
        if isinstance(lost, SubscribeRefused):
            delay_s = self._next_broker(lost, self._backoff.longest_s)
            self._report("bus.subscribe_refused", lost)
            return delay_s
        if isinstance(lost, ConnectionLost) and lost.code == SESSION_TAKEN_OVER:
            self._report("bus.taken_over", lost)
            return self._backoff.longest_s()
        self._next_broker(lost, lambda: 0.0)
        self._report("bus.connection_lost", lost)
        if self._short_lives >= _UNSTABLE * len(self._brokers):
            _log.warning(
                "bus.connection_unstable",
                in_a_row=self._short_lives,
                client_id=self.options.client_id,
                advice="look in the broker's log; does another client connect with the same client id, or as the same user?",
            )
            return self._backoff.longest_s()
        return self._backoff.next_s()

    def _report(self, event: str, error: BusError | OSError) -> None:
        others = {address: failure for address, failure in self._failures.items() if failure is not error}
        self.last_failure = NoBrokerReached({**others, self.broker: error}) if others else error
        self._stats.last_error = explain(self.last_failure, self._at).summary
        problem = explain(error, self._at)
        _log.warning(
            event,
            broker=str(self.broker),
            client_id=self.options.client_id,
            error=problem.summary,
            advice=problem.hint,
        )

    def _packets(self, filters: Sequence[str]) -> list[Sequence[str]]:
        most = _FILTERS_AT_ONCE if len(self._brokers) == 1 else _FILTERS_AT_ONCE_IN_CLUSTER
        return [filters[first : first + most] for first in range(0, len(filters), most)]
