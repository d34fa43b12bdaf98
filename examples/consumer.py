"""A custom consumer with plain aiomqtt and json: who was paused, for how long, was the clock put right.

Usage: python examples/consumer.py [HOST [PORT]]
"""

import asyncio
import json
import sys

import aiomqtt

HOST = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
PORT = int(sys.argv[2]) if len(sys.argv) > 2 else 1883


async def main() -> None:
    async with aiomqtt.Client(HOST, PORT) as client:
        await client.subscribe("caesura/v1/host/+/set/+/ud/+/vm/+/+", qos=1)
        async for message in client.messages:
            event = json.loads(bytes(message.payload))  # a CloudEvent; look at its type before its data
            vm = event["data"].get("vm")
            if event["type"] == "caesura.vm.resumed.v1":
                print(f"{vm}: paused {event['data']['pause_s']:.3f} s", flush=True)
            elif event["type"] == "caesura.vm.clock-synced.v1":
                print(f"{vm}: clock synced: {event['data']['synced']}", flush=True)


asyncio.run(main())
