"""What hosts, agents and other coordinators say about the fleet: folded, checked against the record of owners, passed to the rollouts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime, timedelta

from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import fleet_of
from caesura.fleet.fold import Changes, apply
from caesura.fleet.state import FleetState
from caesura.runtime.logs import get_logger
from caesura.runtime.sampler import Sampler
from caesura_coordinator.dispatcher import RolloutDispatcher
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.leadership import Leadership
from caesura_coordinator.owner_records import OwnerRecords
from caesura_coordinator.owners import Owners
from caesura_coordinator.reconciler import Reconciler
from caesura_coordinator.rollout import RESTART_GRACE_S
from caesura_coordinator.wave_gates import why_outdated

_INCOMPLETE_S = 10.0
"""s: after which a host whose inventory lacks parts is named."""
ABOVE_OURS = (
    "nothing is paused in its sets. Is another coordinator running? If not, restart this one: it claims a higher epoch. If "
    "that does not help, see 'An epoch that nobody claimed' in docs/operate/runbooks/epoch.md"
)
ONE_BROKER_EACH = "nothing is planned on it. Each fleet has a broker of its own; if it is of this one, set the same CAESURA_..._FLEET"
_log = get_logger("caesura.coordinator")


class ObservedFleet:
    """The fold of the bus and the view that decisions read of it; only the event loop changes or reads them."""

    def __init__(self) -> None:
        self.state = FleetState()
        self.incomplete: dict[str, m.HostInventory] = {}
        """Maps a host to its newest inventory, of which parts are missing."""
        self.other_fleets: dict[str, str] = {}
        """Maps a host that says it is of another fleet to that fleet."""
        self.lookup = FleetLookup(self.state, incomplete=self.incomplete, other_fleets=self.other_fleets)

    def reconnected(self, now: datetime) -> None:
        """The broker's retained presences of agents are outdated; each agent reconnects in its own time."""
        self.lookup = self.lookup.with_reconnect_grace(now + timedelta(seconds=RESTART_GRACE_S))


class FleetReceiver:
    """Handlers of the messages about the fleet.

    Args:
        view: what they change.
        owners: which host each VM belongs to.
        owner_records: publishes the owners.
        reconciler: gives new sets their documents.
        dispatcher: evaluates the rollouts of changed sets.
        leadership: our epoch, with which those that hosts obey are compared.
        fleet: our own.
    """

    def __init__(
        self,
        view: ObservedFleet,
        owners: Owners,
        owner_records: OwnerRecords,
        reconciler: Reconciler,
        dispatcher: RolloutDispatcher,
        leadership: Leadership,
        fleet: str,
    ) -> None:
        self._view = view
        self._owners = owners
        self._owner_records = owner_records
        self._reconciler = reconciler
        self._dispatcher = dispatcher
        self._leadership = leadership
        self._fleet = fleet
        self._incomplete_since: dict[str, float] = {}
        self._sampler = Sampler()

    async def on_any(self, received: Received) -> None:
        """A message arrived, in parts or whole: the head of an inventory shows that its parts are under way."""
        inventory = received.message
        if isinstance(inventory, m.HostInventory) and inventory.part_etags:
            # Until it is complete, which it may be at once.
            self._view.incomplete[inventory.host] = inventory
            self._incomplete_since.setdefault(inventory.host, self._loop_s())

    async def on_inventory(self, inventory: m.HostInventory, received: Received) -> None:
        """A whole inventory arrived."""
        self._complete(inventory.host)
        self._note_fleet(inventory.host, fleet_of(received.header.source))
        # The epoch that a host obeys is not a claim: it counts for our next claim, and blocks this host's sets until then.
        before = self._view.state.reported(inventory.host)
        if (
            self._leadership.is_leader
            and inventory.epoch > self._leadership.authority.epoch
            and (before is None or before.epoch != inventory.epoch)
            and (left_out := self._sampler.due(inventory.host)) is not None
        ):
            _log.error(
                "inventory.epoch_above_ours",
                host=inventory.host,
                left_out=left_out,
                epoch=inventory.epoch,
                coordinator=inventory.coordinator,
                ours=self._leadership.authority.epoch,
                advice=ABOVE_OURS,
            )
        if (outdated := why_outdated(inventory)) and (
            before is None or before.commands != inventory.commands
        ):
            _log.error("host.outdated", host=inventory.host, why=outdated)
        self._take_in(self._owners.reported(inventory, self._loop_s()))
        # Storing the document is retried.
        self._reconciler.ensure_documents(self._view.state.sets_of_host(inventory.host))

    async def on_host_removed(self, parameters: Mapping[str, str]) -> None:
        """An operator removed the retained messages of a host: it was taken out of service permanently."""
        host = parameters["host"]
        self._complete(host)
        self._view.other_fleets.pop(host, None)
        if self._view.lookup.is_online(host):
            _log.warning("host.not_forgotten", host=host, why="it is on the bus, and will report again")
            return
        self._take_in(self._owners.forgotten(host, self._loop_s()))
        _log.info("host.forgotten", host=host)

    async def on_host_presence(self, presence: m.HostPresence, _: Received) -> None:
        """A host's presence arrived."""
        self._take_in(self._owners.seen(presence, self._loop_s()))

    async def on_owner(self, owner: m.VmOwner, _: Received) -> None:
        """A record of an owner arrived."""
        self._owners.observed(owner.vm, owner)
        self._owner_records.changed()

    async def on_owner_removed(self, parameters: Mapping[str, str]) -> None:
        """A record of an owner was removed."""
        self._owners.observed(parameters["vm"], None)
        self._owner_records.changed()

    async def on_agent_presence(self, presence: m.AgentPresence, _: Received) -> None:
        """An agent's presence arrived."""
        changes = apply(self._view.state, presence, self._loop_s())[1]
        self._take_in(changes)

    def log_incomplete(self, now_s: float) -> None:
        """Log the hosts whose inventory stays incomplete."""
        for host, since in self._incomplete_since.items():
            if now_s - since > _INCOMPLETE_S and self._sampler.due(f"incomplete {host}") is not None:
                _log.error(
                    "inventory.incomplete",
                    host=host,
                    seconds=round(now_s - since),
                    advice="nothing is paused in its sets, and if it was not known before in none. Its host updater publishes the parts when it connects: restart it",
                )

    def _note_fleet(self, host: str, fleet: str) -> None:
        if fleet in {"", self._fleet}:
            self._view.other_fleets.pop(host, None)
        elif self._view.other_fleets.get(host) != fleet:
            self._view.other_fleets[host] = fleet
            _log.error(
                "host.of_another_fleet", host=host, fleet=fleet, ours=self._fleet, advice=ONE_BROKER_EACH
            )

    def _take_in(self, changes: Changes) -> None:
        """The fleet changed: the sets concerned get their documents, and their rollouts are evaluated again."""
        self._owner_records.changed()
        self._reconciler.ensure_documents(
            name for name in changes.sets if self._view.state.set_index(name).vms
        )
        if changes.sets:
            self._dispatcher.sets_changed(changes.sets)

    def _complete(self, host: str) -> None:
        self._view.incomplete.pop(host, None)
        self._incomplete_since.pop(host, None)

    @staticmethod
    def _loop_s() -> float:
        return asyncio.get_running_loop().time()
