"""One harness for each kind of bus that Caesura runs on; the bus conformance suite runs over all of them."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal

from caesura.bus.local_broker import LocalBroker
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Bus, Will
from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness, MemoryHarness
from caesura.conformance.collector import eventually
from caesura.runtime.settings import Secret
from caesura_testing.broker import mosquitto
from caesura_testing.proxy import TcpProxy

Kind = Literal["memory", "mosquitto-5", "mosquitto-3.1.1", "amqtt"]
KINDS: tuple[Kind, ...] = ("memory", "mosquitto-5", "mosquitto-3.1.1", "amqtt")

# One user, who may not write below denied/.
_USERS = {"suite": "correct horse"}
_ACL = "user suite\ntopic readwrite open/#\ntopic read denied/#\n"


_AMQTT_LACKS = {
    BrokerCapabilities.QUEUE_WHILE_AWAY: "amqtt says session present but keeps nothing for anonymous clients",
    BrokerCapabilities.KEEP_OVER_A_KILL: "amqtt keeps everything in memory",
    BrokerCapabilities.REDELIVER: "amqtt forgets an unacknowledged message after 5 s or a disconnect",
    BrokerCapabilities.SAY_REFUSED: "amqtt has no access rules here, and 3.1.1 cannot say it",
    BrokerCapabilities.TAKE_OVER: "amqtt does not close the older connection of a taken-over client id reliably",
    BrokerCapabilities.QOS_0: "amqtt delivers QoS 0 as the subscription's QoS 1",
}
_MISSING: Mapping[Kind, Mapping[BrokerCapabilities, str]] = {
    "amqtt": _AMQTT_LACKS,
    "mosquitto-3.1.1": {BrokerCapabilities.SAY_REFUSED: "MQTT 3.1.1 has no answer for a refused publish"},
}


class MqttHarness(BusHarness):
    """A broker process, and a proxy for each named client."""

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        broker: LocalBroker,
        protocol: Literal["auto", "5", "3.1.1"],
        stack: AsyncExitStack,
    ) -> None:
        self.missing = _MISSING.get(kind, {})
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
async def harness_of(kind: Kind, folder: Path) -> AsyncIterator[BusHarness]:
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
