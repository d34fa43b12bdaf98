"""The current state, for the metrics: hosts, VMs, agents, documents, rollouts, last clock verdicts. A view of ``StateFold``. Pure.

The content of inventories is read from the fold; facts, which arrive sooner, are overlaid here and only here. State folds by
overwriting, so a repeated message is harmless. Nothing expires: a host that died must be visible as dead until somebody
removes its retained messages from the broker. The time since it was last received is shown instead.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.topics import match_topic
from caesura.fleet.coordinators import announced_coordinators
from caesura.fleet.fold import Changes
from caesura_metrics_exporter.metrics.agents import Agents
from caesura_metrics_exporter.metrics.census import Census, Counted, shown_state
from caesura_metrics_exporter.metrics.guest_clocks import GuestClocks
from caesura_metrics_exporter.metrics.pauses import Pauses
from caesura_metrics_exporter.rollout_index import RolloutIndex
from caesura_metrics_exporter.state_fold import FoldResult, StateFold

_SET_KEPT_S = 900.0
"""s: the alerts' look-back window."""


class HostState(msgspec.Struct, frozen=True):
    """One host, as it was last received."""

    received_s: float
    """When it last sent a message itself, seconds on the exporter's monotonic clock."""
    inventory: m.HostInventory | None
    """Its inventory with only the VMs that belong to it."""
    online: bool


