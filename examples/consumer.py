"""A custom consumer with plain aiomqtt and json: who was paused, for how long, was the clock put right."""

import argparse
import asyncio
import json
import sys

import aiomqtt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("host", nargs="?", default="127.0.0.1", help="of the broker (default: %(default)s)")
parser.add_argument("port", nargs="?", default=1883, type=int, help="of the broker (default: %(default)s)")
broker = parser.parse_args()


async def main() -> None:
    async with aiomqtt.Client(broker.host, broker.port) as client:
        await client.subscribe("caesura/v1/host/+/set/+/ud/+/vm/+/+", qos=1)
        async for message in client.messages:
            event = json.loads(bytes(message.payload))  # a CloudEvent; look at its type before its data
            vm = event["data"].get("vm")
            if event["type"] == "caesura.vm.resumed.v1":
                print(f"{vm}: paused {event['data']['pause_s']:.3f} s", flush=True)
            elif event["type"] == "caesura.vm.clock-synced.v1":
                print(f"{vm}: clock synced: {event['data']['synced']}", flush=True)


try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(130)
except aiomqtt.MqttError as error:  # not there, not authorized, gone; a consumer for good would connect again
    sys.exit(f"{broker.host}:{broker.port}: {error}")
