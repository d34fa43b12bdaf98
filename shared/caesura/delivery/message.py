"""A message that must arrive: encoded once, when it is enqueued, so that every attempt sends the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from caesura.contract.codec import decode, encode
from caesura.contract.envelope import Message
from caesura.contract.topics import CHANNELS, channel_of

_TYPES: Mapping[str, type[Message]] = {channel.message.TYPE: channel.message for channel in CHANNELS}


class OutboxMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message on its way to the broker, at QoS 1.

    ``payload`` is the whole CloudEvent: its id and time are those of the moment when it was enqueued, so a reader that
    drops duplicates by id recognises a repetition. Empty: it removes what is retained on ``topic``.
    """

    event_id: str
    type: str
    topic: str
    payload: bytes
    retain: bool = False

    def read(self) -> Message:
        """The decoded message.

        Raises:
            ContractError: nobody could read it.
        """
        return decode(self.topic, self.payload).message


def prepare(
    message: Message, *, source: str, event_id: str, at: datetime, **parameters: str | int
) -> OutboxMessage:
    """Encode a message for its topic.

    Args:
        source: CloudEvents source of the writer.
        event_id: CloudEvents id; the same fact must get the same one.
        at: the time of the event, with a time zone.
        parameters: fill the topic template.

    Raises:
        TopicError, ContractError: it cannot be sent as it is.
    """
    channel = channel_of(type(message))
    return OutboxMessage(
        event_id=event_id,
        type=type(message).TYPE,
        topic=channel.topic(**parameters),
        payload=encode(message, source=source, event_id=event_id, time=at),
        retain=channel.retain,
    )


def clearing(kind: type[Message], *, event_id: str, **parameters: str | int) -> OutboxMessage:
    """The message that removes a retained one (MQTT 3.1.1, section 3.3.1.3).

    Raises:
        TopicError: the parameters do not fit the topic.
    """
    topic = channel_of(kind).topic(**parameters)
    return OutboxMessage(event_id=event_id, type=kind.TYPE, topic=topic, payload=b"", retain=True)


def is_state(kind: str) -> bool:
    """Whether messages of this type are retained: their writer publishes their content again at each start."""
    return kind in _TYPES and channel_of(_TYPES[kind]).retain


def from_body(
    kind: str,
    parameters: Mapping[str, str | int],
    body: bytes,
    *,
    source: str,
    event_id: str,
    at: datetime,
) -> OutboxMessage:
    """A message as earlier versions' outboxes kept it: its type, its topic's parameters and its data in JSON.

    Raises:
        TopicError, ContractError: it cannot be sent.
        ValueError, KeyError: it cannot be read.
    """
    message = msgspec.json.decode(body, type=_TYPES[kind])
    return prepare(message, source=source, event_id=event_id, at=at, **parameters)
