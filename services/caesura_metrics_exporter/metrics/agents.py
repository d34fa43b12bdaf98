"""Which VM agents are on the bus, and which should be but have been silent for long. Pure.

Silence is detected on a query, at a cost that depends on the agents that fell silent, not on all agents.
"""

from __future__ import annotations

import heapq
from typing import Literal, get_args

import msgspec

Presence = Literal["online", "offline", "silent"]
PRESENCES: tuple[Presence, ...] = get_args(Presence)

AGENT_SILENT_S = 300.0
"""s: an agent announces itself every 30 s, and is frozen for 30 s at most."""


class AgentState(msgspec.Struct, frozen=True):
    """One agent, as it was last received; ``received_s`` on the exporter's monotonic clock."""

    online: bool
    received_s: float


class Agents:
    """Maps a VM to its agent."""

    def __init__(self) -> None:
        self._agents: dict[str, AgentState] = {}
        self._silent: set[str] = set()
        self._watched: list[tuple[float, str]] = []
        """A heap with one entry for each agent that is online and not silent: a time at or before its last message."""
        self._entries: set[str] = set()

    def take(self, vm: str, *, online: bool, now_s: float, stored: bool) -> None:
        """An agent announced itself, or its last will reported it offline. ``stored``: a retained message, which is not a sign of life."""
        known = self._agents.get(vm)
        received_s = known.received_s if known is not None and stored else now_s
        self._agents[vm] = AgentState(online, received_s)
        self._silent.discard(vm)
        if online and vm not in self._entries:
            self._entries.add(vm)
            heapq.heappush(self._watched, (received_s, vm))

    def forget(self, vm: str) -> None:
        """The agent no longer exists."""
        self._agents.pop(vm, None)
        self._silent.discard(vm)

    def presence(self, vm: str) -> Presence:
        """As of the last ``settle``; offline if unknown."""
        known = self._agents.get(vm)
        if known is None or not known.online:
            return "offline"
        return "silent" if vm in self._silent else "online"

    def settle(self, now_s: float) -> list[str]:
        """Advance the time; returns the VMs whose agents have just become silent."""
        fell: list[str] = []
        while self._watched and now_s - self._watched[0][0] > AGENT_SILENT_S:
            _, vm = heapq.heappop(self._watched)
            known = self._agents.get(vm)
            if known is None or not known.online:
                self._entries.discard(vm)
            elif now_s - known.received_s > AGENT_SILENT_S:
                self._entries.discard(vm)
                self._silent.add(vm)
                fell.append(vm)
            else:
                heapq.heappush(self._watched, (known.received_s, vm))
        return fell
