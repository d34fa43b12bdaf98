"""The last message on each retained topic, unchanged; and which were removed from the broker. Pure.

The last message on a topic is kept raw: no other writer's message changes it. Whether a message may replace the previous one is
decided here and nowhere else:

- A *document* is only replaced by a newer one. When one is removed, its incarnation is remembered: later documents
  must not be below it, or workloads would see a set's documents go back.
- A *coordinator's presence* is replaced by one of the same or a higher epoch; one that has said goodbye itself is replaced by any that
  is online, while one that is offline through its last will is not.
- An *owner record* is replaced by one of the same or a higher epoch. A record from above the epoch of the known leader
  is replaced by any, as is every record while no leader is known: an operator may make the coordinator forget an epoch that nobody claimed,
  and then it must be possible to start with a lower one. The removal of a presence or an owner record leaves nothing behind.
- For everything else the last message counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal, TypeVar

import msgspec

from caesura.contract.envelope import Message
from caesura.contract.messages import CoordinatorPresence, SetDocument, VmOwner
from caesura.contract.topics import CHANNELS, Channel
from caesura.lifecycle.document import version_of

TOMBSTONES_KEPT = 10_000
"""How many removed topics are remembered, the newest ones; those of documents are never dropped, since their incarnation would be lost."""

Taken = Literal["new", "same", "refused"]
"""The outcome of a message: ``same`` repeats what was known."""
M = TypeVar("M", bound=Message)
Key = tuple[str, ...]
"""The parameters of a topic, in its order."""


class Cleared(msgspec.Struct, frozen=True):
    """A retained topic was cleared: its message no longer counts."""

    kind: type[Message]
    parameters: Mapping[str, str]


class RetainedMessage(msgspec.Struct, frozen=True):
    """The last message on a topic, or that it was removed (a tombstone)."""

    message: Message | None
    at_s: float
    """When it arrived, seconds on the receiver's monotonic clock."""
    incarnation: int = 0
    """For a document: no later one may be below."""


@cache
def retained_channel(kind: type[Message]) -> Channel | None:
    """The table row of a retained message whose topic follows from its content; None for any other."""
    for channel in CHANNELS:
        if channel.message is kind:
            fits = channel.retain and set(channel.parameters) <= set(kind.__struct_fields__)
            return channel if fits else None
    return None


class RetainedMessages:
    """The last message on every retained topic, by message type and the topic's parameters."""

    def __init__(self) -> None:
        self._words: dict[type[Message], dict[Key, RetainedMessage]] = {}
        self._tombstones: dict[tuple[type[Message], Key], None] = {}
        """The tombstones that may be dropped, the oldest first."""

    def put(self, message: Message, now_s: float, leader_epoch: int | None = None) -> Taken:
        """Take a message, unless it is older than what is known, or not a retained one.

        Args:
            leader_epoch: epoch of the coordinator that leads, or led last; None if none is known.
        """
        channel = retained_channel(type(message))
        if channel is None:
            return "refused"
        key = tuple(str(getattr(message, name)) for name in channel.parameters)
        words = self._words.setdefault(type(message), {})
        before = words.get(key)
        if before is not None and not _replaces(message, before, leader_epoch):
            return "refused"
        same = before is not None and before.message == message
        incarnation = message.incarnation if isinstance(message, SetDocument) else 0
        words[key] = RetainedMessage(message, now_s, incarnation)
        self._tombstones.pop((type(message), key), None)
        return "same" if same else "new"

    def clear(self, kind: type[Message], parameters: Mapping[str, str], now_s: float) -> Message | None:
        """Take a removal; returns the message that was on the topic."""
        channel = retained_channel(kind)
        if channel is None or set(parameters) != set(channel.parameters):
            return None
        key = tuple(parameters[name] for name in channel.parameters)
        words = self._words.setdefault(kind, {})
        before = words.get(key)
        words[key] = RetainedMessage(None, now_s, before.incarnation if before is not None else 0)
        if kind is not SetDocument:
            self._tombstones.pop((kind, key), None)
            self._tombstones[kind, key] = None
            if len(self._tombstones) > TOMBSTONES_KEPT:
                oldest_kind, oldest = next(iter(self._tombstones))
                del self._tombstones[oldest_kind, oldest]
                del self._words[oldest_kind][oldest]
        return before.message if before is not None else None

    def get(self, kind: type[M], *key: str) -> M | None:
        """The last message on this topic; None if there is none, or it was removed."""
        word = self._words.get(kind, {}).get(key)
        return word.message if word is not None else None  # type: ignore[return-value]

    def received_s(self, kind: type[Message], *key: str) -> float | None:
        """When the last message on this topic arrived, seconds on the receiver's monotonic clock; None if there is none."""
        word = self._words.get(kind, {}).get(key)
        return word.at_s if word is not None and word.message is not None else None

    def of(self, kind: type[M]) -> Iterator[M]:
        """Every message of a type that is on its topic."""
        for word in self._words.get(kind, {}).values():
            if word.message is not None:
                yield word.message  # type: ignore[misc]

    def named(self, kind: type[M]) -> Mapping[str, M]:
        """The same by the single parameter of their topics, such as the host: a view, not a copy."""
        return _Named(self._words.setdefault(kind, {}))


class _Named(Mapping[str, M]):
    """Messages by the single parameter of their topics."""

    def __init__(self, words: dict[Key, RetainedMessage]) -> None:
        self._words = words

    def __getitem__(self, name: str) -> M:
        message = self._words[name,].message
        if message is None:
            raise KeyError(name)
        return message  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return (name for (name,), word in self._words.items() if word.message is not None)

    def __len__(self) -> int:
        return sum(word.message is not None for word in self._words.values())


def _replaces(message: Message, before: RetainedMessage, leader_epoch: int | None) -> bool:
    known = before.message
    match message:
        case SetDocument():
            if not isinstance(known, SetDocument):
                return message.incarnation >= before.incarnation
            return version_of(message) > version_of(known) or message == known
        case VmOwner() if isinstance(known, VmOwner):
            forgotten = leader_epoch is None or known.epoch > leader_epoch
            return message.epoch >= known.epoch or forgotten
        case CoordinatorPresence() if isinstance(known, CoordinatorPresence):
            return message.epoch >= known.epoch or (message.online and not known.online)
        case _:
            return True
