"""One harness for each kind of bus: a broker, buses on it, and the power to do them harm.

The conformance suite runs over all of them. ``BrokerCapabilities`` names the promises that some brokers break; no service
may rely on one of those.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import Enum, auto
from pathlib import Path
from typing import Literal

from caesura.bus.local_broker import LocalBroker
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Bus, Will
from caesura.runtime.settings import Secret
from caesura_testing.broker import mosquitto
from caesura_testing.collector import eventually
from caesura_testing.proxy import TcpProxy

Kind = Literal["memory", "mosquitto-5", "mosquitto-3.1.1", "amqtt"]
KINDS: tuple[Kind, ...] = ("memory", "mosquitto-5", "mosquitto-3.1.1", "amqtt")

# One user, who may not write below denied/.
_USERS = {"suite": "correct horse"}
_ACL = "user suite\ntopic readwrite open/#\ntopic read denied/#\n"


class BrokerCapabilities(Enum):
    """Promises that not every broker keeps; no service may rely on one that is missing somewhere."""

    QUEUE_WHILE_AWAY = auto()
    KEEP_OVER_A_KILL = auto()
    REDELIVER = auto()
    SAY_REFUSED = auto()
    TAKE_OVER = auto()
    QOS_0 = auto()


_WHY_NOT: dict[tuple[Kind, BrokerCapabilities], str] = {
    (
        "amqtt",
        BrokerCapabilities.QUEUE_WHILE_AWAY,
    ): "amqtt says session present but keeps nothing for anonymous clients",
    ("amqtt", BrokerCapabilities.KEEP_OVER_A_KILL): "amqtt keeps everything in memory",
    (
        "amqtt",
        BrokerCapabilities.REDELIVER,
    ): "amqtt forgets an unacknowledged message after 5 s or a disconnect",
    ("amqtt", BrokerCapabilities.SAY_REFUSED): "amqtt has no access rules here, and 3.1.1 cannot say it",
    (
        "amqtt",
        BrokerCapabilities.TAKE_OVER,
    ): "amqtt does not close the older connection of a taken-over client id reliably",
    ("amqtt", BrokerCapabilities.QOS_0): "amqtt delivers QoS 0 as the subscription's QoS 1",
    ("mosquitto-3.1.1", BrokerCapabilities.SAY_REFUSED): "MQTT 3.1.1 has no answer for a refused publish",
}


def why_not(kind: Kind, ability: BrokerCapabilities) -> str | None:
    """Why this broker does not keep a promise; None if it does."""
    return _WHY_NOT.get((kind, ability))


class Harness(ABC):
    """A broker, buses on it, and the power to do them harm."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    @abstractmethod
    async def bus(
        self,
        client_id: str = "",
        *,
        filters: Sequence[str] = (),
        will: Will | None = None,
        clean: bool = True,
        backlog_limit: int = 1_000,
        backlog_bytes: int = 1_000_000,
    ) -> Bus:
        """A bus that can be cut off alone."""

    @abstractmethod
    async def until_stored(self, payload: bytes) -> None:
        """Wait until a broker killed now would come back with this message."""

    @abstractmethod
    async def cut(self, client_id: str) -> None:
        """End one client's connection without a goodbye."""

    @abstractmethod
    async def stall(self) -> None:
        """The broker takes everything and answers nothing."""

    @abstractmethod
    async def kill(self) -> None:
        """The broker dies."""

    @abstractmethod
    async def revive(self) -> None:
        """The broker is there again, at the same address, after ``kill``."""


class MemoryHarness(Harness):
    """Everything in this process; ``denied/...`` may not be published to."""

    def __init__(self) -> None:
        super().__init__("memory")
        self.broker = MemoryBroker(may_publish=lambda _, topic: not topic.startswith("denied/"))

    async def bus(
        self,
        client_id: str = "",
        *,
        filters: Sequence[str] = (),
        will: Will | None = None,
        clean: bool = True,
        backlog_limit: int = 1_000,
        backlog_bytes: int = 1_000_000,
    ) -> Bus:
        return MemoryBus(
            self.broker,
            client_id=client_id,
            filters=filters,
            will=will,
            clean=clean,
            backlog_limit=backlog_limit,
            backlog_bytes=backlog_bytes,
        )

    async def until_stored(self, payload: bytes) -> None:
        """Nothing to wait for: ``down`` keeps everything."""

    async def cut(self, client_id: str) -> None:
        self.broker.kill(client_id)

    async def stall(self) -> None:
        self.broker.stall()

    async def kill(self) -> None:
        self.broker.down()

    async def revive(self) -> None:
        self.broker.up()


class MqttHarness(Harness):
    """A broker process, and a proxy for each named client."""

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        broker: LocalBroker,
        protocol: Literal["auto", "5", "3.1.1"],
        stack: AsyncExitStack,
    ) -> None:
        super().__init__(kind)
        self._folder = folder
        self.broker = broker
        self._protocol = protocol
        self._stack = stack
        self._proxies: dict[str, TcpProxy] = {}

    async def bus(
        self,
        client_id: str = "",
        *,
        filters: Sequence[str] = (),
        will: Will | None = None,
        clean: bool = True,
        backlog_limit: int = 1_000,
        backlog_bytes: int = 1_000_000,
    ) -> Bus:
        url = self.broker.url
        if client_id:
            if client_id not in self._proxies:
                proxy = TcpProxy(self.broker.host, self.broker.port)
                self._proxies[client_id] = await self._stack.enter_async_context(proxy)
            url = self._proxies[client_id].url
        options = BrokerOptions(
            url=url,
            client_id=client_id,
            username="suite",
            password=Secret(_USERS["suite"]),
            protocol=self._protocol,
            clean=clean,
            backlog_limit=backlog_limit,
            backlog_bytes=backlog_bytes,
            reconnect_min_s=0.05,
            reconnect_max_s=0.5,
        )
        return MqttBus(options, filters=filters, will=will)

    async def until_stored(self, payload: bytes) -> None:
        store = self._folder / "mosquitto.db"
        await eventually(lambda: store.exists() and payload in store.read_bytes())

    async def cut(self, client_id: str) -> None:
        self._proxies[client_id].cut()

    async def stall(self) -> None:
        if self.broker.pid is not None:
            os.kill(self.broker.pid, signal.SIGSTOP)

    async def kill(self) -> None:
        await self.broker.kill()

    async def revive(self) -> None:
        await self.broker.start()


@asynccontextmanager
async def harness_of(kind: Kind, folder: Path) -> AsyncIterator[Harness]:
    """Start what ``kind`` needs, keeping its files in ``folder``.

    Raises:
        BrokerNotStarted, EmbeddedBrokerMissing: it is not installed.
    """
    if kind == "memory":
        yield MemoryHarness()
        return
    async with AsyncExitStack() as stack:
        protocol: Literal["auto", "5", "3.1.1"]
        if kind == "amqtt":
            broker = LocalBroker(kind="embedded", data_dir=folder)
            protocol = broker.protocol
        else:
            # Many test clients share one user: their ids must stay their own.
            extra = ["use_username_as_clientid false"]
            broker = mosquitto(folder, users=_USERS, acl=_ACL, extra=extra)
            protocol = "5" if kind == "mosquitto-5" else "3.1.1"
        await stack.enter_async_context(broker)
        yield MqttHarness(kind, folder, broker, protocol, stack)
