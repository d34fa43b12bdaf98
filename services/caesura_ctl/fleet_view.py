"""The operator's view: the fold of the bus, and the facts that this session received. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.parts import WholeRollout
from caesura.fleet.coordinators import silence_s
from caesura.fleet.fold import apply
from caesura.fleet.retained_messages import Cleared
from caesura.fleet.state import FleetState


class Pause(msgspec.Struct, frozen=True):
    """One finished pause. ``rollout`` is unknown if the start of the operation was not received."""

    vm: str
    host: str
    set: str
    update_domain: int
    operation: str
    pause_s: float
    budget_s: float
    resumed_by: str
    memory: m.MemoryProof | None
    frozen_at: datetime | None
    resumed_at: datetime


class FleetView:
    """The latest state of everything, by name. Repeated messages change nothing."""

    def __init__(self) -> None:
        self.state = FleetState()
        self.rollouts: dict[str, WholeRollout] = {}
        self.events: dict[str, list[m.EventChanged]] = {}
        self.frozen: dict[str, m.VmFrozen] = {}
        self.pauses: dict[tuple[str, str], Pause] = {}
        self.clocks: dict[tuple[str, str], m.VmClockSynced] = {}
        self.reports: dict[str, m.OperationReported] = {}
        self.ready: dict[str, m.VmReady] = {}
        self.operations: dict[str, str] = {}
        """Maps an operation id to its rollout id, from the hosts' reports."""
        self._coordinators_sent: dict[str, datetime] = {}
        """Maps a coordinator to when it sent its last status, by its clock."""
        self._from_start: dict[tuple[str, int], bool] = {}
        """Maps a rollout id and wave to whether the wave had not started when it was first received."""

    @property
    def coordinator(self) -> m.CoordinatorPresence | None:
        """The coordinator that leads, or led last."""
        return self.state.coordinator

    @property
    def coordinators(self) -> Mapping[str, m.CoordinatorStatus]:
        """Maps a coordinator to its status, of those that share a store."""
        return self.state.words.named(m.CoordinatorStatus)

    @property
    def hosts(self) -> Mapping[str, m.HostInventory]:
        """Maps a host to its inventory as published, including VMs that are not its own."""
        return self.state.words.named(m.HostInventory)

    @property
    def agents(self) -> Mapping[str, m.AgentPresence]:
        """Maps a VM to its agent's presence."""
        return self.state.words.named(m.AgentPresence)

    @property
    def publishers(self) -> dict[str, bool]:
        """Maps a metadata publisher to whether it is on the bus."""
        return {name: each.online for name, each in self.state.words.named(m.PublisherPresence).items()}

    @property
    def documents(self) -> Mapping[str, m.SetDocument]:
        """Maps a set to its newest document."""
        return self.state.words.named(m.SetDocument)

    def is_online(self, host: str) -> bool:
        """Whether the host's updater says that it is on the bus; unknown counts as no."""
        return self.state.is_online(host)

    def silence_s(self, coordinator: str) -> float:
        """Seconds for which a coordinator has announced nothing while another did; 0: it may be there."""
        return silence_s(self._coordinators_sent, coordinator)

    def note_sent(self, message: Message, at: datetime) -> None:
        """Take when a message was sent, by the sender's clock."""
        if isinstance(message, m.CoordinatorStatus):
            self._coordinators_sent[message.coordinator] = at

    def fold(self, message: Message | Cleared, now_s: float = 0.0) -> None:
        """Take one message, or the clearing of a topic.

        Args:
            now_s: when it arrived, seconds on a monotonic clock.
        """
        apply(self.state, message, now_s)
        match message:
            case Cleared(kind=m.RolloutState):
                self.rollouts.pop(message.parameters["rollout"], None)
            case WholeRollout():
                self.rollouts[message.rollout] = message
                for wave in message.waves:
                    # The first state counts: a failed wave is pending again after a resume.
                    before = wave.status in {"pending", "scheduled"}
                    self._from_start.setdefault((message.rollout, wave.wave), before)
            case m.EventChanged():
                seen = self.events.setdefault(message.event_id, [])
                if message.status not in {each.status for each in seen}:
                    seen.append(message)
            case m.VmFrozen():
                if (message.operation, message.vm) not in self.pauses:
                    self.frozen[message.vm] = message
            case m.VmResumed():
                self._resumed(message)
            case m.VmClockSynced():
                self.clocks[message.operation, message.vm] = message
            case m.OperationReported():
                self.operations[message.operation] = message.rollout
                self.reports[message.operation] = message
            case m.VmReady():
                self.ready[message.vm] = message
            case _:
                pass

    def _resumed(self, message: m.VmResumed) -> None:
        frozen = self.frozen.get(message.vm)
        same = frozen is not None and frozen.operation == message.operation
        if same:
            del self.frozen[message.vm]
        self.pauses.setdefault(
            (message.operation, message.vm),
            Pause(
                vm=message.vm,
                host=message.host,
                set=message.set,
                update_domain=message.update_domain,
                operation=message.operation,
                pause_s=message.pause_s,
                budget_s=message.budget_s,
                resumed_by=message.resumed_by,
                memory=message.memory,
                frozen_at=frozen.at if frozen is not None and same else None,
                resumed_at=message.at,
            ),
        )

    def latest(self) -> WholeRollout | None:
        """The newest rollout, active ones first, and of these the ones that hold their sets."""
        active = [each for each in self.rollouts.values() if each.status in {"running", "aborting", "halted"}]
        holding = [each for each in active if not each.queued_behind]
        return max(
            holding or active or self.rollouts.values(), key=lambda each: each.created_at, default=None
        )

    def pauses_of(self, rollout: str) -> list[Pause]:
        """Finished pauses of one rollout, as far as this session received them."""
        return [each for each in self.pauses.values() if self.operations.get(each.operation) == rollout]

    def observed_wave(self, rollout: str, wave: int) -> bool:
        """Whether every pause of this wave was received: the wave was known before its start, and nothing was missed since."""
        return self._from_start.get((rollout, wave), False)

    def observed_all(self, rollout: WholeRollout) -> bool:
        """Whether ``pauses_of`` has every pause of this rollout up to now."""
        return len(rollout.waves) == rollout.wave_count and all(
            self.observed_wave(rollout.rollout, each.wave)
            for each in rollout.waves
            if each.status != "pending"
        )

    def missed(self) -> None:
        """The connection was lost for a while: facts published in the meantime are not repeated."""
        self._from_start.clear()
        self.frozen.clear()

    def vm_places(self) -> dict[str, tuple[str, m.VmRecord]]:
        """Maps a VM name to (host, record)."""
        return {vm.vm: (host, vm) for host, inventory in sorted(self.hosts.items()) for vm in inventory.vms}
