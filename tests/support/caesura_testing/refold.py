"""The same fleet with more messages: a fold of its own, for tests that keep the one before."""

from __future__ import annotations

from caesura.contract.envelope import Message
from caesura.contract.topics import CHANNELS
from caesura.fleet.fold import apply
from caesura.fleet.retained_messages import Cleared
from caesura.fleet.state import FleetState


def refold(state: FleetState, *messages: Message | Cleared) -> FleetState:
    """A new state from every word of this one and then these messages."""
    made = FleetState()
    for channel in CHANNELS:
        for word in state.words.of(channel.message):
            apply(made, word, 0.0)
    for message in messages:
        apply(made, message, 0.0)
    return made
