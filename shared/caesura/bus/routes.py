"""Which filters cover a topic, and which topics a filter covers, without looking at all of them. Pure.

For the bus in memory: with a client for every host of a fleet, comparing each message with each filter costs the square of the
fleet. A tree with one topic level per step costs only as much as what matches. ``filters.matches`` defines what covers what; a test compares
these trees with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T", bound=Hashable)


class _FilterNode(msgspec.Struct, Generic[T]):
    below: dict[str, _FilterNode[T]] = {}
    values: dict[T, None] = {}


class FilterTree(Generic[T]):
    """Filters with the values stored under them."""

    def __init__(self) -> None:
        self._root: _FilterNode[T] = _FilterNode()

    def add(self, topic_filter: str, value: T) -> None:
        """Store ``value`` under this filter, to be found for the topics that it covers."""
        node = self._root
        for level in topic_filter.split("/"):
            node = node.below.setdefault(level, _FilterNode())
        node.values[value] = None

    def discard(self, topic_filter: str, value: T) -> None:
        """Remove it from this filter."""
        path = [self._root]
        levels = topic_filter.split("/")
        for level in levels:
            below = path[-1].below.get(level)
            if below is None:
                return
            path.append(below)
        path[-1].values.pop(value, None)
        for level, node in zip(reversed(levels), reversed(path[:-1]), strict=True):
            if node.below[level].below or node.below[level].values:
                return
            del node.below[level]

    def covering(self, topic: str) -> set[T]:
        """The values of every filter that covers this topic, each once."""
        levels = topic.split("/")
        found: set[T] = set()
        reached = [self._root]
        for depth, level in enumerate(levels):
            # A wildcard does not match a first level that begins with $ (MQTT 5 section 4.7.2).
            wild = depth > 0 or not topic.startswith("$")
            further: list[_FilterNode[T]] = []
            for node in reached:
                for wanted in (level, "+", "#") if wild else (level,):
                    below = node.below.get(wanted)
                    if below is None:
                        continue
                    if wanted == "#":
                        found.update(below.values)
                    else:
                        further.append(below)
            reached = further
        for node in reached:
            found.update(node.values)
            rest = node.below.get("#")  # it also matches no level at all
            if rest is not None:
                found.update(rest.values)
        return found


class _TopicNode(msgspec.Struct):
    below: dict[str, _TopicNode] = {}
    topic: str | None = None


class RetainedTopics(MutableMapping[str, bytes]):
    """Topics with what is retained on them, in the order in which they were first stored."""

    def __init__(self) -> None:
        self._payloads: dict[str, bytes] = {}
        self._root = _TopicNode()

    def __getitem__(self, topic: str) -> bytes:
        return self._payloads[topic]

    def __setitem__(self, topic: str, payload: bytes) -> None:
        if topic not in self._payloads:
            node = self._root
            for level in topic.split("/"):
                node = node.below.setdefault(level, _TopicNode())
            node.topic = topic
        self._payloads[topic] = payload

    def __delitem__(self, topic: str) -> None:
        del self._payloads[topic]
        levels = topic.split("/")
        path = [self._root]
        for level in levels:
            path.append(path[-1].below[level])
        path[-1].topic = None
        for level, node in zip(reversed(levels), reversed(path[:-1]), strict=True):
            if node.below[level].below or node.below[level].topic is not None:
                return
            del node.below[level]

    def __iter__(self) -> Iterator[str]:
        return iter(self._payloads)

    def __len__(self) -> int:
        return len(self._payloads)

    def __repr__(self) -> str:
        return repr(self._payloads)

    def covered_by(self, topic_filter: str) -> Iterator[str]:
        """The topics that this filter covers."""
        reached = [self._root]
        for depth, wanted in enumerate(topic_filter.split("/")):
            if wanted == "#":
                for node in reached:
                    yield from _topics(node, hidden=depth == 0)
                return
            further: list[_TopicNode] = []
            for node in reached:
                if wanted == "+":
                    further += [
                        below for level, below in node.below.items() if depth > 0 or not level.startswith("$")
                    ]
                elif wanted in node.below:
                    further.append(node.below[wanted])
            reached = further
        for node in reached:
            if node.topic is not None:
                yield node.topic


def _topics(node: _TopicNode, *, hidden: bool) -> Iterator[str]:
    """Every topic from here on; ``hidden``: skip what is below a first level that begins with $."""
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each.topic is not None:
            yield each.topic
        below = each.below.items()
        waiting += [node for level, node in below if not (hidden and level.startswith("$"))]
        hidden = False
