"""What an agent publishes on the bus: each message with an id that repetitions share, patient with a lost broker.

Nothing waits for a message to be published: a hook or a clock-sync continues whatever the broker does. A result that the bus
did not accept within a minute is given up, and that is logged.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from typing import Literal
from uuid import NAMESPACE_URL, uuid5

from caesura.bus.messaging import MessageClient
from caesura.bus.presence import Presence
from caesura.contract.envelope import Message
from caesura.contract.messages import (
    AgentClockSynced,
    AgentPresence,
    ClockSyncRequested,
    HookFinished,
    VmReady,
)
from caesura.delivery.message import prepare
from caesura.delivery.policy import DeliveryPolicy
from caesura.delivery.publisher import ReliablePublisher
from caesura.runtime.identity import new_id
from caesura_vm_agent.canary_keeper import CanaryKeeper

_RESULT = DeliveryPolicy(give_up_s=60.0)
"""A result is of no use to anybody much later."""


class AgentPublisher:
    """One agent's messages.

    Args:
        boot_id: lives in this process's memory only; ids of repeated messages depend on it.
        clock: what kind of guest clock the presence shows.
        canary: what the presence reports of it.
    """

    def __init__(
        self,
        post: MessageClient,
        *,
        vm: str,
        boot_id: str,
        clock: Literal["simulated", "system"],
        canary: CanaryKeeper,
    ) -> None:
        self._post = post
        self._vm = vm
        self._boot_id = boot_id
        self._clock: Literal["simulated", "system"] = clock
        self._canary = canary
        self.publisher = ReliablePublisher(post.bus)
        self.presence = Presence(
            post, partial(self._presence, online=True), partial(self._presence, online=False), vm=vm
        )

    async def ask(self, request: ClockSyncRequested, timeout_s: float) -> None:
        """Publish one half of a clock-sync exchange, once. Raises BusError."""
        await self._post.send(request, vm=self._vm, timeout_s=timeout_s)

    def ready(self, answer: VmReady) -> None:
        """Answer a scheduled event, the first time or again."""
        self._put(answer, self._stable_id("ready", answer.event_id))

    def synced(self, result: AgentClockSynced) -> None:
        """Publish how a clock-sync went; the one after a resume may be requested again, and is sent a second time with the canary."""
        if result.trigger != "resume":
            self._put(result, new_id())
            return
        what = "synced" if result.canary is None else "canary"
        self._put(result, self._stable_id(what, result.operation))

    def hook_finished(self, finished: HookFinished) -> None:
        """Publish how a hook ended."""
        self._put(finished, new_id())

    def _presence(self, *, online: bool) -> AgentPresence:
        return AgentPresence(
            vm=self._vm,
            online=online,
            boot_id=self._boot_id,
            clock=self._clock,
            canary_bytes=self._canary.held_bytes,
            canary_writes=self._canary.writes,
        )

    def _stable_id(self, what: str, subject: str) -> str:
        return str(uuid5(NAMESPACE_URL, f"{self._boot_id}/{what}/{subject}"))

    def _put(self, message: Message, message_id: str) -> None:
        now = datetime.now(UTC)
        prepared = prepare(message, source=self._post.source, event_id=message_id, at=now, vm=self._vm)
        self.publisher.put(prepared, policy=_RESULT)
