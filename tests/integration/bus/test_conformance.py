"""What the port promises, on every adapter and every broker that the suite is meant to run on."""

from __future__ import annotations

from caesura.conformance.buses import BusConformance


class TestBus(BusConformance):
    """Over every harness of ``conftest``."""