class FleetMetricsView:
    """The current state, as far as it was received.

    Args:
        folded: a fold that the caller updates, passing each step; without it this view folds by itself.
    """

    def __init__(self, folded: StateFold | None = None) -> None:
        self._folded = folded if folded is not None else StateFold()
        self._state = self._folded.state
        self.vm_states: dict[str, m.VmState] = {}
        """Maps a VM to its state if a fact arrived after its host's last inventory, since the fact is newer."""
        self.agents = Agents()
        self.coordinator_received_s: float | None = None
        """When the leading coordinator last announced itself, seconds on the exporter's monotonic clock."""
        self.clocks = GuestClocks()
        self.pauses = Pauses()
        self.census = Census()
        self._received: dict[str, float] = {}
        """Maps a host to when it last sent a message itself; its keys are the known hosts."""
        self._unplaced: set[str] = set()
        """VMs that no longer belong to a host, but that one may still name: they are moving, or contested."""
        self._left: dict[str, float] = {}
        """Maps a set to when its last VM was removed, seconds on the exporter's monotonic clock."""
        self._left_first: list[tuple[float, str]] = []
        """The same as a heap, which may contain entries that are no longer in ``_left``."""
        self.events_since: dict[str, dict[tuple[str, str], float]] = {}
        """Maps a set to (event, status) to when that was first seen, seconds on the exporter's monotonic clock."""

    @property
    def hosts(self) -> Mapping[str, HostState]:
        """Maps a host to its state: a view, not a copy."""
        return _Hosts(self._folded, self._received)

    @property
    def rollouts(self) -> RolloutIndex:
        """Complete rollouts, by set."""
        return self._folded.rollouts

    def coordinators(self, now_s: float) -> Mapping[str, m.CoordinatorStatus]:
        """Maps a coordinator to its status, of those that share a store and are announced at ``now_s``."""
        return announced_coordinators(self._state, now_s)

    @property
    def shares_store(self) -> bool:
        """Whether the coordinators share a store, or did."""
        return bool(self._state.words.named(m.CoordinatorStatus))

    @property
    def coordinator(self) -> m.CoordinatorPresence | None:
        """The coordinator that leads, or led last."""
        return self._state.coordinator

    @property
    def publishers(self) -> dict[str, bool]:
        """Maps a metadata publisher to whether it is on the bus."""
        return {name: each.online for name, each in self._state.words.named(m.PublisherPresence).items()}

    @property
    def documents(self) -> Mapping[str, m.SetDocument]:
        """Maps a set to its newest document."""
        return self._state.words.named(m.SetDocument)

    def take(
        self,
        message: Message,
        now_s: float,
        *,
        fresh: bool,
        stored: bool = False,
        step: FoldResult | None = None,
    ) -> None:
        """Follow one message.

        Args:
            message: the message.
            now_s: when it was received, seconds on the exporter's monotonic clock.
            fresh: false for a repetition: then only state is updated, facts are ignored.
            stored: the message was retained, so it does not show that its sender is alive.
            step: the changes, if the caller has folded the message.
        """
        step = step if step is not None else self._folded.take(message, now_s)
        match message:
            case m.HostInventory():
                self._inventory(message.host, step.changes, now_s, stored=stored)
            case m.SetDocument() if step.changes.word:
                self._since(message, now_s)
            case m.HostPresence():
                self._receive(message.host, now_s, alive=message.online and not stored)
            case m.AgentPresence():
                self.agents.take(message.vm, online=message.online, now_s=now_s, stored=stored)
                self._recount(message.vm)
            case m.CoordinatorPresence():
                self._coordinator(message, now_s, stored=stored)
            case m.VmOwner():
                self._moved(step.changes, now_s)
            case m.VmFrozen() if fresh:
                self.vm_states[message.vm] = "paused"
                domain = self._domain_of(message.vm, message.set, message.update_domain)
                self.pauses.froze(message, domain, now_s)
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

    def clear(self, topic: str, now_s: float = 0.0, step: FoldResult | None = None) -> None:
        """A retained message was removed: its subject no longer exists. ``now_s`` and ``step`` as in ``take``."""
        place = match_topic(topic)
        if place is None:
            return
        step = step if step is not None else self._folded.clear(topic, now_s)
        channel, named = place
        if channel.message is m.HostInventory:
            self.forget_host(named["host"], step)
        elif channel.message is m.HostPresence:
            if named["host"] in self._received and self._state.reported(named["host"]) is None:
                self.forget_host(named["host"], step)
        elif channel.message is m.AgentPresence:
            self.agents.forget(named["vm"])
            self._recount(named["vm"])
        elif channel.message is m.VmOwner:
            self._moved(step.changes, now_s)
        elif channel.message is m.SetDocument:
            self.events_since.pop(named["set"], None)

    def settle(self, now_s: float) -> None:
        """Advance the time; call it before the current state is read."""
        for vm in self.agents.settle(now_s):
            self._recount(vm)
        for vm in [each for each in self._unplaced if not self._state.ownership.namers(each)]:
            self._forget_vm(vm)

    def forget_host(self, host: str, step: FoldResult | None = None) -> None:
        """Drop a host and its VMs. ``step`` as in ``take``."""
        step = step if step is not None else self._folded.take_back(m.HostInventory, {"host": host}, 0.0)
        self._moved(step.changes, self._received.pop(host, 0.0))
        self.pauses.forget_host(host)

    def forget_empty_sets(self, now_s: float) -> list[str]:
        """The sets that have had no VM for long; drops their state.

        A VM in no set is a set of its own: many short-lived ones would leave series behind indefinitely. Not at once, since a
        moving VM is absent for a moment.
        """
        gone: set[str] = set()
        while self._left_first and now_s - self._left_first[0][0] > _SET_KEPT_S:
            since_s, name = heapq.heappop(self._left_first)
            if self._left.get(name) != since_s:
                continue  # it became empty again, later
            del self._left[name]
            if name not in self._state.sets():
                gone.add(name)
        for name in gone:
            self.pauses.forget_set(name)
        return sorted(gone)

    def budget_of(self, set_name: str) -> float:
        """Seconds that a pause of the set may last, if its rollout is known; else the maximum for any pause."""
        rollouts = self.rollouts.under_way(set_name)
        return max((each.policy.budget_s for each in rollouts), default=m.MAX_BUDGET_S)

    def _receive(self, host: str, now_s: float, *, alive: bool) -> None:
        if alive:
            self._received[host] = now_s
        else:
            self._received.setdefault(host, now_s)

    def _coordinator(self, message: m.CoordinatorPresence, now_s: float, *, stored: bool) -> None:
        leads = self.coordinator is message and message.online
        if leads and (self.coordinator_received_s is None or not stored):
            self.coordinator_received_s = now_s

    def _inventory(self, host: str, changes: Changes, now_s: float, *, stored: bool) -> None:
        self._receive(host, now_s, alive=not stored)
        self._moved(changes, now_s, said_by=host)
        inventory = self._state.inventory(host)
        for record in inventory.vms if inventory is not None else ():
            self._believe(record, host, now_s)

    def _moved(self, changes: Changes, now_s: float, said_by: str = "") -> None:
        """Update the VMs whose state changed.

        Args:
            said_by: the host whose inventory caused it: its VMs are updated separately.
        """
        for vm in changes.vms:
            located, before = self._state.vm(vm), changes.before.get(vm)
            if located is None:
                self._displace(vm)
            elif located.host != said_by and (before is None or before.host != located.host):
                self._unplaced.discard(vm)
                self._believe(located.record, located.host, self._received.get(located.host, now_s))
            else:
                self._unplaced.discard(vm)
        for name in {each.record.set for each in changes.before.values()}:
            if name not in self._state.sets():
                self._left[name] = now_s
                heapq.heappush(self._left_first, (now_s, name))

    def _believe(self, record: m.VmRecord, host: str, now_s: float) -> None:
        """Apply the host's report about its VM, unless a received fact is newer."""
        if record.state == "paused":
            domain = self._domain_of(record.vm, record.set, record.update_domain)
            self.pauses.found(record, host, domain, now_s)
            self.vm_states.pop(record.vm, None)
        else:
            inventory = self._state.reported(host)
            under_way = inventory is not None and bool(inventory.operation)
            if self.pauses.runs(record.vm, under_way=under_way):
                self.vm_states.pop(record.vm, None)
            else:
                self.vm_states[record.vm] = "paused"
        self._recount(record.vm)

    def _displace(self, vm: str) -> None:
        """The VM does not belong to a host now, so no report on its pause would count."""
        self.census.count(vm, None)
        self.vm_states.pop(vm, None)
        self.pauses.forget_vm(vm)
        if self._state.ownership.namers(vm):
            self._unplaced.add(vm)
        else:
            self._forget_vm(vm)

    def _forget_vm(self, vm: str) -> None:
        """No host names it any more: a later VM of this name is a different one."""
        self._unplaced.discard(vm)
        self.clocks.forget_vm(vm)
        self.agents.forget(vm)

    def _recount(self, vm: str) -> None:
        """Something about the VM may have changed."""
        located = self._state.vm(vm)
        if located is None:
            return
        record = located.record
        now = Counted(
            record,
            shown_state(record, self.vm_states.get(vm, record.state)),
            self.agents.presence(vm),
            self.clocks.get(vm),
            self.clocks.refused(vm),
        )
        self.census.count(vm, now)

    def _clock_bound_of(self, set_name: str) -> float | None:
        """By the most relevant rollout of the set at this time."""
        rollout = self.rollouts.of_set(set_name)
        return rollout.policy.clock_bound_s if rollout is not None else None

    def _domain_of(self, vm: str, set_name: str, update_domain: int) -> int:
        """The VM's domain by the key of the rollout that holds its set."""
        holder, located = self.rollouts.holder(set_name), self._state.vm(vm)
        if located is not None and holder is not None and holder.policy.domain_key == "fault_domain":
            return located.record.fault_domain
        return update_domain

    def _since(self, document: m.SetDocument, now_s: float) -> None:
        known = self.events_since.get(document.set, {})
        self.events_since[document.set] = {
            key: known.get(key, now_s) for key in ((each.event_id, each.status) for each in document.events)
        }


class _Hosts(Mapping[str, HostState]):
    """A view."""

    def __init__(self, folded: StateFold, received: Mapping[str, float]) -> None:
        self._state = folded.state
        self._received = received

    def __getitem__(self, host: str) -> HostState:
        return HostState(self._received[host], self._state.inventory(host), self._state.is_online(host))

    def __iter__(self) -> Iterator[str]:
        return iter(self._received)

    def __len__(self) -> int:
        return len(self._received)
