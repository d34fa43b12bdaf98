"""What was said last on each retained topic, as it was said; and what was removed from the broker. Pure.

The last word on a topic is kept raw: nothing that another writer says changes it. Whether a word may replace the one before it is
decided here and nowhere else:

- A *document* only gives way to a newer one. One that was removed leaves its incarnation behind: what comes later
  must not be below it, or workloads would see a set's documents go back.
- A *coordinator's presence* gives way to one of the same or a higher epoch; one that has said goodbye itself gives way to any that
  is there, and one of which the broker said that it is gone does not.
- A *record of an owner* gives way to one of the same or a higher epoch. One from above the epoch of the coordinator that is known to lead
  gives way to any, as does each where none is known: an operator may have the coordinator forget an epoch that nobody claimed, and
  then a lower one must be able to begin. The removal of either leaves nothing behind.
- Of everything else the last word counts, whatever it says.
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
"""Removed topics that are remembered, the newest; documents' are never dropped, since their incarnation would be."""

Taken = Literal["new", "same", "refused"]
"""What became of a message: ``same`` says again what was known."""
M = TypeVar("M", bound=Message)
Key = tuple[str, ...]
"""The parameters of a topic, in its order."""


class Cleared(msgspec.Struct, frozen=True):
    """A retained topic was cleared: what stood there counts no more."""

    kind: type[Message]
    parameters: Mapping[str, str]


class Word(msgspec.Struct, frozen=True):
    """The last message on a topic, or that it was removed (a tombstone)."""

    message: Message | None
    at_s: float
    """When it arrived, seconds on the receiver's monotonic clock."""
    incarnation: int = 0
    """Of a document: no later one may be below."""


@cache
def retained_channel(kind: type[Message]) -> Channel | None:
    """The row of a retained message whose topic follows from what it says; None for any other."""
    for channel in CHANNELS:
        if channel.message is kind:
            fits = channel.retain and set(channel.parameters) <= set(kind.__struct_fields__)
            return channel if fits else None
    return None


class Words:
    """The last word on every retained topic, by message type and the topic's parameters."""

    def __init__(self) -> None:
        self._words: dict[type[Message], dict[Key, Word]] = {}
        self._tombstones: dict[tuple[type[Message], Key], None] = {}
        """Those that may be dropped, the oldest first."""

    def put(self, message: Message, now_s: float, leader_epoch: int | None = None) -> Taken:
        """Take a message, unless it is older than what is known, or no retained one.

        Args:
            leader_epoch: of the coordinator that leads, or led last; None if none is known.
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
        words[key] = Word(message, now_s, incarnation)
        self._tombstones.pop((type(message), key), None)
        return "same" if same else "new"

    def clear(self, kind: type[Message], parameters: Mapping[str, str], now_s: float) -> Message | None:
        """Take a removal; what stood on the topic."""
        channel = retained_channel(kind)
        if channel is None or set(parameters) != set(channel.parameters):
            return None
        key = tuple(parameters[name] for name in channel.parameters)
        words = self._words.setdefault(kind, {})
        before = words.get(key)
        words[key] = Word(None, now_s, before.incarnation if before is not None else 0)
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

    def of(self, kind: type[M]) -> Iterator[M]:
        """Every message of a type that stands on its topic."""
        for word in self._words.get(kind, {}).values():
            if word.message is not None:
                yield word.message  # type: ignore[misc]

    def named(self, kind: type[M]) -> Mapping[str, M]:
        """The same by the one parameter of their topics, such as the host: a view, no copy."""
        return _Named(self._words.setdefault(kind, {}))


class _Named(Mapping[str, M]):
    """Messages by the one parameter of their topics."""

    def __init__(self, words: dict[Key, Word]) -> None:
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


def _replaces(message: Message, before: Word, leader_epoch: int | None) -> bool:
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
