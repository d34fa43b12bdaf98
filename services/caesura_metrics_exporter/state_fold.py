"""The state on the bus, folded once for everything that the exporter shows: ``caesura.fleet``, and complete rollouts by set. Pure.

Facts (*frozen*, *resumed* and so on) are not state: ``service`` passes each to the counters, the current state and the live page.

The metrics and the live page are views of it: they keep what was counted or drawn, and when something was received, never a second copy
of the messages. Complete rollouts are not part of the fold: on the bus they come in parts, each reader joins and bounds them by itself, and
the coordinator, which creates them, has them in its store.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.parts import WholeRollout
from caesura.contract.topics import match_topic
from caesura.fleet.fold import NOTHING, Changes, apply
from caesura.fleet.retained_messages import Cleared
from caesura.fleet.state import FleetState
from caesura_metrics_exporter.rollout_index import RolloutIndex

_FOLDED = (
    m.HostInventory,
    m.HostPresence,
    m.VmOwner,
    m.SetDocument,
    m.PublisherPresence,
    m.CoordinatorPresence,
    m.CoordinatorStatus,
)
"""Without the agents' presences: here the state of an agent ends with its VM, and ``agents`` keeps when it was received."""


class FoldResult(msgspec.Struct, frozen=True):
    """What a message changed."""

    changes: Changes = NOTHING
    rollout: WholeRollout | None = None
    """For a message about a rollout: its previous state."""


class StateFold:
    """See the module. Each message is folded once, then its views follow."""

    def __init__(self) -> None:
        self.state = FleetState()
        self.rollouts = RolloutIndex()

    def take(self, message: Message, now_s: float) -> FoldResult:
        """Fold one message, received at ``now_s`` on the exporter's monotonic clock."""
        if isinstance(message, WholeRollout):
            return FoldResult(rollout=self.rollouts.take(message))
        if isinstance(message, _FOLDED):
            return FoldResult(apply(self.state, message, now_s)[1])
        return FoldResult()

    def clear(self, topic: str, now_s: float) -> FoldResult:
        """A retained message was removed. A topic outside the contract changes nothing."""
        place = match_topic(topic)
        return self.take_back(place[0].message, place[1], now_s) if place is not None else FoldResult()

    def take_back(self, kind: type[Message], named: Mapping[str, str], now_s: float) -> FoldResult:
        """The same by message type and the parameters of its topic."""
        if kind is m.RolloutState:
            return FoldResult(rollout=self.rollouts.forget(named["rollout"]))
        if kind in _FOLDED:
            return FoldResult(apply(self.state, Cleared(kind, named), now_s)[1])
        return FoldResult()
