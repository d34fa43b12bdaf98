"""What is so now: hosts, VMs, agents, documents, rollouts, last clock verdicts. The fold of retained state. Pure.

State folds by overwriting, so a repeated message is harmless. Nothing is forgotten by time: a host that died must be
seen to be dead until somebody removes what the broker retains of it. How long ago it was heard is told instead.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.parts import WholeRollout
from caesura.contract.topics import placed
from caesura.fleet.fold import apply
from caesura.fleet.state import FleetState
from caesura.fleet.words import Cleared
from caesura_metrics_exporter.agents import Agents
from caesura_metrics_exporter.census import Census, Counted, shown_state
from caesura_metrics_exporter.clocks import Clocks
from caesura_metrics_exporter.pauses import Pauses
from caesura_metrics_exporter.rollout_index import RolloutIndex

_SET_KEPT_S = 900.0
"""s: as long as the alerts look back."""


class HostState(msgspec.Struct):
    """One host, as last heard."""

    heard_s: float
    """When it last said something itself, seconds on the exporter's monotonic clock."""
    inventory: m.HostInventory | None = None
    online: bool = False


class Fleet:
    """The present, as far as the bus has told."""

    def __init__(self) -> None:
        self.hosts: dict[str, HostState] = {}
        self.vm_states: dict[str, m.VmState] = {}
        self.agents = Agents()
        self.state = FleetState()
        """The fold of the bus: documents, presences, and whose VM it is. Facts are laid over it here, and nowhere in it."""
        self.coordinator_heard_s: float | None = None
        """When the one that leads last said so, seconds on the exporter's monotonic clock."""
        self.rollouts = RolloutIndex()
        self.clocks = Clocks()
        self.pauses = Pauses()
        self.census = Census()
        self._placed: dict[str, dict[str, m.VmRecord]] = {}
        """VM to the hosts that name it, and how they describe it."""
        self._left: dict[str, float] = {}
        """Set to when a host's last VM of it went, seconds on the exporter's monotonic clock."""
        self._left_first: list[tuple[float, str]] = []
        """The same as a heap, with what ``_left`` does not say any more."""
        self.events_since: dict[str, dict[tuple[str, str], float]] = {}
        """Set to (event, status) to when it was first seen so, seconds on the exporter's monotonic clock."""

    @property
    def coordinator(self) -> m.CoordinatorPresence | None:
        """The one that leads, or led last."""
        return self.state.coordinator

    @property
    def publishers(self) -> dict[str, bool]:
        """Metadata publisher to whether it is on the bus."""
        return {name: each.online for name, each in self.state.words.named(m.PublisherPresence).items()}

    @property
    def documents(self) -> Mapping[str, m.SetDocument]:
        """Set to its newest document."""
        return self.state.words.named(m.SetDocument)

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
                _, changes = apply(self.state, message, now_s)
                if changes.word:
                    self._since(message, now_s)
            case WholeRollout():
                self.rollouts.take(message)
            case m.HostPresence() | m.AgentPresence() | m.PublisherPresence() | m.CoordinatorPresence():
                self._presence(message, now_s, stored=stored)
            case m.VmFrozen() if fresh:
                self.vm_states[message.vm] = "paused"
                self.pauses.froze(message, self._domain_of(message), now_s)
                self._recount(message.vm)
            case m.VmResumed() if fresh:
                self.vm_states[message.vm] = "running"
                self.pauses.resumed(message, now_s)
                self._recount(message.vm)
            case m.VmClockSynced() if fresh:
                self.clocks.judged(message, self._clock_bound_of(message.set))
                self._recount(message.vm)
            case m.AgentClockSynced() if fresh:
                self.clocks.checked(message)
                self._recount(message.vm)
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
            self.agents.forget(named["vm"])
            self._recount(named["vm"])
        elif channel.message is m.PublisherPresence:
            apply(self.state, Cleared(m.PublisherPresence, named), 0.0)
        elif channel.message is m.SetDocument:
            apply(self.state, Cleared(m.SetDocument, named), 0.0)
            self.events_since.pop(named["set"], None)
        elif channel.message is m.RolloutState:
            self.rollouts.forget(named["rollout"])

    def settle(self, now_s: float) -> None:
        """Time has passed: call it before what is so now is read."""
        for vm in self.agents.settle(now_s):
            self._recount(vm)

    def forget_host(self, host: str) -> None:
        """Drop a host and its VMs."""
        state = self.hosts.pop(host, None)
        if state is not None and state.inventory is not None:
            for record in state.inventory.vms:
                self._remove(record.vm, host)
            for set_name in {record.set for record in state.inventory.vms}:
                self._leave(set_name, state.heard_s)
        self.pauses.forget_host(host)

    def forget_empty_sets(self, now_s: float) -> list[str]:
        """Sets that no VM has been in for long; what was known of them goes.

        A VM in no set is a set of its own: many short-lived ones would leave series behind for ever. Not at once, since a
        VM that moves is nowhere for a moment.
        """
        gone: set[str] = set()
        while self._left_first and now_s - self._left_first[0][0] > _SET_KEPT_S:
            since_s, name = heapq.heappop(self._left_first)
            if self._left.get(name) != since_s:
                continue  # it was left again, later
            del self._left[name]
            if name not in self.census.sets:
                gone.add(name)
        for name in gone:
            self.pauses.forget_set(name)
        return sorted(gone)

    def budget_of(self, set_name: str) -> float:
        """Seconds that a pause of the set may last, as far as its rollout is known; else the most that any may."""
        rollouts = self.rollouts.under_way(set_name)
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
                self.agents.take(message.vm, online=message.online, now_s=now_s, stored=stored)
                self._recount(message.vm)
            case m.PublisherPresence():
                apply(self.state, message, now_s)
            case m.CoordinatorPresence():
                self._coordinator(message, now_s, stored=stored)

    def _coordinator(self, message: m.CoordinatorPresence, now_s: float, *, stored: bool) -> None:
        apply(self.state, message, now_s)
        if (
            self.coordinator is message
            and message.online
            and (self.coordinator_heard_s is None or not stored)
        ):
            self.coordinator_heard_s = now_s

    def _inventory(self, inventory: m.HostInventory, now_s: float, *, stored: bool) -> None:
        state = self.hosts.setdefault(inventory.host, HostState(heard_s=now_s))
        before = state.inventory.vms if state.inventory else ()
        state.inventory = inventory
        if not stored:
            state.heard_s = now_s
        stays = {record.vm for record in inventory.vms}
        for record in before:
            if record.vm not in stays:
                self._remove(record.vm, inventory.host)
        for set_name in {record.set for record in before} - {record.set for record in inventory.vms}:
            self._leave(set_name, now_s)
        for record in inventory.vms:
            self._placed.setdefault(record.vm, {})[inventory.host] = record
            if record.state == "paused":
                domain = self._by_key(record.set, record.update_domain, record)
                self.pauses.found(record, inventory.host, domain, now_s)
                self.vm_states[record.vm] = record.state
            elif self.pauses.runs(record.vm, under_way=bool(inventory.operation)):
                self.vm_states[record.vm] = record.state
            self._recount(record.vm)

    def _remove(self, vm: str, host: str) -> None:
        self.census.count(vm, host, None)
        hosts = self._placed.get(vm, {})
        hosts.pop(host, None)
        if hosts:
            return  # it moved: another host has it
        self._placed.pop(vm, None)
        self.vm_states.pop(vm, None)
        self.clocks.forget_vm(vm)
        self.agents.forget(vm)
        self.pauses.forget_vm(vm)

    def _leave(self, set_name: str, at_s: float) -> None:
        self._left[set_name] = at_s
        heapq.heappush(self._left_first, (at_s, set_name))

    def _recount(self, vm: str) -> None:
        """Something about the VM may be different."""
        for host, record in self._placed.get(vm, {}).items():
            now = Counted(
                record,
                shown_state(record, self.vm_states.get(vm, record.state)),
                self.agents.presence(vm),
                self.clocks.get(vm),
                self.clocks.refused(vm),
            )
            self.census.count(vm, host, now)

    def _clock_bound_of(self, set_name: str) -> float | None:
        """By the rollout that tells most about the set, as it stands now."""
        rollout = self.rollouts.of_set(set_name)
        return rollout.policy.clock_bound_s if rollout is not None else None

    def _domain_of(self, frozen: m.VmFrozen) -> int:
        record = self._placed.get(frozen.vm, {}).get(frozen.host)
        return self._by_key(frozen.set, frozen.update_domain, record)

    def _by_key(self, set_name: str, update_domain: int, record: m.VmRecord | None) -> int:
        """The VM's domain by the key of the rollout that holds its set."""
        rollouts = self.rollouts.under_way(set_name)
        if record is not None and any(each.policy.domain_key == "fault_domain" for each in rollouts):
            return record.fault_domain
        return update_domain

    def _since(self, document: m.SetDocument, now_s: float) -> None:
        known = self.events_since.get(document.set, {})
        self.events_since[document.set] = {
            key: known.get(key, now_s) for key in ((each.event_id, each.status) for each in document.events)
        }


def is_last_will(message: m.CoordinatorPresence) -> bool:
    """Whether the broker says it for a coordinator that is gone: no epoch was claimed yet when the will was made."""
    return not message.online and message.epoch == 0
