"""A rollout of an update that cannot keep memory: domain by domain, VMs shut down, the update runs, they are started again."""

from __future__ import annotations

from typing import Any

from caesura.contract import messages as m
from caesura_ctl.session import new_request_id


async def test_a_rollout_that_may_reboot_restarts_one_domain_after_the_other(pair: Any) -> None:
    sandbox = pair.sandbox
    witness = sandbox.folder / "witness"
    # Which VMs' processes exist while the update runs, as the kernel has it.
    look = (
        f"for f in /proc/[0-9]*/environ; do tr '\\0' '\\n' <$f 2>/dev/null | "
        f"grep -q '^{sandbox.mark}' && tr '\\0' '\\n' <$f 2>/dev/null | grep '^CAESURA_VM='; done | "
        f"sort -u | tr '\\n' ' ' >>{witness}; echo >>{witness}"
    )
    sandbox.update("kernel", ["sh", "-c", look], impact="reboot", timeout_s=60.0, shutdown_s=30.0)
    await sandbox.until(
        lambda: all(
            any(each.update == "kernel" for each in pair.fleet_view.hosts[host].updates)
            for host in ("host-1", "host-2")
        ),
        20,
        "both hosts know the update",
    )
    before = {vm: set(sandbox.vm_pids(vm)) for vm in ("web-1", "web-2")}
    refused = await pair.session.ask(
        m.RolloutRequested(request=new_request_id(), update="kernel", policy=pair.policy())
    )
    assert not refused.accepted
    assert "--allow-reboot" in refused.reason
    state = await pair.ended(
        await pair.roll("kernel", allow_reboot=True, verify_timeout_s=60.0, budget_s=1.0), timeout_s=120.0
    )
    assert state.status == "completed", state.reason
    assert [line.split() for line in witness.read_text().splitlines()] == [
        ["CAESURA_VM=web-2"],
        ["CAESURA_VM=web-1"],
    ], "the VMs that were up during each host's update"
    for vm, pids in before.items():
        assert pids.isdisjoint(sandbox.vm_pids(vm)), f"{vm} was not restarted"
    kinds = {fact.event_type for facts in pair.fleet_view.events.values() for fact in facts}
    assert kinds == {"Reboot"}
    assert sandbox.watch.pauses == []
    pair.assert_one_end_each()
