"""The fold of facts into counters and histograms. Pure.

A fact that arrives twice is counted once: ``deduplication``. Labels are bounded: never an event, a rollout or an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import Message
from caesura.lifecycle.proof import PAUSING, broken_codes, held_codes
from caesura_metrics_exporter.deduplication import Deduplicator, identity_of
from caesura_metrics_exporter.metrics.pauses import PauseLabels, labels_of
from caesura_metrics_exporter.metrics.series import Counts, Histogram

# From 1 ms (an in-place swap) to 60 s, with boundaries at the budget limit of 30 s and at usual smaller budgets.
# Few, since they make up most of the series; the longest and the last pauses are exported exactly in addition.
PAUSE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0)
# Microseconds after a good sync, whole pauses before it.
CLOCK_BUCKETS = (
    0.00001, 0.00005, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0,
)  # fmt: skip
NOTICE_BUCKETS = (1.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0)
SECONDS_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)

_REMEMBERED = 20_000  # facts; a large wave makes some hundreds, so repetitions of many waves are recognised

_PAUSE = ("set", "update_domain", "method")
_DOMAIN = ("set", "update_domain")


class FactCounters:
    """Counters and histograms of a fleet."""

    def __init__(self) -> None:
        self._seen = Deduplicator(_REMEMBERED)
        self.messages = Counts("type")
        self.duplicates = Counts("type")
        self.freezes = Counts(*_PAUSE)
        self.pauses = Histogram(PAUSE_BUCKETS, *_PAUSE)
        self.overruns = Counts(*_PAUSE)
        self.guard_resumes = Counts(*_PAUSE)
        self.memory_proofs = Counts(*_DOMAIN, "proof", "outcome")
        self.clock_errors = Histogram(CLOCK_BUCKETS, "set", "when")
        self.clock_syncs = Counts(*_DOMAIN, "by", "outcome")
        self.agent_syncs = Counts("trigger", "outcome")
        self.waves = Counts("status")
        self.events = Counts("set", "type", "status")
        self.notice = Histogram(NOTICE_BUCKETS, "type")
        self.approval_delay = Histogram(NOTICE_BUCKETS, "type")
        self.approvals = Counts("set")
        self.readiness = Counts("outcome")
        self.hooks = Counts("hook", "outcome")
        self.hook_seconds = Histogram(SECONDS_BUCKETS, "hook")
        self.operations = Counts("status")
        self.updates = Counts("host", "update", "outcome")
        self.update_seconds = Histogram(SECONDS_BUCKETS, "update")
        self.overhead = Histogram(PAUSE_BUCKETS)
        self.commands = Counts("command")
        self.requests = Counts("outcome")
        self.foreign = Counts("host")
        self._counted: Mapping[type[Message], Callable[[Any], None]] = {
            m.HostInventory: self._inventory,
            m.VmFrozen: self._frozen,
            m.VmResumed: self._resumed,
            m.VmClockSynced: self._clock,
            m.AgentClockSynced: self._agent_synced,
            m.WaveChanged: lambda wave: self.waves.add(wave.status),
            m.EventChanged: self._event,
            m.EventApproved: lambda approved: self.approvals.add(approved.set),
            m.VmApproved: lambda approved: self.approvals.add(approved.set),
            m.VmReady: lambda answer: self.readiness.add("ready" if answer.ready else "not_ready"),
            m.HookFinished: self._hook,
            m.OperationReported: self._operation,
            m.StartOperation: lambda _: self.commands.add("start"),
            m.AbortOperation: lambda _: self.commands.add("abort"),
            m.RequestAnswered: lambda a: self.requests.add("accepted" if a.accepted else "refused"),
        }

    def take(self, received: Received) -> bool:
        """Count one message; returns whether it was new."""
        message = received.message
        kind = type(message).TYPE
        self.messages.add(kind)
        if not self._seen.first(identity_of(received)):
            self.duplicates.add(kind)
            return False
        self._count(message)
        return True

    def forget_host(self, host: str) -> None:
        """The host was removed permanently: drop its series."""
        for series in (self.updates, self.foreign):
            series.forget("host", host)

    def forget_set(self, set_name: str) -> None:
        """No VM is in the set any more: drop its series."""
        for series in (
            self.freezes,
            self.pauses,
            self.overruns,
            self.guard_resumes,
            self.memory_proofs,
            self.clock_errors,
            self.clock_syncs,
            self.events,
            self.approvals,
        ):
            series.forget("set", set_name)

    def _count(self, message: Message) -> None:
        count = self._counted.get(type(message))
        if count is not None:  # the others are only state: see ``fleet``
            count(message)

    def _inventory(self, inventory: m.HostInventory) -> None:
        # Exposed from zero on, long before a pause: a pause may begin and end between two scrapes, and nearly every overrun
        # is the first with its labels, which would not count as an increase.
        self.foreign.add(inventory.host, by=0.0)
        for record in inventory.vms:
            # The other methods have neither a budget to overrun nor a guard.
            for method in PAUSING.intersection(record.methods):
                self._expect((record.set, str(record.update_domain), method))

    def _expect(self, labels: PauseLabels) -> None:
        self.overruns.add(*labels, by=0.0)
        self.guard_resumes.add(*labels, by=0.0)

    def _frozen(self, frozen: m.VmFrozen) -> None:
        labels = labels_of(frozen)
        self.freezes.add(*labels)
        self._expect(labels)
        self.pauses.expect(*labels)

    def _agent_synced(self, synced: m.AgentClockSynced) -> None:
        if synced.canary is None:  # with the canary it is the same sync, published once more
            self.agent_syncs.add(synced.trigger, "synced" if synced.synced else "unsynced")

    def _hook(self, hook: m.HookFinished) -> None:
        self.hooks.add(hook.hook, hook.outcome)
        self.hook_seconds.observe(hook.seconds, hook.hook)

    def _resumed(self, resumed: m.VmResumed) -> None:
        labels = labels_of(resumed)
        self.pauses.observe(resumed.pause_s, *labels)
        self.overruns.add(*labels, by=0.0 if resumed.within_budget else 1.0)
        self.guard_resumes.add(*labels, by=1.0 if resumed.resumed_by == "guard" else 0.0)
        self._memory(resumed.set, resumed.update_domain, resumed.memory)

    def _memory(self, set_name: str, domain: int, proof: m.MemoryProof | None) -> None:
        held, broken = held_codes(proof), broken_codes(proof)
        for code in (*held, *broken):
            # Both outcomes from the first proof on: for Prometheus, a counter that starts at 1 has not increased.
            self.memory_proofs.add(set_name, str(domain), code, "held", by=float(code in held))
            self.memory_proofs.add(set_name, str(domain), code, "broken", by=float(code in broken))

    def _clock(self, synced: m.VmClockSynced) -> None:
        domain = (synced.set, str(synced.update_domain))
        self.clock_syncs.add(*domain, synced.by, "synced" if synced.synced else "unsynced")
        for when, error_s in (("before", synced.error_before_s), ("after", synced.error_after_s)):
            if error_s is not None:
                self.clock_errors.observe(abs(error_s), synced.set, when)
        self._memory(synced.set, synced.update_domain, synced.memory)

    def _event(self, event: m.EventChanged) -> None:
        self.events.add(event.set, event.event_type, event.status)
        if event.status == "scheduled":
            self.notice.observe(event.notice_s, event.event_type)
        if event.approval_delay_s is not None and self._seen.first(("approval-delay", event.event_id)):
            self.approval_delay.observe(event.approval_delay_s, event.event_type)

    def _operation(self, report: m.OperationReported) -> None:
        self.operations.add(report.status)
        if report.update is not None and report.update.update:
            self.updates.add(report.host, report.update.update, report.update.outcome)
            self.update_seconds.observe(report.update.seconds, report.update.update)
        if report.overhead_s is not None:
            self.overhead.observe(report.overhead_s)
