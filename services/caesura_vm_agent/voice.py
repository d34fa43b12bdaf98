"""What an agent says on the bus: each message with an id that repetitions share, patient with a lost broker."""

from __future__ import annotations

import asyncio
from typing import Literal
from uuid import NAMESPACE_URL, uuid5

import structlog

from caesura.bus.port import BusError
from caesura.bus.post import Post
from caesura.contract.envelope import Message
from caesura.contract.messages import (
    AgentClockSynced,
    AgentPresence,
    ClockSyncRequested,
    HookFinished,
    VmReady,
)
from caesura.runtime.identity import new_id
from caesura_vm_agent.canary_keeper import CanaryKeeper

_PATIENCE_S = 60.0  # s: how long a result waits for a lost broker before it is given up
_RESEND_PAUSE_S = 0.2  # s: a broker that refuses at once must not be asked in a tight loop

_log = structlog.get_logger("caesura.agent")


class Voice:
    """One agent's messages.

    Args:
        boot_id: lives in this process's memory only; ids of repeated messages hang on it.
        clock: what kind of guest clock the presence shows.
        canary: what the presence says of it.
    """

    def __init__(
        self,
        post: Post,
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

    async def online(self) -> None:
        """Say that we are here (retained). Raises BusError."""
        await self._post.send(self._presence(online=True), vm=self._vm)

    async def offline(self, timeout_s: float) -> None:
        """Say goodbye; the last will says it if this cannot."""
        try:
            await self._post.send_last(self._presence(online=False), vm=self._vm, timeout_s=timeout_s)
        except BusError as error:
            _log.debug("agent.offline_unsaid", why=str(error))

    async def ask(self, request: ClockSyncRequested, timeout_s: float) -> None:
        """Publish one half of a clock-sync exchange, once. Raises BusError."""
        await self._post.send(request, vm=self._vm, timeout_s=timeout_s)

    async def ready(self, answer: VmReady) -> None:
        """Answer a scheduled event, the first time or again."""
        await self._patiently(answer, self._stable_id("ready", answer.event_id))

    async def synced(self, result: AgentClockSynced) -> None:
        """Tell how a clock-sync went; the one after a resume may be asked for again, and comes a second time with the canary."""
        if result.trigger != "resume":
            await self._patiently(result, new_id())
            return
        what = "synced" if result.canary is None else "canary"
        await self._patiently(result, self._stable_id(what, result.operation))

    async def hook_finished(self, finished: HookFinished) -> None:
        """Tell how a hook ended."""
        await self._patiently(finished, new_id())

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

    async def _patiently(self, message: Message, message_id: str) -> None:
        """Publish; a result that the bus did not take within a minute is given up, and that is said."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while True:
                    try:
                        await self._post.send(message, event_id=message_id, vm=self._vm)
                    except BusError as error:
                        _log.debug("agent.publish_retry", message=type(message).TYPE, why=str(error))
                        await asyncio.sleep(_RESEND_PAUSE_S)
                    else:
                        return
        except TimeoutError:
            _log.warning("agent.publish_given_up", message=type(message).TYPE, seconds=_PATIENCE_S)
