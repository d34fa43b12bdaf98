"""MQTT topic filters: which topics a filter with ``+`` and ``#`` covers. Pure.

MQTT 5 sections 4.7.1 and 4.7.2. paho has such a function, but the router and the in-memory bus must not
import paho; a test compares this one with paho's.
"""

from __future__ import annotations


def matches(topic_filter: str, topic: str) -> bool:
    """Whether ``topic`` is covered by ``topic_filter``.

    ``+`` matches exactly one level, ``#`` the rest including none; neither matches a topic whose first
    level begins with ``$`` when it is the filter's first level.
    """
    if topic.startswith("$") and topic_filter[:1] in {"+", "#"}:
        return False
    wanted = topic_filter.split("/")
    levels = topic.split("/")
    for index, want in enumerate(wanted):
        if want == "#":
            return True
        if index >= len(levels) or want not in {"+", levels[index]}:
            return False
    return len(wanted) == len(levels)


def check_topic(topic: str) -> None:
    """Refuse a topic that nobody may publish to.

    Raises:
        ValueError: empty, or with a wildcard.
    """
    if not topic or "+" in topic or "#" in topic or "\0" in topic:
        raise ValueError(f"{topic!r} is not a topic to publish to: it is empty or contains a wildcard")


def check_filter(topic_filter: str) -> None:
    """Refuse a filter that no broker accepts.

    Raises:
        ValueError: empty, ``#`` not last, or a wildcard beside other characters of its level.
    """
    levels = topic_filter.split("/")
    for index, level in enumerate(levels):
        if ("#" in level and (level != "#" or index != len(levels) - 1)) or ("+" in level and level != "+"):
            raise ValueError(
                f"{topic_filter!r} is not a topic filter: + and # must fill a whole level, and # the last one"
            )
    if not topic_filter or "\0" in topic_filter:
        raise ValueError("a topic filter must not be empty")
