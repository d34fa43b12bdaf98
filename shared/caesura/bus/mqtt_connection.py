# ruff: noqa: ARG002 - paho calls back with parameters that it fixes
"""One MQTT connection: aiomqtt's client with its gaps closed. The only home of aiomqtt and paho.

What stock aiomqtt 2.5 does, and why it is not enough here:

- it acknowledges a message before its handler ran (7 of 10 were lost in a crash): ``acknowledge`` is ours;
- it hides a denied publish: ``on_publish`` here keeps the reason code;
- a pending publish waits out its timeout when the broker dies: here it ends with the connection;
- it keeps waiting for a broker that closes without answering CONNECT: here that fails at once;
- it reads a message of any size: here MQTT 5 asks the broker to omit messages larger than the contract allows, and one that
  arrives anyway is read to its end and discarded beyond the limit;
- it connects in a thread, and registers sockets with the loop later, when they may be closed again.

This touches private attributes of both libraries, hence their exact versions in pyproject.toml (ADR 19), one test per behaviour in
``tests/unit/bus/test_mqtt_connection.py``, and ``tests/unit/bus/test_private_names.py``, which an upgrade fails by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import aiomqtt
import msgspec
import paho.mqtt.client as paho
from aiomqtt.exceptions import MqttConnectError
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from caesura.bus.connect import open_socket
from caesura.bus.diagnosis import (
    ClosedEarly,
    ConnectionLost,
    ConnectRefused,
    ConnectTimeout,
    SubscribeRefused,
)
from caesura.bus.mqtt_properties import PUBLISH_BYTES, connect_properties, content_type
from caesura.bus.options import BrokerOptions, TlsFilesUnusable
from caesura.bus.port import BusUnavailable, PublishRefused, PublishTooLarge, Will
from caesura.contract.codec import MAX_PACKET_BYTES
from caesura.runtime.threads import Worker

Protocol = Literal["5", "3.1.1"]
_CHUNK_BYTES = 64 * 1024  # the most that is read at once, and so held above the limit
_GOODBYE_S = 1.0  # s: the DISCONNECT packet goes into the kernel's buffer; a full buffer means a dead peer
_MISC_S = 1.0  # s: how often paho looks at its keepalive; its smallest unit is a second

_disk = Worker("certificates")
"""One for all connections: a disk that hangs costs one thread, however often connecting is tried."""


class IncomingMessage(msgspec.Struct, frozen=True):
    """A message as it came off the wire. ``message_id`` is what QoS 1 acknowledges; 0 for QoS 0."""

    topic: str
    payload: bytes
    retained: bool
    qos: int
    message_id: int


class MqttConnection(aiomqtt.Client):
    """One connection, from CONNECT to its end; a new one is built for every attempt.

    Args:
        options: where and who.
        protocol: the MQTT version to speak.
        will: last will, or None.
        arrived: called in the event loop for each message received.
    """

    def __init__(
        self,
        options: BrokerOptions,
        protocol: Protocol,
        *,
        will: Will | None,
        arrived: Callable[[MqttConnection, IncomingMessage], None],
    ) -> None:
        self.protocol: Protocol = protocol
        self.session_present = False
        self._options = options
        self._arrived = arrived
        self._paused = False
        self.calls = 0
        """How many of our callers wait for an answer of the broker: while any does, reading must continue."""
        self._acks: dict[int, asyncio.Future[ReasonCode | None]] = {}
        self._pinged_at_s: float | None = None
        """When a ping was sent because nothing else came, by the loop's clock."""
        self._slots = asyncio.Semaphore(options.max_in_flight)
        self._end_reason: ReasonCode | None = None
        five = protocol == "5"
        self._publish_properties = content_type(PacketTypes.PUBLISH) if five else None
        super().__init__(
            # paho wants a host and a port; the socket is opened by ``open_socket``, which knows the real address.
            hostname=options.address.host or "unix-socket",
            port=options.address.port or 1,
            identifier=options.identifier,
            username=options.username or None,
            password=options.password.reveal() or None,
            protocol=aiomqtt.ProtocolVersion.V5 if five else aiomqtt.ProtocolVersion.V311,
            will=aiomqtt.Will(
                will.topic,
                will.payload,
                qos=1,
                retain=True,
                properties=content_type(PacketTypes.WILLMESSAGE) if five else None,
            )
            if will
            else None,
            clean_session=None if five else options.clean,
            clean_start=options.clean if five else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=connect_properties(options) if five else None,
            timeout=options.connect_timeout_s,
            keepalive=options.keepalive_s,
            max_inflight_messages=options.max_in_flight,
        )
        self._client.manual_ack_set(True)
        self._receive = self._client._sock_recv  # noqa: SLF001
        self._client._sock_recv = self._receive_bounded  # type: ignore[method-assign]  # noqa: SLF001
        self._largest_bytes = math.inf
        self._read_at_s = -math.inf
        """When bytes last arrived, by the loop's clock."""
        # It logs every lost connection as an error; the bus reports each, with advice.
        self._client.disable_logger()
        self._disconnected.add_done_callback(self._on_end)

    @property
    def ended(self) -> bool:
        """Whether the connection has ended, for any reason."""
        return self._disconnected.done()

    async def open(self) -> None:
        """Connect and wait until the broker accepts.

        Raises:
            OSError: not reached in time (``TimeoutError``), refused, TLS (``TlsFilesUnusable`` among them).
            ConnectRefused, ClosedEarly, NoAnswer: reached, but not accepted.
        """
        options = self._options
        context = await _tls(options)
        sock = await open_socket(options.address, context, options.connect_timeout_s)
        self._client._create_socket = lambda: sock  # type: ignore[method-assign]  # noqa: SLF001
        try:
            self._client_connect()
            await self._answer(options.connect_timeout_s)
        except MqttConnectError as error:
            await self.abort()
            raise _refused(error) from None
        except BaseException:
            await self.abort()
            sock.close()
            raise

    async def _answer(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected
        except TimeoutError:
            raise ConnectTimeout from None

    async def subscribe_all(self, filters: Sequence[str], instead_of: Sequence[str] = ()) -> None:
        """Subscribe to all filters with one packet; right behind it, unsubscribe from those of ``instead_of``.

        A broker processes them in this order, so nothing is missed in between; and no caller waits for its first answer, which
        comes behind everything queued for us.

        The broker's answer may come behind everything that it kept for this session, however much that is: the wait lasts
        as long as bytes arrive, and while it is we who do not read.

        Raises:
            SubscribeRefused, ConnectionLost.
            TimeoutError: the broker was silent for the connect timeout.
        """
        if not filters:
            return
        wanted: list[tuple[str, int]] = [(each, self._options.subscribe_qos) for each in filters]
        call = asyncio.ensure_future(self.subscribe(wanted, timeout=math.inf))
        try:
            await asyncio.sleep(0)  # let it run until it waits for the answer
            self.drop(instead_of)
            waits: set[asyncio.Future[Any]] = {call, self._disconnected}
            silent_s, silence_s = 0.0, self._options.connect_timeout_s
            self._read_at_s = self._loop.time()
            while not call.done():
                await asyncio.wait(waits, timeout=silence_s - silent_s, return_when=asyncio.FIRST_COMPLETED)
                if self.ended and not call.done():
                    raise self._lost()
                if self._paused:
                    self._read_at_s = self._loop.time()
                silent_s = self._loop.time() - self._read_at_s
                if silent_s >= silence_s and not call.done():
                    raise TimeoutError("no answer to SUBSCRIBE")
            codes = call.result()
        except aiomqtt.MqttError as error:
            if self.ended:
                raise self._lost() from error
            raise
        finally:
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError, aiomqtt.MqttError):
                await call
        # paho's version 2 callbacks give reason codes for 3.1.1 too; aiomqtt's annotation also allows numbers.
        refused = [
            each
            for each, code in zip(filters, codes, strict=True)
            if not isinstance(code, ReasonCode) or code.is_failure
        ]
        if refused:
            raise SubscribeRefused(refused)

    def drop(self, filters: Sequence[str]) -> None:
        """Unsubscribe, without waiting: the broker's answer comes behind what is queued for us already."""
        if self.ended or not filters:
            return
        _, number = self._client.unsubscribe(list(filters))
        if number is not None:
            self._pending_unsubscribes[number] = asyncio.Event()

    async def send(self, topic: str, payload: bytes, *, qos: int, retain: bool, deadline: float) -> None:
        """Publish and wait until the broker accepted it (QoS 1) or it was written to the socket (QoS 0).

        Args:
            deadline: loop time in seconds.

        Raises:
            BusUnavailable: the connection ended, or no answer by ``deadline``. The in-flight slot stays occupied
                until the answer comes or the connection ends: memory stays bounded however many callers give up.
            PublishRefused: the broker refused, or would refuse.
        """
        size_bytes = len(payload) + PUBLISH_BYTES + (len(topic) if topic.isascii() else len(topic.encode()))
        if size_bytes > self._largest_bytes:
            raise PublishTooLarge(topic, size_bytes, int(self._largest_bytes))
        if self._slots.locked():
            await self._slot(topic, deadline)
        else:
            await self._slots.acquire()  # at once
        if self.ended:
            self._slots.release()
            raise BusUnavailable(f"the connection ended before the message on {topic!r} was sent")
        try:
            # An empty payload removes the retained message and has no content type.
            info = self._client.publish(
                topic, payload, qos, retain, self._publish_properties if payload else None
            )
        except BaseException:
            self._slots.release()
            raise
        if info.rc != paho.MQTT_ERR_SUCCESS:
            self._slots.release()
            raise BusUnavailable(f"could not send on {topic!r}: {paho.error_string(info.rc)}")
        if info.is_published():
            self._slots.release()
            return
        # The broker's answer frees the slot, not our return to the caller.
        answer: asyncio.Future[ReasonCode | None] = self._loop.create_future()
        self._acks[info.mid] = answer
        timer = self._loop.call_at(deadline, _too_late, answer)
        try:
            code = await answer
        except TimeoutError:
            raise BusUnavailable(f"the broker did not acknowledge the message on {topic!r} in time") from None
        finally:
            timer.cancel()
        if code is None:
            raise BusUnavailable(f"the connection ended before the message on {topic!r} was acknowledged")
        if code.is_failure:
            raise PublishRefused(topic, f"{code.getName()} (0x{code.value:02x})")

    async def _slot(self, topic: str, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
        except TimeoutError:
            raise BusUnavailable(
                f"no room to publish on {topic!r}: {len(self._acks)} messages wait for the broker's answer"
            ) from None

    def acknowledge(self, arrival: IncomingMessage) -> None:
        """Acknowledge this message to the broker; nothing to do for QoS 0 or once the connection has ended."""
        if arrival.qos and not self.ended:
            self._client.ack(arrival.message_id, arrival.qos)

    def pause(self) -> None:
        """Stop reading from the socket: TCP holds the sender back. Pings are still sent."""
        sock = self._client.socket()
        if not self._paused and isinstance(sock, socket.socket) and sock.fileno() >= 0:
            self._paused = True
            self._loop.remove_reader(sock.fileno())

    def resume(self) -> None:
        """Read again."""
        sock = self._client.socket()
        if self._paused and isinstance(sock, socket.socket) and sock.fileno() >= 0:
            self._paused = False
            self._loop.add_reader(sock.fileno(), self._read)
            # Data that TLS has decrypted already does not make the socket readable.
            self._loop.call_soon(self._read)

    @property
    def paused(self) -> bool:
        return self._paused

    async def until_end(self) -> ConnectionLost:
        """Wait until the connection ends, and say why."""
        await asyncio.wait({self._disconnected})
        return self._lost()

    async def disconnect(self) -> None:
        """Send DISCONNECT, so that the last will is not sent, and free everything."""
        try:
            if not self.ended and self._client.disconnect() == paho.MQTT_ERR_SUCCESS:
                await asyncio.wait({self._disconnected}, timeout=_GOODBYE_S)
        finally:
            await self.abort()

    async def abort(self) -> None:
        """Close the socket without DISCONNECT and end every task and wait of this connection."""
        self._client._sock_close()  # noqa: SLF001
        for future in (self._connected, self._disconnected):
            if not future.done():
                future.cancel()
            elif not future.cancelled():
                future.exception()  # retrieved, since nobody else may await it
        if self._misc_task is not None:
            self._misc_task.cancel()
            await asyncio.wait({self._misc_task})

    # paho's callbacks; all run in the event loop, since nothing here uses a thread.

    def _on_connect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.ConnectFlags,
        reason_code: ReasonCode,
        *rest: Any,
    ) -> None:
        self.session_present = flags.session_present
        limit = getattr(rest[0], "ReceiveMaximum", self._options.max_in_flight) if rest else None
        if limit is not None and limit < self._options.max_in_flight:
            self._slots = asyncio.Semaphore(limit)
        self._largest_bytes = getattr(rest[0], "MaximumPacketSize", math.inf) if rest else math.inf
        super()._on_connect(client, userdata, flags, reason_code, *rest)

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.DisconnectFlags,
        reason_code: ReasonCode,
        *rest: Any,
    ) -> None:
        self._end_reason = reason_code
        if not self._connected.done():
            self._connected.set_exception(ClosedEarly(reason_code.getName()))
            return
        super()._on_disconnect(client, userdata, flags, reason_code, *rest)

    def _on_publish(
        self, client: paho.Client, userdata: Any, mid: int, reason_code: ReasonCode, properties: Properties
    ) -> None:
        answer = self._acks.pop(mid, None)
        if answer is None:
            return
        self._slots.release()
        if not answer.done():
            answer.set_result(reason_code)

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        self._arrived(
            self,
            IncomingMessage(
                message.topic, bytes(message.payload), bool(message.retain), message.qos, message.mid
            ),
        )

    def _on_socket_open(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._loop.add_reader(sock.fileno(), self._read)
        self._misc_task = self._loop.create_task(self._misc_loop(), name="bus-keepalive")

    def _on_socket_close(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_reader(sock.fileno())
        if self._misc_task is not None:
            self._misc_task.cancel()

    def _on_socket_register_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._loop.add_writer(sock.fileno(), self._write)

    def _on_socket_unregister_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_writer(sock.fileno())

    def _receive_bounded(self, bufsize: int) -> bytes:
        """paho's read of the socket; of a packet above the limit it keeps the beginning, which is enough to acknowledge it."""
        packet = self._client._in_packet["packet"]  # noqa: SLF001
        if len(packet) > MAX_PACKET_BYTES:
            del packet[MAX_PACKET_BYTES:]
        return self._receive(min(bufsize, _CHUNK_BYTES))

    def _read(self) -> None:
        self._read_at_s = self._loop.time()
        with self._ending_on_error():
            while not self._paused:
                self._client.loop_read()
                sock = self._client.socket()
                # TLS decrypts whole records: the socket does not signal the rest of one.
                if not isinstance(sock, ssl.SSLSocket) or not sock.pending():
                    break

    def _write(self) -> None:
        with self._ending_on_error():
            self._client.loop_write()

    @contextlib.contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        """paho raises whatever the socket or a malformed packet raises; each ends the connection."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            if not self._connected.done():
                self._connected.set_exception(ClosedEarly(f"{type(error).__name__}: {error}"))
            elif not self._disconnected.done():
                self._disconnected.set_exception(error)

    async def _misc_loop(self) -> None:
        while True:
            if self._paused:
                # We do not read, so no ping answer can arrive; without this, paho would give up the connection.
                self._client._ping_t = 0.0  # noqa: SLF001
            if self._client.loop_misc() != paho.MQTT_ERR_SUCCESS:
                return
            if self._options.silence_s and self._silent(self._options.silence_s):
                self._disconnected.set_exception(
                    BusUnavailable(f"no answer to a ping for {self._options.silence_s:g} s")
                )
                return
            await asyncio.sleep(_MISC_S)

    def _silent(self, silence_s: float) -> bool:
        """Whether the broker hangs, while its kernel keeps the connection: nothing came, and then no answer to a ping.

        A node answers pings by itself, also while its cluster has no leader. The protocol's own keepalive is longer, since a frozen
        guest sends nothing. One that wakes up reads what has arrived before it comes here.
        """
        now_s = self._loop.time()
        if self._paused or (self._pinged_at_s is not None and self._read_at_s >= self._pinged_at_s):
            self._pinged_at_s = None
        if self._paused or self.ended or not self._connected.done() or now_s - self._read_at_s < silence_s:
            return False
        if self._pinged_at_s is None:
            self._pinged_at_s = now_s
            self._client._send_pingreq()  # noqa: SLF001
            return False
        return now_s - self._pinged_at_s >= silence_s

    def _on_end(self, _: asyncio.Future[None]) -> None:
        for answer in list(self._acks.values()):
            self._slots.release()
            if not answer.done():
                answer.set_result(None)
        self._acks.clear()

    def _lost(self) -> ConnectionLost:
        error = None if self._disconnected.cancelled() else self._disconnected.exception()
        if self._end_reason is not None:
            return ConnectionLost(self._end_reason.value, self._end_reason.getName())
        return ConnectionLost(0, str(error) if error else "closed")


async def _tls(options: BrokerOptions) -> ssl.SSLContext | None:
    """``BrokerOptions.tls``, outside the event loop: the disk with the certificates may hang."""
    if options.address.scheme != "mqtts":
        return None
    try:
        async with asyncio.timeout(options.connect_timeout_s):
            return await _disk.do(options.tls)
    except TimeoutError:
        raise TlsFilesUnusable(
            f"the files of CA, certificate and key cannot be read within {options.connect_timeout_s:g} s",
            "check the disk or the mount that holds them",
        ) from None


def _too_late(answer: asyncio.Future[ReasonCode | None]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


def _refused(error: MqttConnectError) -> ConnectRefused:
    if isinstance(error.rc, ReasonCode):
        return ConnectRefused(error.rc.value, error.rc.getName())
    return ConnectRefused(error.rc or 0, str(error))
