"""The properties of MQTT 5 packets that every connection sends."""

from __future__ import annotations

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from caesura.bus.options import BrokerOptions
from caesura.contract.codec import MAX_PACKET_BYTES

_CONTENT_TYPE = "application/cloudevents+json"
"""What every payload is: the MQTT binding of CloudEvents 1.0.2, section 3.2.2. MQTT 3.1.1 cannot say it."""
PUBLISH_BYTES = 12 + 3 + len(_CONTENT_TYPE)
"""Fixed header (5), lengths of topic and properties, packet id, content type: at most, MQTT 5.0, section 3.3."""


def connect_properties(options: BrokerOptions) -> Properties:
    """What CONNECT says in MQTT 5: the largest packet that we take, and how long a session outlives its connection."""
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = MAX_PACKET_BYTES
    if not options.clean:
        # Without an expiry, MQTT 5 forgets a session when its connection ends, whatever clean_start says.
        properties.SessionExpiryInterval = options.session_expiry_s
    return properties


def content_type(packet: int) -> Properties:
    """The content type of every payload, for PUBLISH or a last will (``packet``: paho's packet type)."""
    properties = _Packed(packet)
    properties.ContentType = _CONTENT_TYPE
    return properties


class _Packed(Properties):
    """Properties that are the same for every message: encoded once."""

    def __init__(self, packet: int) -> None:
        super().__init__(packet)  # type: ignore[no-untyped-call]
        self._set_packed(b"")

    def _set_packed(self, packed: bytes) -> None:
        self.__dict__["_packed"] = packed  # paho's own setter accepts MQTT properties only

    def pack(self) -> bytes:
        """The bytes, as of the first call."""
        packed: bytes = self.__dict__["_packed"]
        if not packed:
            packed = super().pack()  # type: ignore[no-untyped-call]
            self._set_packed(packed)
        return packed
