"""Typed messages over the bus port: publish by message type, receive by message type.

A service holds one ``MessageClient``. It gives every outgoing message its topic, CloudEvents id, source and
time, and turns deliveries into typed messages. A message that violates the contract is counted, logged
and dropped; it has no other effect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from caesura.bus.port import Bus, Delivery
from caesura.bus.refusal_log import RefusalLog
from caesura.contract.codec import ContractError, Received, decode, encode
from caesura.contract.envelope import Message
from caesura.contract.parts import PARTS, Joiner
from caesura.contract.topics import channel_of, match_topic
from caesura.runtime.identity import new_id
from caesura.runtime.logs import get_logger

M = TypeVar("M", bound=Message)

Receiver = Callable[[Any, Received], Awaitable[None]]
"""Takes the message and how it was received (parameters, header)."""

TombstoneHandler = Callable[[Mapping[str, str]], Awaitable[None]]
"""Takes the topic parameters of a retained message that was removed."""

PART_TYPES = frozenset(PARTS.values())

_log = get_logger("caesura.bus")


class MessageClient:
    """A service's typed view of its bus.

    Args:
        bus: the connection; its ``run`` must be given ``self.deliver``.
        source: CloudEvents source, for example ``/caesura/host/host-1``.
        on_refused: called with every message that violates the contract, and the reason.
        wanted: whether a part of a message that is not retained is kept until all parts are there (``Joiner``).
    """

    def __init__(
        self,
        bus: Bus,
        source: str,
        on_refused: Callable[[Delivery, ContractError], Awaitable[None]] | None = None,
        wanted: Callable[[Message], bool] = lambda _: True,
    ) -> None:
        self.bus = bus
        self.source = source
        self.decode_errors: Counter[str] = Counter()
        self._receivers: dict[type[Message], Receiver] = {}
        self._joiner = Joiner(wanted)
        self._as_sent: set[type[Message]] = set()
        """Message types that are delivered as they are sent, without waiting for all parts."""
        self._forgetters: dict[type[Message], TombstoneHandler] = {}
        self._on_refused = on_refused
        self._refused = RefusalLog()
        self.listeners: list[Callable[[Received], Awaitable[None]]] = []
        """Called with every message as it was sent, before its receiver is called."""
        self._farewells: set[str] = set()
        """Topics on which this service has published its last message."""

    def subscribe(
        self,
        message: type[M],
        receiver: Callable[[M, Received], Awaitable[None]],
        *,
        whole: bool = True,
    ) -> None:
        """Have ``receiver`` called for every message of this type that arrives.

        Args:
            whole: a message that comes in parts is delivered when it is complete (``caesura.contract.parts``): subscribe to the parts, too.
                False: as it was sent.
        """
        self._receivers[message] = receiver
        if not whole:
            self._as_sent.add(message)

    @property
    def incomplete(self) -> bool:
        """Whether an incomplete message waits here: its parts, or a newer message, are on their way."""
        return bool(self._joiner.waiting())

    def on_tombstone(self, message: type[Message], forgetter: TombstoneHandler) -> None:
        """Have ``forgetter`` called when a retained message of this type is removed."""
        self._forgetters[message] = forgetter

    async def send(
        self,
        message: Message,
        *,
        event_id: str | None = None,
        timeout_s: float = 10.0,
        **parameters: str | int,
    ) -> None:
        """Publish ``message`` on its topic; ``parameters`` fill the topic template.

        Raises:
            BusUnavailable, PublishRefused: as ``Bus.publish``.
            TopicError, ContractError: the message cannot be sent as it is.
        """
        topic = channel_of(type(message)).topic(**parameters)
        if topic in self._farewells:
            _log.debug("bus.after_farewell", topic=topic)
            return
        await self._publish(message, topic, event_id or new_id(), timeout_s)

    async def send_last(self, message: Message, *, timeout_s: float = 10.0, **parameters: str | int) -> None:
        """Publish the last message of this service on its topic; later calls of ``send`` for that topic are dropped.

        For a goodbye. The tasks that announce a presence (a beat, a reconnect, a goodbye that comes back to its sender) run
        until the bus is closed, and could leave a stopped service retained as online.

        Raises:
            As ``send``; later messages are dropped even then, since the last will serves as the goodbye.
        """
        topic = channel_of(type(message)).topic(**parameters)
        self._farewells.add(topic)
        await self._publish(message, topic, new_id(), timeout_s)

    async def _publish(self, message: Message, topic: str, event_id: str, timeout_s: float) -> None:
        channel = channel_of(type(message))
        payload = encode(message, source=self.source, event_id=event_id, time=datetime.now(UTC))
        await self.bus.publish(topic, payload, qos=channel.qos, retain=channel.retain, timeout_s=timeout_s)

    async def clear(self, message: type[Message], **parameters: str | int) -> None:
        """Remove a retained message (an empty retained payload, MQTT 3.1.1 section 3.3.1.3).

        Raises:
            BusUnavailable, PublishRefused: as ``Bus.publish``.
        """
        await self.bus.publish(channel_of(message).topic(**parameters), b"", qos=1, retain=True)

    async def deliver(self, delivery: Delivery) -> None:
        """Decode one delivery and hand it to its receiver; give this to ``Bus.run``."""
        if not delivery.payload:
            await self._cleared(delivery.topic)
            return
        try:
            received = decode(delivery.topic, delivery.payload)
        except ContractError as error:
            await self._refuse(delivery, error)
            return
        for listener in self.listeners:
            await listener(received)
        kind = received.channel.message
        if kind in PART_TYPES:
            await self._hand_over(received)
        try:
            whole = received if kind in self._as_sent else self._joiner.take(received)
        except ContractError as error:
            await self._refuse(delivery, error)
            return
        if whole is not None:
            await self._hand_over(whole)

    async def _refuse(self, delivery: Delivery, error: ContractError) -> None:
        self.decode_errors[error.kind] += 1
        self._refused.say(delivery.topic, error)
        if self._on_refused is not None:
            await self._on_refused(delivery, error)

    async def _hand_over(self, received: Received) -> None:
        receiver = self._receivers.get(received.channel.message)
        if receiver is not None:
            await receiver(received.message, received)

    async def _cleared(self, topic: str) -> None:
        """An empty retained payload clears a topic; it does not carry a message."""
        self._joiner.clear(topic)
        place = match_topic(topic)
        if place is None:
            return  # not of this contract
        channel, parameters = place
        forgetter = self._forgetters.get(channel.message)
        if forgetter is not None:
            await forgetter(parameters)
