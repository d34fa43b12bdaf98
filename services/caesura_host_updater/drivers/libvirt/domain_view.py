"""One look at the domains of a daemon: which are VMs, how each that runs is resumed, and where its memory is. Blocking."""

from __future__ import annotations

from dataclasses import dataclass, field

from caesura_host_updater.drivers.libvirt.connection import LibvirtConnection
from caesura_host_updater.drivers.libvirt.definition import FoundDomain, LibvirtOptions, LibvirtVm, vms_of
from caesura_host_updater.drivers.libvirt.guest_memory import GuestMemory, memory_of_domain
from caesura_host_updater.drivers.libvirt.resume_paths import plan_of_domain
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.procfs import alive


@dataclass(frozen=True)
class DomainView:
    """What one look found.

    Args:
        version: of the daemon.
        found: all domains by UUID.
        vms: by name.
        plans: of those that run, paused or not.
        memories: of the same.
        passed: domains that cannot be VMs, and why.
    """

    version: str = ""
    found: dict[str, FoundDomain] = field(default_factory=dict)
    vms: dict[str, LibvirtVm] = field(default_factory=dict)
    plans: dict[str, LibvirtPlan] = field(default_factory=dict)
    memories: dict[str, GuestMemory] = field(default_factory=dict)
    passed: dict[str, str] = field(default_factory=dict)


def look_at_domains(
    connection: LibvirtConnection, options: LibvirtOptions, socket: str, before: DomainView
) -> DomainView:
    """All of them. ``before``: the last look; what cannot have changed is taken from it. Raises NoBinding, LibvirtError."""
    version = before.version or connection.version()
    domains = connection.domains()
    vms, passed = vms_of(domains, options.domains)
    numbers = {domain.uuid: domain.number for domain in domains if domain.number > 0}
    plans, memories = {}, {}
    for vm in vms:
        number = numbers.get(vm.uuid)
        plan = None if number is None else _plan_of(vm, number, socket, options.uri, before)
        if plan is not None:
            plans[vm.name] = plan
            unchanged = plan.pid and plan == before.plans.get(vm.name)
            memories[vm.name] = before.memories[vm.name] if unchanged else memory_of_domain(plan)
    return DomainView(
        version,
        {domain.uuid: domain for domain in domains},
        {vm.name: vm for vm in vms},
        plans,
        memories,
        passed,
    )


def _plan_of(vm: LibvirtVm, number: int, socket: str, uri: str, before: DomainView) -> LibvirtPlan | None:
    """One whose process lives stays as it is: paths and rights may change with a restart of the domain only."""
    known = before.plans.get(vm.name)
    if known is None or not known.pid or (known.uuid, known.number) != (vm.uuid, number):
        return plan_of_domain(vm, number, socket, uri)
    if alive(known.pid, known.start_ticks):
        return known
    found = plan_of_domain(vm, number, socket, uri)  # a daemon that was restarted gives ids again
    return found if found is not None and found.pid else None
