"""The broker of the demo when Mosquitto is not installed: amqtt in its own process, on loopback.

``python -m caesura.bus.embedded --port 1883`` prints one line when it accepts connections and runs until
SIGTERM, SIGINT, or the end of the process named by ``--parent``.

MQTT 3.1.1 only. Do not rely on it for: messages queued for a disconnected client, QoS 0 staying QoS 0,
a retained message arriving once on a wildcard. It has no access rules and accepts every client: loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import Any

from caesura.bus.pdeathsig import die_with
from caesura.bus.port import BusError
from caesura.contract.codec import MAX_PACKET_BYTES

READY = "embedded broker ready"
"""The first line on stdout begins with this as soon as the broker accepts connections."""


class EmbeddedBrokerMissing(BusError):
    """amqtt is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "the embedded broker needs amqtt: pip install 'caesura[embedded]' (or install mosquitto, which is "
            "used when it is there)"
        )


def embedded_available() -> bool:
    """Whether amqtt can be imported."""
    try:
        import amqtt.broker  # noqa: F401, PLC0415 - an optional dependency, and slow to import
    except ImportError:
        return False
    return True


async def serve_embedded(host: str, port: int) -> None:
    """Run the broker until cancelled or signalled.

    Raises:
        EmbeddedBrokerMissing: amqtt is not installed.
        BusError: it did not start (port taken).
    """
    try:
        from amqtt.broker import Broker  # noqa: PLC0415 - an optional dependency
        from amqtt.errors import AMQTTError  # noqa: PLC0415
        from amqtt.mqtt.packet import MQTTFixedHeader  # noqa: PLC0415
    except ImportError:
        raise EmbeddedBrokerMissing from None
    bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    config: dict[str, Any] = {
        "listeners": {"default": {"type": "tcp", "bind": bind}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }

    class DemoBroker(Broker):  # type: ignore[misc]
        """amqtt 0.12.1 with two races fixed that leave a client connected and subscribed, but without messages.

        One: once a second it removes the sessions of disconnected clients, and awaits in the middle of it; a
        client that reconnects at that moment loses its subscriptions. Here sessions are kept.
        Two: a persistent client that reconnects before its old connection is cleaned up shares one session
        object with it, which the old connection then marks as disconnected. Here it is marked again.
        """

        async def _session_monitor(self) -> None:
            await asyncio.Event().wait()

        async def _client_message_loop(self, session: Any, handler: Any) -> None:
            if not session.transitions.is_connected():
                session.transitions.connect()
            await super()._client_message_loop(session, handler)

        async def _handle_disconnect(self, session: Any, handler: Any, waiter: Any) -> None:
            await super()._handle_disconnect(session, handler, waiter)
            current = self._sessions.get(session.client_id)
            if current is not None and current[0] is session and current[1] is not handler:
                session.transitions.connect()

    _limit_packets(MQTTFixedHeader)
    broker = DemoBroker(config)
    try:
        await broker.start()
    except AMQTTError as error:
        raise BusError(f"the embedded broker could not start on {bind}: {error}") from error
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print(f"{READY} mqtt://{bind}", flush=True)  # noqa: T201 - the line that the parent waits for
    try:
        await stop.wait()
    finally:
        # A client that does not close its side can delay amqtt's shutdown; the process ends anyway.
        with contextlib.suppress(TimeoutError, AMQTTError):
            async with asyncio.timeout(2):
                await broker.shutdown()


def _limit_packets(fixed_header: Any) -> None:
    """Make amqtt 0.12.1 treat a packet announced as larger than the limit as the end of the connection.

    It has no setting for that and reads every packet whole. It runs in a process of its own, so the patch affects nothing else.
    """
    read = fixed_header.from_stream

    async def from_stream(reader: Any) -> Any:
        header = await read(reader)
        return None if header is not None and header.remaining_length >= MAX_PACKET_BYTES else header

    fixed_header.from_stream = from_stream


def main() -> None:
    """Command line of ``python -m caesura.bus.embedded``."""
    parser = argparse.ArgumentParser(prog="python -m caesura.bus.embedded", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--parent", type=int, help="end when this process, our parent, ends")
    parser.add_argument("--verbose", action="store_true", help="show what amqtt logs")
    options = parser.parse_args()
    if options.parent is not None:
        die_with(options.parent)
    # amqtt reports every client that closes its socket; in a demo that is noise.
    logging.basicConfig(stream=sys.stderr, level=logging.INFO if options.verbose else logging.CRITICAL)
    try:
        asyncio.run(serve_embedded(options.host, options.port))
    except BusError as error:
        sys.exit(str(error))
    finally:
        sys.stdout.flush()
    os._exit(0)  # do not wait for amqtt tasks that did not end


if __name__ == "__main__":
    main()
