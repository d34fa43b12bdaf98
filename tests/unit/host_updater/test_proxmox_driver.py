"""The Proxmox driver where no QEMU is needed; with one: tests/integration/proxmox."""

from __future__ import annotations

import time

import pytest

from caesura_host_updater.drivers.port import FreezeFailed, NotRunningYet
from caesura_host_updater.drivers.proxmox import driver as module
from caesura_host_updater.drivers.proxmox.definition import ProxmoxOptions, ProxmoxVm
from caesura_host_updater.drivers.proxmox.driver import ProxmoxDriver
from caesura_host_updater.drivers.proxmox.monitor import GuestState
from caesura_vmcontrol.qemu_plans import QemuPlan, Vmm
from caesura_vmcontrol.qmp import QmpNoAnswer

_VM = "vm-100"
_PLAN = QemuPlan(_VM, Vmm(2, 1, "/none/100.qmp"))
_SPEC = ProxmoxVm(name=_VM, vmid=100)


@pytest.fixture
def driver() -> ProxmoxDriver:
    return ProxmoxDriver(ProxmoxOptions(config_dir="/none", run_dir="/none"))


def _saying(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    """What QEMU says of its guest; empty: nothing, for it serves another client."""

    def ask(*_: object, agent: bool = False) -> GuestState:
        if not status:
            raise QmpNoAnswer("QEMU hangs, or serves another client")
        return GuestState(status)

    monkeypatch.setattr(module, "ask_state", ask)


@pytest.mark.parametrize(
    ("status", "why"), [("", "nothing was done to it"), ("save-vm", "snapshot"), ("paused", "not by Caesura")]
)
def test_a_vm_that_was_not_touched_is_left_and_not_waited_for(
    driver: ProxmoxDriver, monkeypatch: pytest.MonkeyPatch, status: str, why: str
) -> None:
    """Its freeze was refused: a client that stays at its socket must not keep the operation from ending."""
    _saying(monkeypatch, status)
    driver._untouched.add(_VM)
    end, why_left = driver._resume(_PLAN, _SPEC, time.monotonic())
    assert end == "left"
    assert why in why_left


@pytest.mark.parametrize("status", ["", "save-vm"])
def test_a_vm_that_we_paused_is_waited_for(
    driver: ProxmoxDriver, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    _saying(monkeypatch, status)
    with pytest.raises(NotRunningYet):
        driver._resume(_PLAN, _SPEC, time.monotonic())


async def test_a_vm_that_does_not_run_is_not_touched(driver: ProxmoxDriver) -> None:
    with pytest.raises(FreezeFailed, match="is not running") as raised:
        await driver.freeze(_VM, time.monotonic())
    assert raised.value.untouched


async def test_a_qemu_that_is_busy_for_a_moment_is_not_unknown(
    driver: ProxmoxDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that came in that moment was refused, and the rollout halted. The freeze asks it again, and waits for it."""
    driver._vms, driver._plans, driver._error = {_VM: _SPEC}, {_VM: _PLAN}, ""
    monkeypatch.setattr(module, "alive", lambda *_: True)
    monkeypatch.setattr(module, "is_held", lambda _: False)
    monkeypatch.setattr(module, "_KNOWN_S", 0.0)
    _saying(monkeypatch, "running")
    assert await driver.read_states() == {_VM: "running"}
    _saying(monkeypatch, "")
    assert await driver.read_states() == {_VM: "running"}
    assert "freeze" in driver.capabilities(_VM).methods
    monkeypatch.setattr(module, "_BUSY_S", 0.0)
    assert await driver.read_states() == {_VM: "unknown"}
    _saying(monkeypatch, "running")
    await driver.read_states()
    monkeypatch.setattr(module, "_BUSY_S", 60.0)
    driver._held.pausing(_VM, _PLAN)
    _saying(monkeypatch, "")
    assert await driver.read_states() == {_VM: "unknown"}, "of an operation: it may be paused by now"
    await driver.close(stop_vms=False)


def test_the_plan_says_that_another_client_may_keep_it_paused(driver: ProxmoxDriver) -> None:
    assert "one client at a time" in driver.capabilities(_VM).pause_risk
