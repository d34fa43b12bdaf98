"""Who the VMs are and what their sets' documents say: the fold of everything heard on the bus. Pure.

A document is only ever replaced by a newer one: what a workload was shown never goes back,
whatever a broker or a coordinator restored from an old copy.
"""

from __future__ import annotations

import msgspec

from caesura.contract.messages import HostInventory, SetDocument, VmRecord
from caesura.lifecycle.document import version_of
from caesura.lifecycle.ownership import Ownership


class Placed(msgspec.Struct, frozen=True):
    """A VM and the host that has it."""

    record: VmRecord
    host: str


class Directory:
    """VMs by name, documents by set."""

    def __init__(self) -> None:
        self._ownership = Ownership()
        self._documents: dict[str, SetDocument] = {}

    def take_inventory(self, inventory: HostInventory) -> None:
        """A host says what it has; its word counts about its own VMs only."""
        self._ownership.take_inventory(inventory)

    def forget_host(self, host: str) -> None:
        """The host was removed for good."""
        self._ownership.forget_host(host)

    def take_owner(self, vm: str, host: str | None) -> None:
        """The coordinator says whose a VM is: a host's, nobody's (empty), or that there is no record (None)."""
        self._ownership.take_record(vm, host)

    def take_document(self, document: SetDocument) -> bool:
        """A set's document arrived; whether it was kept (false: known already, or older than what was shown)."""
        known = self._documents.get(document.set)
        if known is not None and version_of(document) <= version_of(known):
            return False
        self._documents[document.set] = document
        return True

    def vm(self, name: str) -> Placed | None:
        """The VM of this name, None if the host that it belongs to has not spoken of it."""
        host = self._ownership.owner_of(name)
        if not self._ownership.names(host, name):
            return None
        return Placed(self._ownership.described(host, name), host)

    def foreign_hosts(self, name: str) -> tuple[str, ...]:
        """Hosts that name the VM and do not have it."""
        return self._ownership.rivals(name)

    def document(self, set_name: str) -> SetDocument | None:
        """The newest document of a set, None if none was heard."""
        return self._documents.get(set_name)
