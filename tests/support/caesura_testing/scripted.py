"""A broker that says what a test tells it to, byte by byte: for what no real broker can be made to do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import msgspec

from caesura.bus.port import Bus
from caesura_testing.collector import Collector
from caesura_testing.patience import patient

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 4, 8, 12, 14
_PATIENCE_S = patient(10.0)


class Packet(msgspec.Struct, frozen=True):
    """One MQTT control packet: its type (the high half of the first byte), flags and what follows the length."""

    kind: int
    flags: int
    body: bytes


class ScriptedBroker:
    """Accepts one connection after the other and does nothing by itself; use as an async context manager."""

    def __init__(self) -> None:
        self.port = 0
        self._server: asyncio.Server | None = None
        self._accepted: asyncio.Queue[ScriptedConnection] = asyncio.Queue()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """How clients reach it."""
        return f"mqtt://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()
        for writer in self._writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def accept(self) -> ScriptedConnection:
        """The next connection that a client opened."""
        return await asyncio.wait_for(self._accepted.get(), _PATIENCE_S)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self._accepted.put_nowait(ScriptedConnection(reader, writer))


@contextlib.asynccontextmanager
async def under_way(bus: Bus) -> AsyncIterator[None]:
    """Run a bus without waiting for a connection: the test plays the broker."""
    task = asyncio.create_task(bus.run(Collector().receive))
    try:
        yield
    finally:
        await bus.close()
        await task


class ScriptedConnection:
    """The broker's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, kind: int) -> Packet:
        """The next packet, which must be of this kind.

        Raises:
            AssertionError: it is of another.
        """
        packet = await asyncio.wait_for(self._read(), _PATIENCE_S)
        if packet.kind != kind:
            raise AssertionError(f"expected a packet of kind {kind}, got {packet}")
        return packet

    async def _read(self) -> Packet:
        first = (await self._reader.readexactly(1))[0]
        length = shift = 0
        while True:
            part = (await self._reader.readexactly(1))[0]
            length |= (part & 0x7F) << shift
            shift += 7
            if part < 0x80:
                return Packet(first >> 4, first & 0x0F, await self._reader.readexactly(length))

    async def send(self, *packets: bytes) -> None:
        """Write raw packets."""
        self._writer.write(b"".join(packets))
        await self._writer.drain()

    async def silent(self, seconds: float) -> bool:
        """Whether the client sends nothing for so long."""
        try:
            await asyncio.wait_for(self._reader.read(1), seconds)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


def packet(kind: int, body: bytes, flags: int = 0) -> bytes:
    """Frame a packet; its body must be shorter than 128 bytes."""
    return bytes([kind << 4 | flags, len(body)]) + body


def connack(code: int = 0, *, protocol: str, properties: bytes = b"") -> bytes:
    """The broker's answer to CONNECT."""
    return packet(2, bytes([0, code]) + (bytes([len(properties)]) + properties if protocol == "5" else b""))


def puback(message_id: bytes, code: int = 0) -> bytes:
    """The broker's acknowledgement of a publish; a code only in version 5."""
    return packet(PUBACK, message_id + (bytes([code]) if code else b""))


def publish(topic: str, payload: bytes, message_id: int, *, protocol: str) -> bytes:
    """A QoS 1 message to the client."""
    head = len(topic).to_bytes(2) + topic.encode() + message_id.to_bytes(2)
    return packet(PUBLISH, head + (b"\0" if protocol == "5" else b"") + payload, flags=2)


def message_id_of(sent: Packet) -> bytes:
    """The id of a QoS 1 PUBLISH or a SUBSCRIBE that a client sent."""
    if sent.kind == SUBSCRIBE:
        return sent.body[:2]
    topic_length = int.from_bytes(sent.body[:2])
    return sent.body[2 + topic_length : 4 + topic_length]
