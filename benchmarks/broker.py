"""What Mosquitto writes to its disk, and what it loses when it is killed, by its autosave settings.

    python benchmarks/broker.py                      # the shipped settings and their alternatives, some 4 minutes
    python benchmarks/broker.py --only 1:false       # one of them: autosave_interval:autosave_on_changes

Bytes are the kernel's count of the process's writes (``wchar``, proc(5)). Loss: retained messages are published one after
the other, the broker is killed with SIGKILL, started again, and asked for the newest that it still has; the time between
that one's acknowledgement and the kill is what was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path

from caesura.bus.local_broker import LocalBroker, free_port, mosquitto_config
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import BusError
from caesura_testing.collector import Collector, running

SETTINGS = ("1:true", "100:true", "1:false")
CHANGES = 10_000
VMS = 1_000
PAYLOAD_BYTES = 500
IDLE_S = 10.0
KILLS = 10
_AT_ONCE = 100


def config_with(setting: str, port: int, folder: Path) -> str:
    """The suite's configuration with other autosave settings."""
    interval, _, on_changes = setting.partition(":")
    lines = [
        line
        for line in mosquitto_config(port=port, data_dir=folder).splitlines()
        if not line.startswith("autosave_")
    ]
    mine = [f"autosave_interval {interval}", f"autosave_on_changes {on_changes}"]
    at = lines.index("persistence true") + 1
    return "\n".join([*lines[:at], *mine, *lines[at:], ""])


def written_bytes(pid: int | None) -> int:
    """What a process has written so far."""
    lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


async def disk(setting: str, folder: Path) -> str:
    """Bytes for so many changes of what a fleet retains, and for the same time without any."""
    port = free_port()
    config = config_with(setting, port, folder)
    async with LocalBroker(kind="mosquitto", port=port, data_dir=folder, config=config) as broker:
        bus = MqttBus(BrokerOptions(url=broker.url))

        async def publish(first: int, count: int) -> None:
            topics = (f"caesura/v1/vm/v{number % VMS}/presence" for number in range(first, first + count))
            await asyncio.gather(
                *(bus.publish(each, bytes(PAYLOAD_BYTES), retain=True, timeout_s=120) for each in topics)
            )

        async with running(bus):
            await publish(0, VMS)
            before, began_s = written_bytes(broker.pid), time.monotonic()
            for first in range(0, CHANGES, _AT_ONCE):
                await publish(first, _AT_ONCE)
            took_s = time.monotonic() - began_s
            busy = written_bytes(broker.pid) - before
            await asyncio.sleep(IDLE_S)
            idle = written_bytes(broker.pid) - before - busy
    return (
        f"{CHANGES:,} changes: {busy / 1e6:,.1f} MB in {took_s:.1f} s; "
        f"idle: {idle / 1e6:,.2f} MB in {IDLE_S:g} s"
    )


async def loss(setting: str, folder: Path, uniform: random.Random) -> float:
    """Seconds of acknowledged retained messages that one kill lost."""
    port = free_port()
    config = config_with(setting, port, folder)
    acknowledged: list[float] = []
    async with LocalBroker(kind="mosquitto", port=port, data_dir=folder, config=config) as broker:
        bus = MqttBus(BrokerOptions(url=broker.url))
        async with running(bus):
            end_s = time.monotonic() + uniform.uniform(3.0, 6.0)
            while time.monotonic() < end_s:
                await bus.publish("a", b"%d" % len(acknowledged), retain=True)
                acknowledged.append(time.monotonic())
                await asyncio.sleep(0.01)
            await broker.kill()
            killed_s = time.monotonic()
        await broker.start()
        got = Collector()
        async with running(MqttBus(BrokerOptions(url=broker.url), filters=["a", "b"]), got.receive):
            sender = MqttBus(BrokerOptions(url=broker.url))
            async with running(sender):
                await sender.publish("b", b"last", retain=True)
                await got.until_payload(b"last")
    kept = [int(each.payload) for each in got.deliveries if each.topic == "a"]
    return killed_s - acknowledged[max(kept)] if kept else killed_s - acknowledged[0]


async def measure(settings: list[str], kills: int) -> None:
    """Print a line for each setting."""
    uniform = random.Random(7)  # noqa: S311 - when to kill is no secret
    for setting in settings:
        with tempfile.TemporaryDirectory(prefix="caesura-bench-") as folder:
            written = await disk(setting, Path(folder))
        lost = []
        for _ in range(kills):
            with tempfile.TemporaryDirectory(prefix="caesura-bench-") as folder:
                lost.append(await loss(setting, Path(folder), uniform))
        worst = f"; lost in {kills} kills: at most {max(lost):.2f} s" if lost else ""
        print(f"autosave_interval:autosave_on_changes {setting}: {written}{worst}", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="INTERVAL:ON_CHANGES")
    parser.add_argument("--kills", type=int, default=KILLS)
    options = parser.parse_args()
    try:
        asyncio.run(measure(options.only or list(SETTINGS), options.kills))
    except BusError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
