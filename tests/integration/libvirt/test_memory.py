"""The memory of domains from outside: where it is a file, a pause is shown to have left it as it was."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from caesura.conformance.drivers import freeze_deadline
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_host_updater.drivers.libvirt.guest_memory import memory_of_domain
from caesura_host_updater.drivers.port import DigestCapable, NotPossible
from caesura_testing.libvirt_daemons import URI, LibvirtDaemon
from caesura_testing.patience import patient

pytestmark = pytest.mark.asyncio

_FILE = "<source type='file'/><access mode='shared'/>"
_MEMFD = "<source type='memfd'/><access mode='shared'/>"


def driver_of(daemon: LibvirtDaemon, folder: Path, most: int = 64 << 20) -> LibvirtDriver:
    return LibvirtDriver(LibvirtOptions(uri=URI), (str(daemon.socket),), folder, most)


@pytest.mark.parametrize("memory", [_FILE, _MEMFD])
async def test_memory_in_a_file_is_digested_while_it_is_paused(
    daemon: LibvirtDaemon, tmp_path: Path, memory: str
) -> None:
    daemon.define("web-1", memory=memory)
    driver = driver_of(daemon, tmp_path)
    assert isinstance(driver, DigestCapable)
    await driver.open()
    try:
        can = driver.capabilities("web-1")
        assert can.digests == ("digest_equal", "sampled_digest_equal"), can.no_digest
        await driver.freeze("web-1", freeze_deadline())
        by = time.monotonic() + patient(30)
        first = await driver.memory_digest("web-1", by)
        assert first == await driver.memory_digest("web-1", by)
        sampled = await driver.sampled_digest("web-1", "seed")
        _damage(driver, _first_byte)
        assert await driver.memory_digest("web-1", by) != first
        assert await driver.sampled_digest("web-1", "seed") == sampled, (
            "a byte among 32 MiB is hardly in the sample"
        )
        _damage(driver, _every_page)
        assert await driver.sampled_digest("web-1", "seed") != sampled
    finally:
        await driver.close(stop_vms=False)


def _damage(driver: LibvirtDriver, write: Callable[[int, int], None]) -> None:
    memory = memory_of_domain(driver.resume_plan("web-1"))
    handle = os.open(memory.path, os.O_RDWR)
    try:
        write(handle, memory.size_bytes)
    finally:
        os.close(handle)


def _first_byte(handle: int, _: int) -> None:
    os.pwrite(handle, bytes([os.pread(handle, 1, 0)[0] ^ 1]), 0)


def _every_page(handle: int, size: int) -> None:
    for at in range(0, size, 4096):
        os.pwrite(handle, b"damaged", at)


async def test_memory_that_cannot_be_read_is_named(daemon: LibvirtDaemon, tmp_path: Path) -> None:
    daemon.define("web-1")
    daemon.define("db-1", memory="<source type='file'/>")
    driver = driver_of(daemon, tmp_path)
    await driver.open()
    try:
        for vm, why in (("web-1", "private to its QEMU process"), ("db-1", "mapped privately")):
            can = driver.capabilities(vm)
            assert can.digests == ()
            assert why in can.no_digest
            with pytest.raises(NotPossible, match=why):
                await driver.sampled_digest(vm, "seed")
    finally:
        await driver.close(stop_vms=False)


async def test_memory_above_the_limit_is_sampled_only(daemon: LibvirtDaemon, tmp_path: Path) -> None:
    daemon.define("web-1", memory=_MEMFD)
    driver = driver_of(daemon, tmp_path, most=1 << 20)
    await driver.open()
    try:
        assert driver.capabilities("web-1").digests == ("sampled_digest_equal",)
        with pytest.raises(NotPossible, match="above the limit"):
            await driver.memory_digest("web-1", time.monotonic() + 10)
    finally:
        await driver.close(stop_vms=False)


async def test_a_new_life_has_new_memory(daemon: LibvirtDaemon, tmp_path: Path) -> None:
    daemon.define("web-1", memory=_MEMFD)
    driver = driver_of(daemon, tmp_path)
    await driver.open()
    try:
        before = memory_of_domain(driver.resume_plan("web-1"))
        plan = driver.resume_plan("web-1")
        daemon.virsh("destroy", "web-1")
        assert before.path
        assert memory_of_domain(plan).error, "a process that has ended has none"
    finally:
        await driver.close(stop_vms=False)
