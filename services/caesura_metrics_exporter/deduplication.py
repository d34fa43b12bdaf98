"""Repeated facts, recognised by what they are about. Pure.

Facts may arrive twice (QoS 1, redelivery, a sender that repeats itself). Each is identified by its subject (an operation and a VM, an
event and a status) or else by its CloudEvents source and id. ``FactCounters`` asks for each message and counts a fact once; the other
views are passed its answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from caesura.contract import messages as m
from caesura.contract.codec import Received


class Deduplicator:
    """Remembers the newest ``limit`` keys, to recognise a repetition."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._keys: OrderedDict[Hashable, None] = OrderedDict()

    def first(self, key: Hashable) -> bool:
        """True the first time ``key`` is given, false while it is remembered."""
        if key in self._keys:
            self._keys.move_to_end(key)
            return False
        self._keys[key] = None
        if len(self._keys) > self._limit:
            self._keys.popitem(last=False)
        return True


def identity_of(received: Received) -> Hashable:
    """The identity of a fact, the same for a repetition with an id of its own."""
    message = received.message
    match message:
        case m.VmFrozen() | m.VmResumed():
            return (type(message).TYPE, message.operation, message.vm)
        case m.VmClockSynced() if message.operation:
            return (message.TYPE, message.operation, message.vm)
        case m.EventChanged():
            return (message.TYPE, message.event_id, message.status)
        case m.OperationReported() | m.StartOperation() | m.AbortOperation():
            status = message.status if isinstance(message, m.OperationReported) else ""
            return (type(message).TYPE, message.host, message.operation, status)
        case _:
            return (received.header.source, received.header.id)
