"""What is so now: hosts, VMs, agents, documents, rollouts, last clock verdicts. The fold of retained state. Pure.

State folds by overwriting, so a repeated message is harmless. Nothing is forgotten by time: a host that died must be
seen to be dead until somebody removes what the broker retains of it. How long ago it was heard is told instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.topics import placed
from caesura_metrics_exporter.clocks import Clocks
from caesura_metrics_exporter.pauses import Pauses, labels_of

_ROLLOUTS_KEPT = 100  # retained rollouts pile up at the broker; the newest are enough to say what is so now

_SET_KEPT_S = 900.0
"""s: as long as the alerts look back."""

_OVER = frozenset({"completed", "aborted"})

# Where two waves of a rollout touch one domain, the more telling status counts.
_TELLING = ("started", "verifying", "soaking", "scheduled", "failed", "cancelled", "pending", "completed")


class HostState(msgspec.Struct):
    """One host, as last heard."""

    heard_s: float
    """When it last said something itself, seconds on the exporter's monotonic clock."""
    inventory: m.HostInventory | None = None
    online: bool = False


class AgentState(msgspec.Struct, frozen=True):
    """One agent, as last heard; ``heard_s`` as for a host."""

    online: bool
    heard_s: float


class Fleet:
    """The present, as far as the bus has told."""

    def __init__(self) -> None:
        self.hosts: dict[str, HostState] = {}
        self.vm_states: dict[str, m.VmState] = {}
        self.agents: dict[str, AgentState] = {}
        self.publishers: dict[str, bool] = {}
        self.coordinator: m.CoordinatorPresence | None = None
        self.coordinator_heard_s: float | None = None
        """When the one that leads last said so, seconds on the exporter's monotonic clock."""
        self.documents: dict[str, m.SetDocument] = {}
        self.rollouts: dict[str, m.RolloutState] = {}
        self.clocks = Clocks()
        self.budgets: dict[tuple[str, str, str, str], float] = {}
        """(set, update domain, host, method) to the budget of the last pause, seconds."""
        self.pauses = Pauses()
        self.foreign_vms: dict[str, int] = {}
        """Host to how many VMs its inventory names that belong to another one, or to none."""
        self._left: dict[str, float] = {}
        """Set to when a host's last VM of it went, seconds on the exporter's monotonic clock."""
        self.events_since: dict[str, dict[tuple[str, str], float]] = {}
        """Set to (event, status) to when it was first seen so, seconds on the exporter's monotonic clock."""

    def take(self, message: Message, now_s: float, *, fresh: bool, stored: bool = False) -> None:
        """Fold one message.

        Args:
            message: what was said.
            now_s: when it was heard.
            fresh: false for a repetition: then only state counts, not facts.
            stored: the broker had it from before, so it does not show that its sender lives.
        """
        match message:
            case m.HostInventory():
                self._inventory(message, now_s, stored=stored)
            case m.SetDocument():
                known = self.documents.get(message.set)
                if known is None or message.incarnation >= known.incarnation:
                    self.documents[message.set] = message
                    self._since(message, now_s)
            case m.RolloutState():
                self._rollout(message)
            case m.HostPresence() | m.AgentPresence() | m.PublisherPresence() | m.CoordinatorPresence():
                self._presence(message, now_s, stored=stored)
            case m.VmFrozen() if fresh:
                self._paused(message, "paused")
                domain = self._domain_of(message.host, message.vm, message.set, message.update_domain)
                self.pauses.froze(message, domain, now_s)
            case m.VmResumed() if fresh:
                self._paused(message, "running")
                self.pauses.resumed(message)
            case m.VmClockSynced() if fresh:
                self.clocks.judged(message, self._clock_bound_of(message.set))
            case m.AgentClockSynced() if fresh:
                self.clocks.checked(message)
            case _:
                pass

    def clear(self, topic: str) -> None:
        """A retained message was removed: its subject is gone."""
        place = placed(topic)
        if place is None:
            return
        channel, named = place
        if channel.message is m.HostInventory:
            self.forget_host(named["host"])
        elif channel.message is m.HostPresence:
            known = self.hosts.get(named["host"])
            if known is not None and known.inventory is None:
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

    def forget_host(self, host: str) -> None:
        """Drop a host and its VMs."""
        state = self.hosts.pop(host, None)
        if state is not None and state.inventory is not None:
            for record in state.inventory.vms:
                self._forget_vm(record.vm)
                self._left[record.set] = state.heard_s
        self.budgets = {labels: value for labels, value in self.budgets.items() if labels[2] != host}
        self.pauses.forget_host(host)

    def forget_empty_sets(self, now_s: float) -> list[str]:
        """Sets that no VM has been in for long; what was known of them goes.

        A VM in no set is a set of its own: many short-lived ones would leave series behind for ever. Not at once, since a
        VM that moves is nowhere for a moment.
        """
        due = [name for name, since_s in self._left.items() if now_s - since_s > _SET_KEPT_S]
        if not due:
            return []
        for name in due:
            del self._left[name]
        gone = set(due) - {record.set for _, record, _ in self.vms()}
        for name in gone:
            self.pauses.forget_set(name)
        self.budgets = {labels: value for labels, value in self.budgets.items() if labels[0] not in gone}
        return sorted(gone)

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

    def budget_of(self, set_name: str) -> float:
        """Seconds that a pause of the set may last, as far as its rollout is known; else the most that any may."""
        rollouts = self._rollouts_under_way(set_name)
        return max((each.policy.budget_s for each in rollouts), default=m.MAX_BUDGET_S)

    def _presence(
        self,
        message: m.HostPresence | m.AgentPresence | m.PublisherPresence | m.CoordinatorPresence,
        now_s: float,
        *,
        stored: bool,
    ) -> None:
        match message:
            case m.HostPresence():
                state = self.hosts.setdefault(message.host, HostState(heard_s=now_s))
                state.online = message.online
                if message.online and not stored:
                    state.heard_s = now_s
            case m.AgentPresence():
                agent = self.agents.get(message.vm)
                heard_s = agent.heard_s if agent is not None and stored else now_s
                self.agents[message.vm] = AgentState(message.online, heard_s)
            case m.PublisherPresence():
                self.publishers[message.instance] = message.online
            case m.CoordinatorPresence():
                self._coordinator(message, now_s, stored=stored)

    def _coordinator(self, message: m.CoordinatorPresence, now_s: float, *, stored: bool) -> None:
        known = self.coordinator
        if known is not None and is_last_will(message):
            # Were it another one's, the leader would say at once that it is there.
            self.coordinator = msgspec.structs.replace(known, online=False)
        elif known is None or message.epoch >= known.epoch:
            # One that was replaced says offline late: it does not speak for the new one.
            self.coordinator = message
            if message.online and (self.coordinator_heard_s is None or not stored):
                self.coordinator_heard_s = now_s

    def _inventory(self, inventory: m.HostInventory, now_s: float, *, stored: bool) -> None:
        state = self.hosts.setdefault(inventory.host, HostState(heard_s=now_s))
        before = state.inventory.vms if state.inventory else ()
        state.inventory = inventory
        if not stored:
            state.heard_s = now_s
        for vm in {record.vm for record in before} - {record.vm for record in inventory.vms}:
            self._forget_vm(vm)
        for set_name in {record.set for record in before} - {record.set for record in inventory.vms}:
            self._left[set_name] = now_s
        for record in inventory.vms:
            if record.state == "paused":
                domain = self._domain_of(inventory.host, record.vm, record.set, record.update_domain)
                self.pauses.found(record, inventory.host, domain, now_s)
            elif not self.pauses.runs(record.vm, under_way=bool(inventory.operation)):
                continue
            self.vm_states[record.vm] = record.state

    def _forget_vm(self, vm: str) -> None:
        if any(record.vm == vm for _, record, _ in self.vms()):
            return  # it moved: another host has it
        self.vm_states.pop(vm, None)
        self.clocks.forget_vm(vm)
        self.agents.pop(vm, None)
        self.pauses.forget_vm(vm)

    def _rollouts_under_way(self, set_name: str) -> list[m.RolloutState]:
        return [
            rollout
            for rollout in self.rollouts.values()
            if rollout.status not in _OVER and set_name in rollout.sets
        ]

    def _clock_bound_of(self, set_name: str) -> float | None:
        """By the rollout that tells most about the set, as it stands now."""
        of_set = [rollout for rollout in self.rollouts.values() if set_name in rollout.sets]
        return max(of_set, key=_importance).policy.clock_bound_s if of_set else None

    def _domain_of(self, host: str, vm: str, set_name: str, update_domain: int) -> int:
        """The VM's domain by the key of the rollout that holds its set."""
        rollouts = self._rollouts_under_way(set_name)
        if any(rollout.policy.domain_key == "fault_domain" for rollout in rollouts):
            known = self.hosts.get(host)
            inventory = known.inventory if known is not None else None
            for record in inventory.vms if inventory is not None else ():
                if record.vm == vm:
                    return record.fault_domain
        return update_domain

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


def is_last_will(message: m.CoordinatorPresence) -> bool:
    """Whether the broker says it for a coordinator that is gone: no epoch was claimed yet when the will was made."""
    return not message.online and message.epoch == 0


def _importance(rollout: m.RolloutState) -> tuple[bool, float]:
    return (rollout.status not in _OVER, rollout.created_at.timestamp())
