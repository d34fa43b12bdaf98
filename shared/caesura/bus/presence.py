"""A service's presence on the bus: its last will at the broker, the heartbeat, and the goodbye."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from caesura.bus.messaging import MessageClient
from caesura.bus.port import BusError, PublishRefused, Will
from caesura.contract.codec import encode
from caesura.contract.envelope import Message
from caesura.contract.topics import channel_of
from caesura.runtime.identity import new_id
from caesura.runtime.logs import get_logger
from caesura.runtime.sampler import Sampler

BEAT_S = 30.0
"""s: between two announcements of an unchanged presence, for a broker that lost what it retained."""
_SAY_EVERY_S = 300.0  # s: between two log lines about a refusal
_ANNOUNCE_S = 10.0  # s: for the broker to take an announcement

_log = get_logger("caesura.presence")


def last_will(offline: Message, source: str, **parameters: str | int) -> Will:
    """What the broker publishes when the service's connection ends without a goodbye.

    Args:
        offline: the presence to publish then.
        source: CloudEvents source of the service.
        parameters: fill the topic template.
    """
    payload = encode(offline, source=source, event_id=new_id(), time=datetime.now(UTC))
    return Will(channel_of(type(offline)).topic(**parameters), payload)


class Presence:
    """Announces one service, retained.

    Args:
        post: where it is announced.
        online: makes the presence as it is now.
        offline: makes the goodbye.
        parameters: fill the topic template.
        beat_s: seconds between two announcements in ``run``.
    """

    def __init__(
        self,
        post: MessageClient,
        online: Callable[[], Message],
        offline: Callable[[], Message],
        *,
        beat_s: float = BEAT_S,
        **parameters: str | int,
    ) -> None:
        self._post = post
        self._online = online
        self._offline = offline
        self._beat_s = beat_s
        self._parameters = parameters
        self._now = asyncio.Event()
        self._sampler = Sampler(_SAY_EVERY_S)

    def changed(self) -> None:
        """Make ``run`` announce it now."""
        self._now.set()

    async def run(self, allowed: Callable[[], bool] = lambda: True) -> None:
        """Announce it when it changed, and from time to time; until cancelled.

        Args:
            allowed: whether there is anything to announce.
        """
        while True:
            try:
                async with asyncio.timeout(self._beat_s):
                    await self._now.wait()
            except TimeoutError:
                pass
            self._now.clear()
            if allowed():
                await self.announce()

    async def announce(self, timeout_s: float = _ANNOUNCE_S) -> bool:
        """Announce that the service is there; after the goodbye nothing is announced any more.

        Returns:
            False if the broker did not accept it. The next beat or connect announces it again; a refusal is logged.
        """
        return await self._announced(timeout_s) == "accepted"

    async def answered(self, timeout_s: float = _ANNOUNCE_S) -> bool:
        """As ``announce``; whether the broker answered at all, be it by a refusal."""
        return await self._announced(timeout_s) != "unanswered"

    async def _announced(self, timeout_s: float) -> Literal["accepted", "refused", "unanswered"]:
        try:
            await self._post.send(self._online(), event_id=None, timeout_s=timeout_s, **self._parameters)
        except PublishRefused as error:
            if self._sampler.due(error.topic) is not None:
                _log.error("presence.refused", topic=error.topic, why=str(error))
            return "refused"
        except BusError as error:
            _log.debug("presence.not_announced", why=str(error))
            return "unanswered"
        return "accepted"

    async def goodbye(self, timeout_s: float) -> None:
        """Announce that the service is gone, as its last message on the topic. Where this fails, the will does it."""
        try:
            await self._post.send_last(self._offline(), timeout_s=timeout_s, **self._parameters)
        except BusError as error:
            _log.debug("presence.no_goodbye", why=str(error))
