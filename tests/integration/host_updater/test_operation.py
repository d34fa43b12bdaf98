"""One host updater with real VMs over a real broker: what an operation does when all goes well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from caesura.contract.messages import VmFrozen, VmResumed
from caesura_testing.patience import patient


async def test_update_runs_while_every_vm_stands_still(
    hosts: Callable[..., Any], fleet: Any, freezer: str
) -> None:
    host = hosts(freezer=freezer)
    for name in ("a", "b", "c"):
        host.add_vm(name, ram=4096)
    host.add_update("patch", "import time; time.sleep(0.5); print('patched')")
    await host.start()
    command = await host.freeze(update="patch")
    await host.until("a", "frozen")
    report = await fleet.report(command.operation)
    assert report.status == "completed", report
    assert report.update is not None
    assert (report.update.outcome, report.update.output_tail.strip()) == ("succeeded", "patched")
    assert {vm.vm for vm in report.vms} == {"a", "b", "c"}
    for vm in report.vms:
        assert 0.5 <= vm.pause_s < patient(3)
        assert (vm.resumed_by, vm.frozen, vm.state) == ("updater", True, "running")
        assert vm.memory is not None
        assert (vm.memory.proof, vm.memory.ok) == ("digest", True)
        assert host.kernel(vm.vm) == "running"
    assert len(fleet.ear.all(VmFrozen)) == 3
    for name in ("a", "b", "c"):
        fact = await fleet.ear.one(VmResumed, lambda m, name=name: m.vm == name)
        assert fact.within_budget
