"""What a plan has to know before a host starts another kernel under its VMs. Pure.

Between the jump and the new kernel no code of Caesura exists, so a plan needs a measurement: this host, this kernel, and half as much
again must fit the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from caesura.contract.messages import Policy, Refusal, UpdateRecord
from caesura.lifecycle.kernel_figures import budget_error, newest_figure
from caesura_coordinator.fleet_snapshot import FleetSnapshot

RETURN_S = 600.0
"""s: the most that a plan allows for a host's user space to start after its VMs run again, before the host counts as lost."""


def kernel_refusals(
    fleet: FleetSnapshot, hosts: Sequence[str], record: UpdateRecord, policy: Policy
) -> Iterable[Refusal]:
    """Why a host may not start the update's kernel under its VMs."""
    if record.kernel != "kexec":
        return
    for host in hosts:
        kernel = fleet.inventories[host].kernel
        release = _release_on(fleet, host, record)
        if kernel is None or not kernel.kexec:
            why = "starts no kernel under its VMs: `caesura host prepare-kexec` there, then `[kernel] kexec = true` in its host file"
            yield Refusal(subject=host, code="kernel_not_ready", reason=why)
            continue
        for problem in kernel.problems:
            yield Refusal(subject=host, code="kernel_not_ready", reason=problem)
        figure = newest_figure(kernel.figures, release)
        if figure is None:
            why = (
                f"nothing was measured for kernel {release}: `caesura host rehearse-kexec {release}` there, while it holds no VM, "
                "says how long its VMs would be paused"
            )
            yield Refusal(subject=host, code="kernel_unmeasured", reason=why)
        elif why := budget_error(figure, policy.budget_s):
            yield Refusal(subject=host, code="budget_too_short", reason=why)


def expected_jump_s(fleet: FleetSnapshot, hosts: Iterable[str], record: UpdateRecord) -> float:
    """The longest measured pause of these hosts, seconds; 0: none was measured."""
    kernels = ((fleet.inventories[host].kernel, _release_on(fleet, host, record)) for host in hosts)
    figures = (newest_figure(kernel.figures, release) for kernel, release in kernels if kernel is not None)
    return max((each.seconds for each in figures if each is not None), default=0.0)


def _release_on(fleet: FleetSnapshot, host: str, record: UpdateRecord) -> str:
    """Hosts of other hardware may define the update with another kernel."""
    own = (each for each in fleet.inventories[host].updates if each.update == record.update)
    return next((each.kernel_release for each in own), record.kernel_release)
