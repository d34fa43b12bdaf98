"""What the bus costs: QoS 1 messages a second of the suite, with envelope, beside bare aiomqtt with the same bytes.

    python benchmarks/bus.py                   # some 40 s; prints the two rates and their ratio
    python benchmarks/bus.py --messages 20000 --rounds 9

One Mosquitto with the shipped settings, one process that publishes. *Bare* is ``aiomqtt.Client.publish`` with bytes that were
encoded before. *Suite* is ``MessageClient.send``: topic, envelope with a fresh id and time, JSON, the bus with its reason codes and
deadlines. *Publisher* is ``ReliablePublisher`` with messages that are encoded as they are put. Each has the same number of
messages in flight. The ways take turns in short rounds, and a ratio is the median of the rounds' ratios. Where the process
that publishes is the bottleneck and the machine does something else too, the ratio by CPU time is the one to read: messages for
each second of CPU of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import aiomqtt

from caesura.bus.local_broker import LocalBroker, free_port
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import BusError
from caesura.contract.codec import encode
from caesura.contract.messages import VmResumed
from caesura.contract.topics import channel_of
from caesura.delivery.message import prepare
from caesura.delivery.publisher import ReliablePublisher
from caesura.runtime.identity import new_id
from caesura_testing.collector import running

MESSAGES = 2_000
ROUNDS = 15
IN_FLIGHT = 20
_VMS = 100
_SOURCE = "/caesura/default/host/host-1"


def fact(number: int) -> VmResumed:
    """A message of usual size: what a host says of each VM."""
    return VmResumed(
        vm=f"vm-{number % _VMS}",
        host="host-1",
        set="web",
        update_domain=number % 5,
        operation="3f1c9b1e-6a56-4a0e-9a3c-8f7a4f6f2d11",
        method="freeze",
        pause_s=0.25,
        budget_s=10.0,
        within_budget=True,
        resumed_by="updater",
        at=datetime(2026, 4, 20, 12, 0, tzinfo=UTC),
    )


def place(message: VmResumed) -> dict[str, str | int]:
    """Its topic's parameters."""
    return {"host": message.host, "set": message.set, "ud": message.update_domain, "vm": message.vm}


class Speed(NamedTuple):
    """Messages for each second of wall-clock time, and for each second of CPU."""

    wall: float
    cpu: float


class Watch:
    """Times the block that it is made before."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def speed(self, messages: int) -> Speed:
        """Of so many messages since."""
        return Speed(
            messages / (time.perf_counter() - self._wall_s), messages / (time.process_time() - self._cpu_s)
        )


async def rate(publish: Callable[[int], Awaitable[None]], messages: int) -> Speed:
    """Publish so many, with so many in flight."""
    numbers = iter(range(messages))

    async def one() -> None:
        for number in numbers:
            await publish(number)

    watch = Watch()
    await asyncio.gather(*(one() for _ in range(IN_FLIGHT)))
    return watch.speed(messages)


async def measure(messages: int, rounds: int) -> None:
    """Print the rates and the ratios."""
    facts = [fact(number) for number in range(_VMS)]
    topics = [channel_of(VmResumed).topic(**place(each)) for each in facts]
    ready = [encode(each, source=_SOURCE, event_id=new_id(), time=datetime.now(UTC)) for each in facts]
    with tempfile.TemporaryDirectory(prefix="caesura-bench-") as folder:
        port = free_port()
        async with LocalBroker(kind="mosquitto", port=port, data_dir=Path(folder)) as broker:
            options = BrokerOptions(url=broker.url, max_in_flight=IN_FLIGHT)
            bus = MqttBus(options)
            post = MessageClient(bus, _SOURCE)
            publisher = ReliablePublisher(bus, in_flight=IN_FLIGHT)
            bare = aiomqtt.Client(
                "127.0.0.1", port, protocol=aiomqtt.ProtocolVersion.V5, max_inflight_messages=IN_FLIGHT
            )

            bare.pending_calls_threshold = 10 * IN_FLIGHT  # else it writes a warning for each message

            async def with_aiomqtt(number: int) -> None:
                await bare.publish(topics[number % _VMS], ready[number % _VMS], qos=1)

            async def with_post(number: int) -> None:
                message = facts[number % _VMS]
                await post.send(message, **place(message))

            async def with_publisher() -> Speed:
                watch = Watch()
                for number in range(messages):
                    message = facts[number % _VMS]
                    publisher.put(
                        prepare(
                            message,
                            source=_SOURCE,
                            event_id=new_id(),
                            at=datetime.now(UTC),
                            **place(message),
                        )
                    )
                await publisher.drained(600)
                return watch.speed(messages)

            rates: dict[str, list[Speed]] = {"bare": [], "suite": [], "publisher": []}
            async with bare, running(bus):
                draining = asyncio.create_task(publisher.run())
                await rate(with_aiomqtt, messages // 5)
                await rate(with_post, messages // 5)
                for number in range(rounds):
                    ways = [
                        ("bare", lambda: rate(with_aiomqtt, messages)),
                        ("suite", lambda: rate(with_post, messages)),
                        ("publisher", with_publisher),
                    ]
                    for name, way in ways if number % 2 else reversed(ways):
                        rates[name].append(await way())
                draining.cancel()
    for name, values in rates.items():
        print(f"{name:>9}: {statistics.median(each.wall for each in values):8,.0f} msg/s", end="")
        for what in ("wall", "cpu"):
            of_bare = [
                getattr(value, what) / getattr(base, what)
                for value, base in zip(values, rates["bare"], strict=True)
            ]
            low, high = min(of_bare), max(of_bare)
            print(
                f"   by {what} time {statistics.median(of_bare):.2f} of bare ({low:.2f} to {high:.2f})",
                end="",
            )
        print()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=MESSAGES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    try:
        asyncio.run(measure(options.messages, options.rounds))
    except BusError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
