"""The agent's own metrics; imported only when a health listener is configured."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from caesura.bus.metrics import bus_families
from caesura.bus.port import Bus
from caesura_vm_agent.service import VmAgent


class AgentCollector(Collector):
    """Reads the agent's live counters at scrape time."""

    def __init__(self, agent: VmAgent, bus: Bus) -> None:
        self._agent = agent
        self._bus = bus

    def collect(self) -> Iterator[Metric]:
        """Every metric of the agent."""
        hooks = CounterMetricFamily(
            "caesura_agent_hooks", "Hooks that ended, by outcome.", labels=["hook", "outcome"]
        )
        for (hook, outcome), count in self._agent.hooks_run.items():
            hooks.add_metric([hook, outcome], count)
        yield hooks
        syncs = CounterMetricFamily(
            "caesura_agent_clock_syncs", "Clock-syncs, by trigger and outcome.", labels=["trigger", "outcome"]
        )
        for (trigger, synced), count in self._agent.syncs.items():
            syncs.add_metric([trigger, "synced" if synced else "unsynced"], count)
        yield syncs
        yield CounterMetricFamily(
            "caesura_agent_clock_steps_refused",
            "Clock-syncs outside a resume that found the clock too far off to step it.",
            value=self._agent.steps_refused,
        )
        yield CounterMetricFamily(
            "caesura_agent_foreign_messages",
            "Clock answers and resumes of hosts that this VM does not belong to; ignored.",
            value=self._agent.binding.ignored,
        )
        yield GaugeMetricFamily(
            "caesura_agent_canary_bytes",
            "Guest memory that the agent holds and rewrites; 0 until all of it was written.",
            value=self._agent.canary.held_bytes,
        )
        yield CounterMetricFamily(
            "caesura_agent_canary_bad_pages",
            "Canary pages that were not as they were written, found after resumes.",
            value=self._agent.canary.bad_pages,
        )
        last = self._agent.last_sync
        if last is not None and last.error_after_s is not None:
            yield GaugeMetricFamily(
                "caesura_agent_clock_error_seconds",
                "Guest clock minus host clock after the last sync.",
                value=last.error_after_s,
            )
        yield from bus_families(self._bus.stats, self._agent.decode_errors)
