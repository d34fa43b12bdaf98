"""The bus conformance suite: what the port (``caesura.bus.port``) promises, on any adapter and any broker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caesura.conformance.bus_delivery import BusDelivery
from caesura.conformance.bus_faults import BusFaults
from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness, MemoryHarness, leave_out
from caesura.conformance.bus_sessions import BusSessions

__all__ = ["BrokerCapabilities", "BusConformance", "BusHarness", "MemoryHarness"]


class BusConformance(BusDelivery, BusSessions, BusFaults):
    """Subclass it in a test module as ``TestMyBus``, with an asynchronous fixture ``harness`` that gives a ``BusHarness``.

    ``class TestMyBus(BusConformance, missing={...})`` leaves the tests out that need a promise which the broker does not keep.
    """

    def __init_subclass__(
        cls, *, missing: Mapping[BrokerCapabilities, str] | None = None, **more: Any
    ) -> None:
        super().__init_subclass__(**more)
        leave_out(cls, missing or {})
