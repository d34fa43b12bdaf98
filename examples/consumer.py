"""A custom consumer with plain aiomqtt and json: who was paused, for how long, was the clock put right."""

import argparse
import asyncio
import json
import ssl
import sys
from pathlib import Path
from typing import Any

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

EXAMPLES = """examples:
  consumer.py                       a broker on this machine that asks for nothing, as that of ./demo --keep
  consumer.py broker.example.net 8883 --ca ca.pem --user exporter_billing --password-file ~/.config/caesura/password
  consumer.py --session billing     what happens while it is away waits at the broker, for an hour
"""
SESSION_S = 3600

parser = argparse.ArgumentParser(
    description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("host", nargs="?", default="127.0.0.1", help="of the broker (default: %(default)s)")
parser.add_argument("port", nargs="?", default=1883, type=int, help="of the broker (default: %(default)s)")
parser.add_argument("--tls", action="store_true", help="speak TLS; the system's authorities are trusted")
parser.add_argument("--ca", metavar="FILE", help="speak TLS; this authority (PEM) alone is trusted")
parser.add_argument("--user", help="at the broker")
parser.add_argument("--password-file", metavar="FILE", type=Path, help="holds the password, in one line")
parser.add_argument(
    "--session", metavar="NAME", help="keep a session under this client id; connect again when lost"
)
options = parser.parse_args()


def client() -> aiomqtt.Client:
    tls = ssl.create_default_context(cafile=options.ca) if options.tls or options.ca else None
    password = options.password_file.expanduser().read_text().strip() if options.password_file else None
    session: dict[str, Any] = {}
    if options.session:  # MQTT 5: not clean, and kept for a time after the connection ended
        kept = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        kept.SessionExpiryInterval = SESSION_S
        session = {"protocol": aiomqtt.ProtocolVersion.V5, "clean_start": False, "properties": kept}
    return aiomqtt.Client(
        options.host,
        options.port,
        identifier=options.session,
        username=options.user,
        password=password,
        tls_context=tls,
        **session,
    )


def show(event: dict[str, Any]) -> None:  # a CloudEvent; look at its type before its data
    vm = event["data"].get("vm")
    if event["type"] == "caesura.vm.resumed.v1":
        print(f"{vm}: paused {event['data']['pause_s']:.3f} s", flush=True)
    elif event["type"] == "caesura.vm.clock-synced.v1":
        print(f"{vm}: clock synced: {event['data']['synced']}", flush=True)


async def listen() -> None:
    async with client() as mqtt:
        await mqtt.subscribe("caesura/v1/host/+/set/+/ud/+/vm/+/+", qos=1)
        # aiomqtt acknowledges a message as it arrives: what a crash leaves unhandled in its queue is lost, session or
        # not. It may also come twice after a reconnect: `id` is the same then.
        async for message in mqtt.messages:
            show(json.loads(bytes(message.payload)))


async def main() -> None:
    while True:
        try:
            await listen()
        except aiomqtt.MqttError as error:  # not there, not authorized, gone
            if not options.session:
                raise
            print(f"{options.host}:{options.port}: {error}; trying again in 2 s", file=sys.stderr, flush=True)
            await asyncio.sleep(2)


try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(130)
except (aiomqtt.MqttError, OSError) as error:  # OSError: a file, or TLS
    sys.exit(f"{options.host}:{options.port}: {error}")
