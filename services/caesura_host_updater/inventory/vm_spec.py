"""What the host file says of a VM, whatever its driver. Each driver adds its own keys in a subclass."""

from __future__ import annotations

import msgspec

from caesura.contract.messages import FaultDomain, UpdateDomain
from caesura.contract.names import own_set
from caesura_host_updater.inventory.vm_details_table import VmDetailsTable


class VmSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One VM as the operator wrote it: the keys that all drivers have in common."""

    name: str
    set: str = ""
    """Empty: in no set; the VM is a set of its own."""
    update_domain: UpdateDomain | None = None
    fault_domain: FaultDomain = 0
    agent: bool = True
    """Whether an agent is expected to answer in it."""
    details: VmDetailsTable | None = None
    """What its workloads read about it in the instance metadata."""

    @property
    def set_name(self) -> str:
        """The set, or the one that the VM is by itself."""
        return self.set or own_set(self.name)

    @property
    def domain(self) -> int:
        """The update domain; 0 for a VM in no set."""
        return self.update_domain or 0
