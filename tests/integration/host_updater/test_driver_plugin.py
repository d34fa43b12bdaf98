"""A driver that somebody else wrote, in a real host updater: installed as a package, and its VMs resumed by the guard alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from caesura.contract.messages import HostInventory, OperationReported
from caesura_testing.patience import patient
from caesura_testing.plugins import install_driver
from caesura_vmcontrol.process_control import find_by_env, kill_and_wait
from caesura_vmcontrol.resume_plans import SignalPlan
from caesura_vmcontrol.vm_control import condition

TARGET = "caesura_testing.example_driver:ExamplePlugin"


@pytest.fixture
async def host(
    hosts: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    """A host of the example driver with two VMs."""
    monkeypatch.setenv("PYTHONPATH", str(install_driver(tmp_path / "plugins", "example", TARGET)))
    made = hosts()
    for name in ("a", "b"):
        made.add_vm(name)

    def write_host_file() -> Path:
        lines = [f'host = "{made.name}"', 'driver = "example"']
        for vm in made.vms:
            lines += ["[[vm]]", f'name = "{vm["name"]}"', 'set = "web"', "update_domain = 0", "agent = false"]
            lines += ["[vm.example]", f"argv = {json.dumps([sys.executable, '-S', '-c', vm['code']])}"]
        path: Path = made.folder / "host.toml"
        path.write_text("\n".join(lines))
        return path

    made._write_host_file = write_host_file
    made.plan = lambda vm: plan_of(made, vm)
    yield made
    if made.process is not None and made.process.returncode is None:
        await made.kill()
    for vm in made.vms:
        for process in find_by_env(f"EXAMPLE_DRIVER_VM={made.state_dir / vm['name']}"):
            kill_and_wait(process.pid, process.start_ticks, time.monotonic() + patient(10))


def plan_of(host: Any, vm: str) -> SignalPlan:
    """As the kernel knows the VM."""
    found = find_by_env(f"EXAMPLE_DRIVER_VM={host.state_dir / vm}")
    (leader,) = (each for each in found if each.pid == each.session)
    return SignalPlan(vm, leader.pid, leader.start_ticks)


async def test_a_freeze_and_what_the_inventory_says(host: Any) -> None:
    await host.start()
    inventory = host.fleet.last(HostInventory)
    assert (inventory.driver, inventory.driver_detail) == ("example", "stopped by signals")
    command = await host.freeze(hold_s=0.2)
    report: OperationReported = await host.fleet.report(command.operation)
    assert (report.status, report.reason) == ("completed", "")
    assert {host.kernel(vm) for vm in ("a", "b")} == {"running"}
    refused = await host.freeze(method="swap", hold_s=0.0)
    report = await host.fleet.report(refused.operation)
    assert report.status == "refused"
    assert "nothing that could take a program over" in report.reason


async def test_the_guard_resumes_its_vms_when_the_updater_is_killed(host: Any) -> None:
    await host.start()
    before = {vm: host.plan(vm) for vm in ("a", "b")}
    await host.freeze(hold_s=6.0)
    for vm in before:
        await host.until(vm, "frozen")
    os.kill(host.pid, signal.SIGKILL)
    await host.process.wait()
    for vm, plan in before.items():
        await host.until(vm, "running")
        assert condition(plan) == "running"  # the same process, and no other one in its place
    await host.start()
    assert {vm: host.plan(vm) for vm in before} == before


ODD = """
from caesura_testing.example_driver import ExampleDriver, ExamplePlugin

class OddDriver(ExampleDriver):
    def resume_plan(self, vm):
        super().resume_plan(vm)
        return ("http", "/run/odd.sock")

class OddPlugin(ExamplePlugin):
    async def build(self, setup):
        return OddDriver(setup)

class ClearlyOddPlugin(ExamplePlugin):
    mechanisms = frozenset(["http"])
"""


@pytest.mark.parametrize(
    ("plugin", "why", "started"),
    [
        (
            "ClearlyOddPlugin",
            "the driver 'example' of caesura-driver-example cannot be used: it has VMs resumed by 'http'",
            False,
        ),
        ("OddPlugin", "the driver 'example' cannot be used: VM a: the example driver would have it", True),
    ],
)
async def test_a_driver_whose_vms_the_guard_could_not_resume_ends_the_updater_and_no_vm(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str, why: str, started: bool
) -> None:
    folder = install_driver(tmp_path / "odd", "example", f"odd_driver:{plugin}")
    (folder / "odd_driver.py").write_text(ODD)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    await host.launch()
    async with asyncio.timeout(patient(30)):
        assert await host.process.wait() == 2
    assert why in (host.folder / "updater.log").read_text()
    assert not host.fleet.ear.all(HostInventory)  # no coordinator could have asked it for a pause
    if started:
        assert {host.kernel(vm) for vm in ("a", "b")} == {"running"}
    else:
        assert not find_by_env(f"EXAMPLE_DRIVER_VM={host.state_dir / 'a'}")
