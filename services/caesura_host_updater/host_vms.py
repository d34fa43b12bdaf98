"""The VMs of this host as they are now: those of the host file, or those that a driver finds and loses while it is open. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from caesura_host_updater.inventory.vm_spec import VmSpec


class HostVms:
    """See the module. One object for all who need to know."""

    def __init__(self, specs: Iterable[VmSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}

    def __contains__(self, vm: object) -> bool:
        return vm in self._specs

    def __iter__(self) -> Iterator[VmSpec]:
        return iter(tuple(self._specs.values()))

    def get(self, vm: str) -> VmSpec | None:
        """The VM of that name."""
        return self._specs.get(vm)

    def has_agent(self, vm: str) -> bool:
        """Whether an agent is expected to answer in it; also of a VM that is not here any more: it may have had one."""
        spec = self._specs.get(vm)
        return spec is None or spec.agent

    def replace(self, specs: Iterable[VmSpec]) -> frozenset[str]:
        """These are the VMs from now on; the names of those that were and are not any more."""
        before = frozenset(self._specs)
        self._specs = {spec.name: spec for spec in specs}
        return before - self._specs.keys()
