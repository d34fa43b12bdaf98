"""How tests run a bus and wait for what it receives; the bus conformance suite, which is shipped, does it in the same way."""

from caesura.conformance.collector import PATIENCE_S, Collector, eventually, running

__all__ = ["PATIENCE_S", "Collector", "eventually", "running"]
