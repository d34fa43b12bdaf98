"""A guest with qemu-guest-agent, by Proxmox's socket for it: its clock after a pause, and which boot it is."""

from __future__ import annotations

import asyncio

import pytest

from caesura.conformance.drivers import freeze_deadline
from caesura_host_updater.drivers.port import DriverError
from caesura_host_updater.drivers.proxmox.definition import ProxmoxOptions
from caesura_host_updater.drivers.proxmox.driver import ProxmoxDriver
from caesura_testing.guests import image
from caesura_testing.patience import patient
from caesura_testing.proxmox_node import ProxmoxNode

pytestmark = pytest.mark.asyncio


async def test_clock_and_boot_id(node: ProxmoxNode) -> None:
    files = await asyncio.to_thread(image)
    node.config(100, agent="enabled=1,fstrim_cloned_disks=1", memory=128)
    append = "console=ttyS0 quiet rdinit=/init panic=-1 caesura.run=heartbeat"
    node.start(100, "-kernel", files.kernel, "-initrd", files.initrd, "-append", append, memory=128)
    driver = ProxmoxDriver(ProxmoxOptions(config_dir=str(node.config_dir), run_dir=str(node.run_dir)))
    await driver.open()
    try:
        async with asyncio.timeout(patient(90)):
            while driver.capabilities("vm-100").clock == "none":
                await asyncio.sleep(0.2)
                await driver.read_states()
        boot_id = await _boot_id(driver)
        await driver.freeze("vm-100", freeze_deadline())
        await asyncio.sleep(1)
        assert await driver.resume("vm-100", 5) == "running"
        assert driver.capabilities("vm-100").clock == "system"
        clock = await driver.sync_clock("vm-100")
        assert clock.before_s < -0.8
        assert abs(clock.after_s) < 0.1 + clock.uncertainty_s
        assert await _boot_id(driver) == boot_id
    finally:
        await driver.close(stop_vms=False)


async def _boot_id(driver: ProxmoxDriver) -> str:
    async with asyncio.timeout(patient(30)):
        while True:
            try:
                return await driver.guest_boot_id("vm-100")
            except DriverError:
                await asyncio.sleep(0.2)
