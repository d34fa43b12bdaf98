"""Messages to bytes and back, with one error class for each way a message can be invalid."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache

import msgspec

from caesura.contract.envelope import Header, Message, OutgoingEnvelope, RawEnvelope
from caesura.contract.messages import Id
from caesura.contract.topics import Channel, TopicError, match_topic
from caesura.runtime.errors import CaesuraError

MAX_PAYLOAD_BYTES = 256 * 1024  # the smallest limit that all supported brokers share

MAX_PACKET_BYTES = MAX_PAYLOAD_BYTES + 8 * 1024
"""The largest MQTT packet with such a payload: the longest topic of the table has some 350 bytes, the rest leaves room for
properties. It is `max_packet_size` of the shipped broker configurations, and what clients request from a broker by MQTT 5."""


class ContractError(CaesuraError):
    """A message that violates the contract. ``kind`` is a bounded label for metrics."""

    kind = "malformed"

    def __init__(self, topic: str, why: str) -> None:
        self.topic = topic
        self.why = why
        super().__init__(f"message on {topic!r}: {why}")


class Oversized(ContractError):
    """More bytes than any supported broker promises to carry."""

    kind = "oversized"


class UnknownTopic(ContractError):
    """A topic that is not in the table."""

    kind = "unknown_topic"


class UnknownType(ContractError):
    """A CloudEvents type that does not belong on this topic."""

    kind = "unknown_type"


class Malformed(ContractError):
    """Not JSON, not a CloudEvent, or data of the wrong shape."""

    kind = "malformed"


class Received(msgspec.Struct, frozen=True):
    """A decoded message with its topic parameters and header."""

    channel: Channel
    parameters: Mapping[str, str]
    header: Header
    message: Message


_ENVELOPE_BYTES = 1024  # the longest id, source and type the contract allows come to 600

_header_decoder = msgspec.json.Decoder(RawEnvelope)
_encoder = msgspec.json.Encoder()


@lru_cache(maxsize=64)
def _data_decoder(message: type[Message]) -> msgspec.json.Decoder[Message]:
    return msgspec.json.Decoder(message)


def encode(message: Message, *, source: str, event_id: str, time: datetime) -> bytes:
    """One CloudEvent in structured JSON mode.

    Raises:
        Oversized: the encoded event has more than 256 KiB.
    """
    payload = _encoder.encode(
        OutgoingEnvelope(
            specversion="1.0",
            id=event_id,
            source=source,
            type=type(message).TYPE,
            time=time,
            data=message,
        )
    )
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise Oversized(type(message).TYPE, f"{len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} allowed")
    return payload


def size_bytes(message: Message) -> int:
    """The size of the message on the bus, rounded up a little: for senders that check before they send."""
    return len(_encoder.encode(message)) + _ENVELOPE_BYTES


def decode(topic: str, payload: bytes) -> Received:
    """Read one message from the bus.

    Raises:
        ContractError: one of its subclasses, saying what is wrong; no other error.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise Oversized(topic, f"{len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} allowed")
    place = match_topic(topic)
    if place is None:
        raise UnknownTopic(topic, "not in the topic table")
    channel, parameters = place
    try:
        envelope = _header_decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(topic, f"not a CloudEvent: {error}") from error
    if envelope.type != channel.message.TYPE:
        raise UnknownType(
            topic, f"type {envelope.type!r} does not belong here, {channel.message.TYPE!r} does"
        )
    try:
        message = _data_decoder(channel.message).decode(envelope.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(topic, f"data of {envelope.type}: {error}") from error
    _check_parameters(topic, parameters, message)
    header = Header(**{name: getattr(envelope, name) for name in Header.__struct_fields__})
    return Received(channel, parameters, header, message)


class _Asked(msgspec.Struct):
    """The id of a request; all other members are ignored."""

    request: Id


class _Request(msgspec.Struct):
    data: _Asked


_request_decoder = msgspec.json.Decoder(_Request)


def request_in(payload: bytes) -> str:
    """The id of a request that cannot be read otherwise, so that its sender can be answered; empty if there is none."""
    try:
        return _request_decoder.decode(payload).data.request
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


# A writer may only speak for itself: where a topic parameter repeats a member of the data, they must agree.
# Access rules guard the topic; without this check they would not guard the data.
_PARAMETER_MEMBER = {
    "host": "host",
    "vm": "vm",
    "set": "set",
    "rollout": "rollout",
    "ud": "update_domain",
    "status": "status",
    "wave": "wave",
    "part": "part",
    "instance": "instance",
}


def _check_parameters(topic: str, parameters: Mapping[str, str], message: Message) -> None:
    for parameter, value in parameters.items():
        member = getattr(message, _PARAMETER_MEMBER.get(parameter, ""), None)
        if member is not None and str(member) != value:
            raise Malformed(topic, f"{parameter} is {value!r} in the topic but {member!r} in the data")


__all__ = [
    "MAX_PACKET_BYTES",
    "MAX_PAYLOAD_BYTES",
    "ContractError",
    "Malformed",
    "Oversized",
    "Received",
    "TopicError",
    "UnknownTopic",
    "UnknownType",
    "decode",
    "encode",
    "request_in",
    "size_bytes",
]
