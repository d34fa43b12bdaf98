"""What is so now: hosts, VMs, agents, documents, rollouts, last clock verdicts. The fold of retained state. Pure.

State folds by overwriting, so a repeated message is harmless. What was not heard of for a while is forgotten:
a number that is no longer true is worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.topics import TopicError, channel_at
from caesura_metrics_exporter.pauses import Pauses, labels_of

_ROLLOUTS_KEPT = 100  # retained rollouts pile up at the broker; the newest are enough to say what is so now

# Where two waves of a rollout touch one domain, the more telling status counts.
_TELLING = ("started", "verifying", "soaking", "scheduled", "failed", "cancelled", "pending", "completed")


class HostState(msgspec.Struct):
    """One host, as last heard."""

    inventory: m.HostInventory | None = None
    heard_s: float = 0.0
    """When its inventory was last heard, seconds on the exporter's monotonic clock."""
    online: bool = False


class Fleet:
    """The present, as far as the bus has told."""

    def __init__(self) -> None:
        self.hosts: dict[str, HostState] = {}
        self.vm_states: dict[str, m.VmState] = {}
        self.agents: dict[str, bool] = {}
        self.publishers: dict[str, bool] = {}
        self.coordinator: m.CoordinatorPresence | None = None
        self.documents: dict[str, m.SetDocument] = {}
        self.rollouts: dict[str, m.RolloutState] = {}
        self.clocks: dict[str, m.VmClockSynced] = {}
        self.budgets: dict[tuple[str, str, str, str], float] = {}
        """(set, update domain, host, method) to the budget of the last pause, seconds."""
        self.pauses = Pauses()
        self.events_since: dict[str, dict[tuple[str, str], float]] = {}
        """Set to (event, status) to when it was first seen so, seconds on the exporter's monotonic clock."""

    def take(self, message: Message, now_s: float, *, fresh: bool) -> None:
        """Fold one message. ``fresh`` is false for a repetition: then only state counts, not facts."""
        match message:
            case m.HostInventory():
                self._inventory(message, now_s)
            case m.SetDocument():
                known = self.documents.get(message.set)
                if known is None or message.incarnation >= known.incarnation:
                    self.documents[message.set] = message
                    self._since(message, now_s)
            case m.RolloutState():
                self._rollout(message)
            case m.HostPresence() | m.AgentPresence() | m.PublisherPresence() | m.CoordinatorPresence():
                self._presence(message, now_s)
            case m.VmFrozen() if fresh:
                self._paused(message, "paused")
                self.pauses.froze(message, self._domain_of(message), now_s)
            case m.VmResumed() if fresh:
                self._paused(message, "running")
                self.pauses.resumed(message)
            case m.VmClockSynced() if fresh:
                self.clocks[message.vm] = message
            case _:
                pass

    def clear(self, topic: str) -> None:
        """A retained message was removed: its subject is gone."""
        try:
            channel = channel_at(topic)
        except TopicError:
            return
        named = channel.match(topic) or {}
        if channel.message is m.HostInventory:
            self.forget_host(named["host"])
        elif channel.message is m.AgentPresence:
            self.agents.pop(named["vm"], None)
        elif channel.message is m.PublisherPresence:
            self.publishers.pop(named["instance"], None)
        elif channel.message is m.SetDocument:
            self.documents.pop(named["set"], None)
            self.events_since.pop(named["set"], None)
        elif channel.message is m.RolloutState:
            self.rollouts.pop(named["rollout"], None)

    def stale_hosts(self, now_s: float, forget_after_s: float) -> list[str]:
        """Hosts not heard of for so long that what they said is no longer true."""
        return [host for host, state in self.hosts.items() if now_s - state.heard_s > forget_after_s]

    def forget_host(self, host: str) -> None:
        """Drop a host and its VMs."""
        state = self.hosts.pop(host, None)
        if state is not None and state.inventory is not None:
            for record in state.inventory.vms:
                self._forget_vm(record.vm)
        self.budgets = {labels: value for labels, value in self.budgets.items() if labels[2] != host}
        self.pauses.forget_host(host)

    def vms(self) -> Iterator[tuple[str, m.VmRecord, m.VmState]]:
        """Host, record and present state of every known VM."""
        for host, state in self.hosts.items():
            for record in state.inventory.vms if state.inventory else ():
                yield host, record, self.vm_states.get(record.vm, record.state)

    def rollout_of_sets(self) -> dict[str, m.RolloutState]:
        """Set to the rollout that tells most about it: the one that holds it, else the newest."""
        chosen: dict[str, m.RolloutState] = {}
        for rollout in sorted(self.rollouts.values(), key=_importance):
            chosen.update(dict.fromkeys(rollout.sets, rollout))
        return chosen

    @staticmethod
    def domain_states(rollout: m.RolloutState, set_name: str) -> dict[int, str]:
        """Domain of the set to the status of the rollout's wave that touches it."""
        found: dict[int, str] = {}
        for wave in rollout.waves:
            domain = wave.domains.get(set_name)
            if domain is None:
                continue
            known = found.get(domain)
            if known is None or _TELLING.index(wave.status) < _TELLING.index(known):
                found[domain] = wave.status
        return found

    def _presence(
        self,
        message: m.HostPresence | m.AgentPresence | m.PublisherPresence | m.CoordinatorPresence,
        now_s: float,
    ) -> None:
        match message:
            case m.HostPresence():
                self.hosts.setdefault(message.host, HostState(heard_s=now_s)).online = message.online
            case m.AgentPresence():
                self.agents[message.vm] = message.online
            case m.PublisherPresence():
                self.publishers[message.instance] = message.online
            case m.CoordinatorPresence():
                # A coordinator that was replaced says offline late: it does not speak for the new one.
                if self.coordinator is None or message.epoch >= self.coordinator.epoch:
                    self.coordinator = message

    def _inventory(self, inventory: m.HostInventory, now_s: float) -> None:
        state = self.hosts.setdefault(inventory.host, HostState())
        before = state.inventory.vms if state.inventory else ()
        state.inventory = inventory
        state.heard_s = now_s
        for vm in {record.vm for record in before} - {record.vm for record in inventory.vms}:
            self._forget_vm(vm)
        for record in inventory.vms:
            self.vm_states[record.vm] = record.state
        self.pauses.found({record.vm: record.state for record in inventory.vms})

    def _forget_vm(self, vm: str) -> None:
        if any(record.vm == vm for _, record, _ in self.vms()):
            return  # it moved: another host has it
        self.vm_states.pop(vm, None)
        self.clocks.pop(vm, None)
        self.agents.pop(vm, None)
        self.pauses.forget_vm(vm)

    def _domain_of(self, frozen: m.VmFrozen) -> int:
        """The VM's domain by the key of the rollout that holds its set."""
        by_fault_domain = any(
            rollout.policy.domain_key == "fault_domain"
            and rollout.status not in {"completed", "aborted"}
            and frozen.set in rollout.sets
            for rollout in self.rollouts.values()
        )
        if by_fault_domain:
            for _, record, _state in self.vms():
                if record.vm == frozen.vm:
                    return record.fault_domain
        return frozen.update_domain

    def _since(self, document: m.SetDocument, now_s: float) -> None:
        known = self.events_since.get(document.set, {})
        self.events_since[document.set] = {
            key: known.get(key, now_s) for key in ((each.event_id, each.status) for each in document.events)
        }

    def _paused(self, message: m.VmFrozen | m.VmResumed, state: m.VmState) -> None:
        self.vm_states[message.vm] = state
        self.budgets[labels_of(message)] = message.budget_s

    def _rollout(self, rollout: m.RolloutState) -> None:
        self.rollouts[rollout.rollout] = rollout
        if len(self.rollouts) > _ROLLOUTS_KEPT:
            oldest = min(self.rollouts.values(), key=_importance)
            del self.rollouts[oldest.rollout]


def _importance(rollout: m.RolloutState) -> tuple[bool, float]:
    return (rollout.status not in {"completed", "aborted"}, rollout.created_at.timestamp())
