"""Who the VMs are and what their sets' documents say: the fold of everything heard on the bus. Pure.

A document is only ever replaced by one with a higher incarnation: what a workload was shown never goes back,
whatever a broker or a coordinator restored from an old copy.
"""

from __future__ import annotations

import msgspec

from caesura.contract.messages import HostInventory, SetDocument, VmRecord


class Placed(msgspec.Struct, frozen=True):
    """A VM and the host that has it."""

    record: VmRecord
    host: str


class Directory:
    """VMs by name, documents by set."""

    def __init__(self) -> None:
        self._vms: dict[str, Placed] = {}
        self._documents: dict[str, SetDocument] = {}

    def take_inventory(self, inventory: HostInventory) -> None:
        """A host says what it has. A VM that two hosts claim belongs to the one that spoke last."""
        mine = {record.vm for record in inventory.vms}
        gone = [vm for vm, placed in self._vms.items() if placed.host == inventory.host and vm not in mine]
        for vm in gone:
            del self._vms[vm]
        for record in inventory.vms:
            self._vms[record.vm] = Placed(record, inventory.host)

    def take_document(self, document: SetDocument) -> bool:
        """A set's document arrived; whether it was kept (false: known already, or older than what was shown)."""
        known = self._documents.get(document.set)
        if known is not None and document.incarnation <= known.incarnation:
            return False
        self._documents[document.set] = document
        return True

    def vm(self, name: str) -> Placed | None:
        """The VM of this name, None if no host has spoken of it."""
        return self._vms.get(name)

    def document(self, set_name: str) -> SetDocument | None:
        """The newest document of a set, None if none was heard."""
        return self._documents.get(set_name)
