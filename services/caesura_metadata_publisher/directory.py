"""The VMs and their sets' documents: the publisher's view of the fold of the bus. Pure.

A document is only ever replaced by a newer one: what a workload was shown never goes back,
whatever a broker or a coordinator restored from an old copy.
"""

from __future__ import annotations

from caesura.contract.envelope import Message
from caesura.contract.messages import SetDocument, VmDetails
from caesura.fleet.fold import Changes, apply
from caesura.fleet.retained_messages import Cleared
from caesura.fleet.state import FleetState, LocatedVm


class Directory:
    """VMs by name, documents by set."""

    def __init__(self) -> None:
        self._state = FleetState()

    def take(self, message: Message | Cleared, now_s: float) -> Changes:
        """A message arrived, or a topic was cleared; returns what changed.

        A document that is cleared is still shown: there is nothing to answer in its place.

        Args:
            now_s: seconds on a monotonic clock.
        """
        if isinstance(message, Cleared) and message.kind is SetDocument:
            return Changes()
        _, changes = apply(self._state, message, now_s)
        return changes

    def vm(self, name: str) -> LocatedVm | None:
        """The VM of this name, None if the host that it belongs to has not published it."""
        return self._state.vm(name)

    def details(self, located: LocatedVm) -> VmDetails | None:
        """What the host file of the VM's host says of it, None if nothing."""
        return self._state.words.get(VmDetails, located.host, located.record.vm)

    def foreign_hosts(self, name: str) -> tuple[str, ...]:
        """Hosts that name the VM and do not have it."""
        return self._state.ownership.rivals(name)

    def document(self, set_name: str) -> SetDocument | None:
        """The newest document of a set, None if none was received."""
        return self._state.words.get(SetDocument, set_name)
