"""A host updater is replaced by another version in the middle of a pause: the VM runs again in its budget, and the report says by whom."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from caesura_testing.sandbox import Vm

_BUDGET_S = 12.0
_HOLD_S = 8.0


@pytest.fixture
def host(mixed: Callable[..., Any]) -> Any:
    """One host with one VM, not started."""
    return mixed(host_1=[Vm(name="web-1", set="web", agent=False, run_agent=False)])


@pytest.mark.parametrize("order", ["other, then this", "this, then other"])
@pytest.mark.parametrize("guard", ["runs", "is late", "died"])
async def test_a_pause_of_one_version_ends_under_the_next(
    host: Any, other: Any, this: Any, order: str, guard: str
) -> None:
    before, after = (other, this) if order.startswith("other") else (this, other)
    await host.up("host-1", before)
    operation = await host.hold(before, hold_s=_HOLD_S, budget_s=_BUDGET_S)
    await host.frozen("web-1")
    await host.journalled("host-1", operation)
    armed = host.sandbox.guard_pid("host-1")
    if guard != "runs":
        os.kill(armed, signal.SIGSTOP)  # it does not see the end of its updater
    await host.sandbox.kill("host-1")
    if guard == "died":
        os.kill(armed, signal.SIGKILL)
    if guard != "runs":
        assert host.sandbox.watch.frozen() == {"web-1"}, "nobody has resumed it"
    await host.start("host-1", after)
    await host.running()
    os.kill(armed, signal.SIGCONT) if guard == "is late" else None
    refused = after is other and await host.refused_store("host-1", operation)
    if refused:
        # Set back over a journal that it does not know: the VM runs, the unit stays down, and the newer version has the report.
        after = this
        await host.start("host-1", after)
    report = await host.report(operation)
    assert report["status"] == "failed"
    assert report["reason"]
    (vm,) = report["vms"]
    assert vm["frozen"] is True
    assert vm["state"] == "running"
    assert vm["resumed_by"] in ({"guard"} if guard == "runs" else {"updater", "guard"})
    if after is this:
        assert {"updater_died", "guard_acted"} & set(report["codes"])
    assert host.sandbox.watch.longest_s() < _BUDGET_S
    await host.until(
        lambda: host.inventory()["guard"] == "ready" and not host.inventory()["operation"], "idle again"
    )
    if guard == "is late" and not refused:  # alone for too long, it may have ended
        assert host.sandbox.guard_pid("host-1") == armed, "the guard of the version before is still at work"

    # Both work together from now on: a guard that was started by one version is armed and disarmed by the other.
    again = await host.hold(after, hold_s=0.5, budget_s=_BUDGET_S)
    assert (await host.report(again))["status"] == "completed"
    await host.running()
    assert len(host.sandbox.watch.of("web-1")) == 2
