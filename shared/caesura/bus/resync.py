"""Retained state without the broker's retained messages: who needs it asks, and its writers publish it again.

For brokers whose nodes keep retained messages each for itself (RabbitMQ), where a reader gets none, or one that is long out of date. What
such a broker retained is ignored (``BrokerOptions.ignore_retained``). After every connect a reader asks the coordinator, which
limits how often anybody is answered, and asks all writers with one message. A request is repeated until that message is seen.
Where the broker's retained messages are trusted nothing of this happens.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from caesura.bus.backoff import Backoff
from caesura.bus.messaging import MessageClient
from caesura.bus.port import BusError
from caesura.contract.codec import Received
from caesura.contract.envelope import Message
from caesura.contract.messages import FleetResyncRequested
from caesura.contract.topics import channel_of
from caesura.runtime.logs import get_logger

_REPEAT_MIN_S, _REPEAT_MAX_S = 2.0, 60.0
"""s: between two requests that nobody has answered. A coordinator that is being restarted answers within seconds."""

_SEND_S = 10.0  # s: for the broker to take a request

_log = get_logger("caesura.resync")


class Resync:
    """One service's part: asks for what it reads, and publishes again what it writes.

    Args:
        post: the service's messages.
        enabled: whether the broker's retained messages are ignored; otherwise nothing is subscribed to, sent or answered.
        request: makes the request for what the service reads; None: it needs nothing.
        publish: publishes its retained state; None: it has none.
        uniform: random source of the delays, as ``random.uniform``.
        parameters: fill the template of the request's topic.
    """

    def __init__(
        self,
        post: MessageClient,
        *,
        enabled: bool,
        request: Callable[[], Message] | None = None,
        publish: Callable[[], Awaitable[None]] | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
        **parameters: str | int,
    ) -> None:
        self.enabled = enabled
        self.answered = asyncio.Event()
        """Whether writers were asked since the last connect."""
        self.spread_s = 0.0
        """Within how many seconds of ``answered`` the writers publish."""
        self._post = post
        self._request = request
        self._publish = publish
        self._uniform = uniform
        self._parameters = parameters
        self._needed = asyncio.Event()
        self._asked = asyncio.Event()
        if enabled:
            post.subscribe(FleetResyncRequested, self._on_requested)
            post.bus.subscribe_also([channel_of(FleetResyncRequested).filter()])

    def connected(self) -> None:
        """Ask, now that there is a new connection: what was published in the meantime is unknown."""
        if self.enabled:
            self.answered.clear()
            self._needed.set()

    async def _on_requested(self, asked: FleetResyncRequested, _: Received) -> None:
        self.observed(asked)

    def observed(self, asked: FleetResyncRequested) -> None:
        """The coordinator asks all writers."""
        self.spread_s = asked.spread_s
        self._needed.clear()
        self.answered.set()
        self._asked.set()

    async def run(self) -> None:
        """Ask and publish; never ends."""
        async with asyncio.TaskGroup() as group:
            if self._request is not None:
                group.create_task(self._keep_asking(self._request), name="resync-request")
            if self._publish is not None:
                group.create_task(self._keep_publishing(self._publish), name="resync-publish")
            await asyncio.Event().wait()

    async def _keep_asking(self, request: Callable[[], Message]) -> None:
        backoff = Backoff(_REPEAT_MIN_S, _REPEAT_MAX_S, self._uniform)
        while True:
            await self._needed.wait()
            try:
                await self._post.send(request(), event_id=None, timeout_s=_SEND_S, **self._parameters)
            except BusError as error:
                _log.debug("resync.not_requested", why=str(error))
            try:
                async with asyncio.timeout(backoff.next_s()):
                    await self.answered.wait()
            except TimeoutError:
                continue
            backoff.reset()

    async def _keep_publishing(self, publish: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._asked.wait()
            # What is asked in the meantime is answered by the same publication.
            await asyncio.sleep(self._uniform(0.0, self.spread_s))
            self._asked.clear()
            await publish()
