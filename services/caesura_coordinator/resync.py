"""The coordinator's part of a resync: takes the requests of readers, and asks all writers as often as the limits allow.

See ``caesura.bus.resync``. A coordinator that has just connected asks for itself, before it leads: it needs the hosts' inventories.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from caesura.bus.messaging import MessageClient
from caesura.bus.port import BusError
from caesura.bus.rates import writer_of
from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import Message
from caesura.contract.topics import channel_of
from caesura.runtime.logs import get_logger
from caesura.runtime.sampler import Sampler
from caesura_coordinator.leadership import Leadership
from caesura_coordinator.resync_limits import FLEET, RequesterLimits, TokenBucket, spread_s

_REQUESTS = (
    m.AgentResyncRequested,
    m.PublisherResyncRequested,
    m.ClientResyncRequested,
    m.ExporterResyncRequested,
)
_RETRY_S = 1.0  # s: after a broker that did not accept the request
SETTLE_S = 2.0
"""s: for the hosts to answer, on top of the configured time, before the first epoch is claimed."""

_log = get_logger("caesura.coordinator")


class FleetResync:
    """Asks the writers.

    Args:
        post: where requests arrive and are sent.
        leadership: only a leader answers others.
        enabled: whether the broker's retained messages are ignored.
        vms: how many VMs the fleet has.
        publish: publishes the coordinator's own retained state.
        now: a monotonic clock, seconds.
    """

    def __init__(
        self,
        post: MessageClient,
        leadership: Leadership,
        *,
        enabled: bool,
        vms: Callable[[], int],
        publish: Callable[[], Awaitable[None]],
        now: Callable[[], float],
    ) -> None:
        self.enabled = enabled
        self._post = post
        self._leadership = leadership
        self._vms = vms
        self._publish = publish
        self._now = now
        self._requesters = RequesterLimits()
        self._fleet = TokenBucket(FLEET, now())
        self._due = asyncio.Event()
        self._asked = asyncio.Event()
        self._sampled = Sampler()
        if enabled:
            kinds: tuple[type[Message], ...] = (*_REQUESTS, m.FleetResyncRequested)
            for kind in _REQUESTS:
                post.subscribe(kind, self._on_request)
            post.subscribe(m.FleetResyncRequested, self._on_fleet)
            post.bus.subscribe_also([channel_of(kind).filter() for kind in kinds])

    def connected(self) -> None:
        """Ask for what this coordinator reads."""
        if self.enabled:
            self._due.set()

    async def _on_request(self, _: Message, received: Received) -> None:
        party, name = writer_of(received.channel.topic(**received.parameters))
        if not self._leadership.is_leader:
            return  # it is repeated until one leads
        if self._requesters.admits(party, name, self._now()):
            self._due.set()
            return
        left_out = self._sampled.due(f"{party}/{name}")
        if left_out is not None:
            _log.warning(
                "resync.refused",
                requester=f"{party}/{name}",
                left_out=left_out,
                advice="it asks for the whole state more often than any Caesura service: check it, or give it another password",
            )

    async def _on_fleet(self, _: m.FleetResyncRequested, __: Received) -> None:
        """All writers were asked, by this coordinator or by another one."""
        self._asked.set()

    async def run(self) -> None:
        """Ask when somebody needs it, and publish when asked; never ends."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_asking(), name="resync-request")
            group.create_task(self._keep_publishing(), name="resync-publish")

    async def _keep_asking(self) -> None:
        while True:
            await self._due.wait()
            # Requests that come in the meantime are answered by the same publication.
            while not self._fleet.take(self._now()):  # noqa: ASYNC110 - time passes, nothing else
                await asyncio.sleep(self._fleet.wait_s(self._now()))
            self._due.clear()
            asked = m.FleetResyncRequested(
                coordinator=self._leadership.authority.coordinator, spread_s=spread_s(self._vms())
            )
            try:
                await self._post.send(asked)
            except BusError as error:
                _log.info("resync.not_asked", why=str(error))
                self._due.set()
                await asyncio.sleep(_RETRY_S)

    async def _keep_publishing(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self._publish()
