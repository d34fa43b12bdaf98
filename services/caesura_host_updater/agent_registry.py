"""What the agents of this host's VMs said of themselves last."""

from __future__ import annotations

import msgspec

from caesura.contract.messages import AgentPresence


class AgentRegistry:
    """The newest presence of each VM's agent."""

    def __init__(self) -> None:
        self._agents: dict[str, AgentPresence] = {}

    def get(self, vm: str) -> AgentPresence | None:
        """The agent of this VM, if one was received."""
        return self._agents.get(vm)

    @property
    def with_canary(self) -> frozenset[str]:
        """The VMs whose agent holds a canary."""
        return frozenset(vm for vm, agent in self._agents.items() if agent.canary_bytes)

    def record(self, message: AgentPresence) -> bool:
        """A presence was received; returns whether it changes if the agent holds a canary."""
        known = self._agents.get(message.vm)
        if known is not None and known.boot_id == message.boot_id:
            # Its last will, written when it connected, knows nothing of the pages that were written since.
            writes = max(known.canary_writes, message.canary_writes)
            message = msgspec.structs.replace(message, canary_writes=writes)
        self._agents[message.vm] = message
        return bool(message.canary_bytes) != bool(known and known.canary_bytes)
