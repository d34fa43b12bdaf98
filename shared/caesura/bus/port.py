"""The bus port: what a service may ask of a message bus, and what it gets.

It has two adapters, ``caesura.bus.mqtt`` (aiomqtt) and ``caesura.bus.memory``; one conformance
suite (``tests/integration/bus``) checks both against what is written here. Nothing above this port knows MQTT.

The promises, and the ones that are *not* made:

- Delivery is at least once. A message may arrive twice, and after a failover late; handlers are idempotent.
- Messages of one publisher on one topic arrive in order while the connection lasts.
- A message is acknowledged to the broker only after the handler returned and, where the service stores what follows from it, after that
  is on disk; so a crash before leads to redelivery (where the broker keeps sessions).
- A publish that returned was accepted by the broker. That proves nothing about its readers: senders of
  commands repeat until the state shows the effect.
- After every (re)connect all filters are subscribed again and the ``on_connected`` hook runs, where
  services publish their retained state again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec

from caesura.runtime.errors import CaesuraError


class BusError(CaesuraError):
    """Any failure between a service and its broker."""


class BusUnavailable(BusError):
    """No connection to the broker within the time allowed; the message was not accepted."""


class PublishRefused(BusError):
    """The broker answered that this client may not publish to this topic (MQTT 5 reason 0x87).

    MQTT 3.1.1 brokers do not report it: there a refused publish looks accepted.
    """

    def __init__(self, topic: str, reason: str) -> None:
        self.topic = topic
        self.reason = reason
        super().__init__(
            f"the broker refused a message on {topic!r}: {reason}. Check this user's write access in the broker's access rules."
        )


class PublishTooLarge(PublishRefused):
    """The message is larger than this broker accepts: it would close the connection."""

    def __init__(self, topic: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            topic, f"{size_bytes} bytes, and this broker takes at most {limit_bytes} in a packet"
        )
        self.args = (f"a message on {topic!r} has {self.reason}: raise its max_packet_size",)


class Delivery(msgspec.Struct, frozen=True):
    """One message as it came from the bus. ``retained`` is true for state that was stored before we subscribed."""

    topic: str
    payload: bytes
    retained: bool = False


class Will(msgspec.Struct, frozen=True):
    """What the broker publishes for us, retained and at QoS 1, when our connection ends without a DISCONNECT."""

    topic: str
    payload: bytes


class BusStats(msgspec.Struct):
    """Counters since start, for health probes and metrics."""

    connected: bool = False
    connects: int = 0
    received: int = 0
    published: int = 0
    publish_failures: int = 0
    dropped: int = 0
    """QoS 0 messages dropped because the handler was too slow (the bounded queue was full)."""
    refused: dict[str, int] = {}
    """Maps a party to the number of its messages above their writer's rate, or retained on a topic that retains nothing."""
    backlog: int = 0
    """Messages received and not yet handled, or handled and not yet acknowledged."""
    unhandled: int = 0
    """Messages received that wait for the handler, without the one that it has."""
    last_error: str = ""


Handler = Callable[[Delivery], Awaitable[None]]
Connected = Callable[[], Awaitable[None]]


class Commits(Protocol):
    """Where a service stores what follows from messages, and syncs it later (``caesura.runtime.group_commit``)."""

    @property
    def settled(self) -> bool:
        """Whether everything that was stored is on disk."""

    async def reached(self) -> object:
        """Wait until everything that is stored now is on disk."""


class Bus(Protocol):
    """One connection to the bus, kept alive for as long as ``run`` runs."""

    @property
    def stats(self) -> BusStats:
        """Live counters; the same object for the life of the bus."""

    async def run(
        self, receive: Handler, on_connected: Connected | None = None, commits: Commits | None = None
    ) -> None:
        """Connect, subscribe, deliver one message after the other to ``receive``; reconnect indefinitely.

        An exception of ``receive`` is logged with the topic and the message counts as handled (a message
        that crashes its handler would otherwise come back indefinitely). Returns only after ``close``.

        Args:
            commits: messages that were handled are acknowledged when they are settled; the next messages are handled in the meantime.
                An exception from ``reached`` ends ``run``.
        """

    async def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout_s: float = 10.0
    ) -> None:
        """Publish and wait until the broker accepted the message (QoS 1) or it was written out (QoS 0).

        Raises:
            BusUnavailable: no connection, or no acknowledgement, within ``timeout_s`` seconds; raised at once
                when the connection ends while waiting, never after hanging on a dead one.
            PublishRefused: the broker refused (MQTT 5 only).
        """

    def subscribe_also(self, filters: Sequence[str]) -> None:
        """Subscribe to these, too, now and after every connect; those that are subscribed to already are left as they are.

        Returns at once; what the broker refuses ends the connection, as at a connect.
        """

    async def wait_connected(self, timeout_s: float) -> bool:
        """True as soon as connected and subscribed, false after ``timeout_s`` seconds."""

    async def close(self) -> None:
        """Disconnect cleanly (the will is not sent) and make ``run`` return."""
