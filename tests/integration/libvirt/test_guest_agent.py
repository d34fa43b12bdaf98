"""A guest with qemu-guest-agent, whose port libvirt has: its clock after a pause, and which boot it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from caesura.conformance.drivers import freeze_deadline
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_host_updater.drivers.port import DriverError, NotPossible
from caesura_testing.guests import image
from caesura_testing.libvirt_daemons import URI, LibvirtDaemon
from caesura_testing.patience import patient

pytestmark = pytest.mark.asyncio


async def test_clock_and_boot_id(daemon: LibvirtDaemon, tmp_path: Path) -> None:
    files = await asyncio.to_thread(image)
    append = "console=ttyS0 quiet rdinit=/init panic=-1 caesura.ip=none caesura.run=heartbeat"
    await asyncio.to_thread(daemon.define_guest, "web-1", files.kernel, files.initrd, append)
    driver = LibvirtDriver(LibvirtOptions(uri=URI), (str(daemon.socket),), tmp_path)
    await driver.open()
    try:
        assert driver.capabilities("web-1").clock == "none", "its agent has not opened its port yet"
        with pytest.raises(NotPossible, match="no guest agent"):
            await driver.sync_clock("web-1")
        async with asyncio.timeout(patient(90)):
            while driver.capabilities("web-1").clock == "none":  # by libvirt's event
                await driver.changed()
        boot_id = await _boot_id(driver)
        await driver.freeze("web-1", freeze_deadline())
        await asyncio.sleep(1)
        with pytest.raises(DriverError):
            await driver.guest_boot_id("web-1")
        assert await driver.resume("web-1", patient(5)) == "running"
        assert driver.capabilities("web-1").clock == "system"
        clock = await driver.sync_clock("web-1")
        assert clock.before_s < -0.8
        assert abs(clock.after_s) < 0.1 + clock.uncertainty_s
        assert await _boot_id(driver) == boot_id
    finally:
        await driver.close(stop_vms=False)


async def _boot_id(driver: LibvirtDriver) -> str:
    async with asyncio.timeout(patient(30)):
        while True:
            try:
                return await driver.guest_boot_id("web-1")
            except DriverError:
                await asyncio.sleep(0.2)
