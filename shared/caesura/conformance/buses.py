"""The bus conformance suite: what the port (``caesura.bus.port``) promises, on any adapter and any broker."""

from __future__ import annotations

from caesura.conformance.bus_delivery import BusDelivery
from caesura.conformance.bus_faults import BusFaults
from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness, MemoryHarness
from caesura.conformance.bus_sessions import BusSessions

__all__ = ["BrokerCapabilities", "BusConformance", "BusHarness", "MemoryHarness"]


class BusConformance(BusDelivery, BusSessions, BusFaults):
    """Subclass it in a test module as ``TestMyBus``, with an asynchronous fixture ``harness`` that gives a ``BusHarness``."""
