"""Brings every event to the rollout that it concerns, advances time, and has the commands sent that the rollouts require."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime

from caesura.runtime.commits import DurableCommits
from caesura.runtime.errors import CaesuraError
from caesura.runtime.logs import get_logger
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Fact, Input, Tick
from caesura_coordinator.leadership import Leadership
from caesura_coordinator.outbox_relay import OutboxRelay
from caesura_coordinator.records import Rollout
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.sender import CommandSender

TICK_S = 0.2
_PENDING_FACTS = 20_000
"""The newest ones, which a coordinator that does not lead yet keeps: a wave of some thousand VMs."""
_log = get_logger("caesura.coordinator")


class RolloutDispatcher:
    """The loop over the active rollouts.

    Args:
        repository: the rollouts.
        sender: sends the commands that they require.
        relay: publishes what their decisions stored.
        leadership: only a leader decides.
        commits: those of the repository's store.
        fleet_now: the view of the fleet that decisions read.
        now: the time of decisions.
        on_tick: called once a tick, with the event loop's seconds.
        decides: whether time may pass for rollouts. A leader that nobody receives, and that receives nobody, would judge others by their silence.
    """

    def __init__(
        self,
        repository: RolloutRepository,
        sender: CommandSender,
        relay: OutboxRelay,
        leadership: Leadership,
        commits: DurableCommits,
        *,
        fleet_now: Callable[[], FleetLookup],
        now: Callable[[], datetime],
        on_tick: Callable[[float], None],
        decides: Callable[[], bool] = lambda: True,
    ) -> None:
        self._repository = repository
        self._sender = sender
        self._relay = relay
        self._leadership = leadership
        self._commits = commits
        self._fleet_now = fleet_now
        self._now = now
        self._on_tick = on_tick
        self._decides = decides
        self._changed = asyncio.Event()
        self._changed_sets: set[str] = set()
        """Sets that changed since their rollouts were last evaluated."""
        self._commands_due = False
        self._pending_facts: deque[Fact] = deque(maxlen=_PENDING_FACTS)
        self._last_errors: dict[str, str] = {}
        """Maps a rollout to why its last decision failed: logged once, not with every message."""

    def wake(self) -> None:
        """Evaluate now instead of with the next tick."""
        self._changed.set()

    def sets_changed(self, sets: Iterable[str]) -> None:
        """Evaluate the rollouts of these sets."""
        self._changed_sets.update(sets)
        self._changed.set()

    def request_commands(self) -> None:
        """The commands that rollouts require may have changed."""
        self._commands_due = True

    def dispatch(self, fact: Fact) -> None:
        """Pass a fact to the rollout that it is about; a fact about no active rollout is not ours, or late."""
        if not self._leadership.claimed:
            self._pending_facts.append(fact)  # a persistent session may deliver before the epoch is claimed
            return
        rollout = self._repository.rollout_of(fact)
        if rollout is not None:
            self._step(rollout, fact)

    def dispatch_pending(self) -> None:
        """Dispatch the facts that arrived before the epoch was claimed."""
        facts = list(self._pending_facts)
        self._pending_facts.clear()
        for fact in facts:
            self.dispatch(fact)

    def on_synced(self) -> None:
        """More commits are on disk."""
        if self._sender.held:
            self._commands_due = True
            self._changed.set()

    async def run(self) -> None:
        """Advance the time of every rollout, and repeat unanswered commands.

        Changes of the fleet that arrived together are evaluated once, and only by the rollouts of the sets concerned.
        """
        last = float("-inf")
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            await self._commits.writable()
            if not self._leadership.is_leader or not self._decides():
                continue
            due = loop.time() - last >= TICK_S
            if due:
                last = loop.time()
                self._relay.republish_if_due()
                self._on_tick(last)
            sets, self._changed_sets = self._changed_sets, set()
            for rollout in self._repository.active if due else self._repository.holding_or_waiting(sets):
                self._step(rollout, Tick())
            if due or self._commands_due:
                self._commands_due = False
                if not await self._sender.send():
                    self._commands_due = True
                    self._changed.set()
                elif self._sender.held:
                    self._commits.start()

    def _step(self, rollout: Rollout, received: Input) -> None:
        if self._leadership.superseded:
            return
        try:
            changed = self._repository.step(
                rollout, received, self._fleet_now(), self._leadership.authority, self._now()
            )
        except CaesuraError as error:  # its state is unchanged: the others must not wait for it
            if self._last_errors.get(rollout.id) != str(error):
                _log.error("rollout.not_moved", why=str(error), rollout=rollout.id)
            self._last_errors[rollout.id] = str(error)
            return
        self._last_errors.pop(rollout.id, None)
        if changed is not rollout:
            self._relay.notify()
        if changed.stage != rollout.stage:
            self._commands_due = True
            self._changed.set()
