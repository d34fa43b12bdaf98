"""Run a bus in a test, and wait for what it receives instead of sleeping."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from caesura.bus.port import Bus, Connected, Delivery, Handler
from caesura.conformance.patience import patient

PATIENCE_S = patient(15.0)  # s: a loaded CI machine; a test that passes never waits this long


class Collector:
    """A handler that keeps what it gets. Give ``receive`` to ``Bus.run``."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self._changed = asyncio.Event()

    @property
    def payloads(self) -> list[bytes]:
        """The payloads so far, in order."""
        return [each.payload for each in self.deliveries]

    async def receive(self, delivery: Delivery) -> None:
        """Keep the delivery and wake who waits."""
        self.deliveries.append(delivery)
        self._changed.set()

    async def until(self, condition: Callable[[list[Delivery]], bool], timeout_s: float = PATIENCE_S) -> None:
        """Wait until ``condition`` holds for the deliveries so far.

        Raises:
            AssertionError: not within ``timeout_s`` seconds; names what there was.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not condition(self.deliveries):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            last = self.deliveries[-5:]
            raise AssertionError(
                f"waited in vain; {len(self.deliveries)} deliveries, the last: {last}"
            ) from None

    async def until_payload(self, payload: bytes) -> None:
        """Wait until a message with this payload has come."""
        await self.until(lambda deliveries: any(each.payload == payload for each in deliveries))


@contextlib.asynccontextmanager
async def running(
    bus: Bus,
    receive: Handler | None = None,
    on_connected: Connected | None = None,
    *,
    timeout_s: float = PATIENCE_S,
) -> AsyncIterator[asyncio.Task[None]]:
    """Run ``bus`` connected for the time of the block, and close it with a goodbye; yields the task of ``run``."""
    task = asyncio.create_task(bus.run(receive or Collector().receive, on_connected))
    try:
        if not await bus.wait_connected(timeout_s):
            raise AssertionError(f"not connected: {bus.stats.last_error}")
        yield task
    finally:
        await bus.close()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def publishing(bus: Bus, topic: str, payload: bytes) -> AsyncIterator[None]:
    """Publish this again and again for the time of the block: for a subscriber of whom nothing says when it is one."""

    async def publish() -> None:
        while True:
            await bus.publish(topic, payload)
            await asyncio.sleep(0.05)

    task = asyncio.create_task(publish())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def eventually(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Wait for something that announces itself to nobody, such as a counter.

    Raises:
        TimeoutError: not within ``timeout_s`` seconds.
    """
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)
