"""One look at the domains of a daemon: which are VMs, how each that runs is resumed, and where its memory is. Blocking."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from caesura_host_updater.drivers.libvirt.connection import LibvirtConnection
from caesura_host_updater.drivers.libvirt.definition import FoundDomain, LibvirtOptions, LibvirtVm, vms_of
from caesura_host_updater.drivers.libvirt.guest_memory import UNLISTED, GuestMemory, memory_of_domain
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
            known = before.memories[vm.name] if unchanged else UNLISTED
            memories[vm.name] = memory_of_domain(plan) if known is UNLISTED else known
    return DomainView(
        version,
        {domain.uuid: domain for domain in domains},
        {vm.name: vm for vm in vms},
        plans,
        memories,
        passed,
    )


def keep_held(view: DomainView, before: DomainView, held: Iterable[str]) -> DomainView:
    """VMs of an operation keep their names and plans until it is over, whatever their domains are called or labelled since.

    They are found by their UUIDs. Another domain that takes the name of one waits.
    """
    kept = {name: before.vms[name] for name in held if name in before.vms}
    uuids = {vm.uuid for vm in kept.values()}
    own = {vm.uuid: name for name, vm in view.vms.items() if vm.uuid in uuids}
    others = [name for name, vm in view.vms.items() if vm.uuid not in uuids and name not in kept]
    vms = {name: view.vms[name] for name in others}
    plans = {name: view.plans[name] for name in others if name in view.plans}
    memories = {name: view.memories[name] for name in others if name in view.memories}
    passed = dict(view.passed)
    for name, vm in kept.items():
        passed.pop(vm.domain_name, None)
        now = own.get(vm.uuid, name)
        vms[name] = view.vms[name] if own.get(vm.uuid) == name else vm
        known = before.plans.get(name)
        plan = (view.plans.get(now) or _lost(known)) if vm.uuid in own else _living(known, view)
        if plan is not None:
            plans[name] = replace(plan, vm=name)
            memories[name] = view.memories.get(now) or before.memories.get(name) or UNLISTED
        usurper = view.vms.get(name)
        if usurper is not None and usurper.uuid != vm.uuid:
            passed[usurper.domain_name] = f"a VM of an operation under way is called {name}"
    return replace(view, vms=vms, plans=plans, memories=memories, passed=passed)


def _lost(plan: LibvirtPlan | None) -> LibvirtPlan | None:
    """The plan of a domain that does not run, as the daemon says, if its process lives: a daemon that was restarted may have lost it."""
    return plan if plan is not None and plan.pid and alive(plan.pid, plan.start_ticks) else None


def _living(plan: LibvirtPlan | None, view: DomainView) -> LibvirtPlan | None:
    """The plan of a domain that is not found as a VM, if it runs; its next life is another one."""
    if plan is None or _lost(plan):
        return plan
    found = view.found.get(plan.uuid)
    if found is None or found.number <= 0:
        return None
    if not plan.pid and plan.number == found.number:
        return plan
    return replace(plan, number=found.number, pid=0, start_ticks=0, qmp=())


def _plan_of(vm: LibvirtVm, number: int, socket: str, uri: str, before: DomainView) -> LibvirtPlan | None:
    """One whose process lives stays as it is: paths and rights may change with a restart of the domain, or another daemon, only."""
    known = before.plans.get(vm.name)
    known_as = None if known is None else (known.uuid, known.number, known.socket)
    if known is None or not known.pid or known_as != (vm.uuid, number, socket):
        return plan_of_domain(vm, number, socket, uri)
    if alive(known.pid, known.start_ticks):
        return known
    found = plan_of_domain(vm, number, socket, uri)  # a daemon that was restarted gives ids again
    return found if found is not None and found.pid else None
