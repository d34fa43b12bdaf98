"""A coordinator that runs in the process of its test, on a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.rates import Rates
from caesura_coordinator.service import Coordinator, subscriptions
from caesura_coordinator.store import CoordinatorStore
from caesura_testing.collector import PATIENCE_S, eventually


@asynccontextmanager
async def leading_coordinator(
    options: BrokerOptions, folder: Path, *, rates: Rates | None = None, within_s: float = PATIENCE_S
) -> AsyncIterator[Coordinator]:
    """One that leads for the block, and is killed at its end.

    Args:
        options: its connection.
        folder: of its store.
        rates: how much it takes from each writer; None: everything.
        within_s: how long it may take until it leads.

    Raises:
        AssertionError: it does not lead in time, or it ended before the block did.
    """
    store = CoordinatorStore(str(folder / "coordinator.sqlite"))
    bus = MqttBus(options, filters=subscriptions(), rates=rates)
    made = Coordinator(bus, store, instance="coordinator", settle_s=0.1)
    bus.peers = made.known
    tasks = [asyncio.ensure_future(start()) for start in made.tasks().values()]
    try:
        await eventually(lambda: made.is_leader, within_s)
        yield made
        if any(task.done() for task in tasks):
            raise AssertionError("the coordinator ended")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        store.database.close()
