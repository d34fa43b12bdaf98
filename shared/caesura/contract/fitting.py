"""Messages that would be too large: cuts their texts until they fit. Pure.

An inventory or a report grows with the VMs of its host, and each VM may bring paragraphs of explanation. The facts
are what others decide on, the texts are for people: so texts are cut first, the longest before the short ones.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from caesura.contract.codec import MAX_PAYLOAD_BYTES, size_bytes
from caesura.contract.envelope import Message

M = TypeVar("M", bound=Message)

_LENGTHS = (1000, 250, 64)
"""Characters kept of a text, tried in turn. Names and identifiers have at most 64, so they stay whole."""


def fits(message: Message) -> bool:
    """Whether the message can be sent."""
    return size_bytes(message) <= MAX_PAYLOAD_BYTES


def fitted(message: M) -> M:
    """The message itself if it can be sent, else with its texts cut as far as necessary.

    If not even that is enough, the shortest version: the sender checks ``fits`` and says what to do.
    """
    for length in _LENGTHS:
        if fits(message):
            break
        message = cut(message, length)
    return message


def cut(message: M, length: int) -> M:
    """The message with every text cut to at most ``length`` characters."""
    shorter: M = _cut(message, length)
    return shorter


def _cut(value: Any, length: int) -> Any:
    match value:
        case str():
            return value if len(value) <= length else value[: length - 1] + "…"
        case msgspec.Struct():
            changed = {name: _cut(getattr(value, name), length) for name in value.__struct_fields__}
            return msgspec.structs.replace(value, **changed)
        case tuple():
            return tuple(_cut(each, length) for each in value)
        case dict():
            return {key: _cut(each, length) for key, each in value.items()}
        case _:
            return value
