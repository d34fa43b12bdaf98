"""A pause that QEMU does not carry out while its host's storage hangs, and carries out when that is back: it is undone, by whoever runs then."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from caesura_host_updater.drivers import remote_pauses
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions
from caesura_host_updater.drivers.libvirt.driver import LibvirtDriver
from caesura_host_updater.drivers.port import FreezeFailed
from caesura_testing.libvirt_daemons import URI, LibvirtDaemon
from caesura_testing.libvirt_witness import Witness
from caesura_testing.patience import patient

pytestmark = pytest.mark.asyncio


def _driver(daemon: LibvirtDaemon, folder: Path) -> LibvirtDriver:
    return LibvirtDriver(LibvirtOptions(uri=URI), (str(daemon.socket),), folder)


@contextmanager
def _hung(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def _opened(daemon: LibvirtDaemon, folder: Path) -> AsyncIterator[LibvirtDriver]:
    driver = _driver(daemon, folder)
    await driver.open()
    try:
        yield driver
    finally:
        await driver.close(stop_vms=False)


async def _until(wanted: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(patient(30)):
            while not wanted():  # noqa: ASYNC110 - a daemon that does not call us
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(what) from None


async def _freeze_unanswered(driver: LibvirtDriver) -> None:
    """The daemon waits for QEMU."""
    with pytest.raises(FreezeFailed, match="if it is paused later it is resumed at once"):
        await driver.freeze("web-1", time.monotonic() + 1)


def _is_noted(folder: Path) -> bool:
    return (folder / "vms" / "web-1.late").exists()


@pytest.mark.parametrize("life", ["the same", "the next"])
async def test_storage_that_is_back_after_all_patience(
    daemon: LibvirtDaemon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    life: str,
) -> None:
    """Whether the pause can still come is asked again and again: at no time is it assumed that it cannot."""
    monkeypatch.setattr(remote_pauses, "_LATE_S", 0.0)
    monkeypatch.setattr(remote_pauses, "_ASK_AGAIN_S", 0.0)
    daemon.define("web-1")
    witness = Witness(daemon)
    driver = _driver(daemon, tmp_path)
    await driver.open()
    try:
        with _hung(daemon.pid("web-1")):
            await _freeze_unanswered(driver)
            await _until(lambda: _is_noted(tmp_path), "it is not noted")
            if life == "the next":
                await driver.close(stop_vms=False)
                driver = _driver(daemon, tmp_path)
                await driver.open()
            for _ in range(2):
                await driver._late.undo()
            assert _is_noted(tmp_path)
        await _until(lambda: not _is_noted(tmp_path), "nothing is undone")
        await _until(lambda: bool(witness.pauses), "it was not paused")
    finally:
        witness.close()
        await driver.close(stop_vms=False)
    assert daemon.state("web-1") == "running"


async def test_an_operators_pause_after_that_is_his(daemon: LibvirtDaemon, tmp_path: Path) -> None:
    daemon.define("web-1")
    async with _opened(daemon, tmp_path) as driver:
        with _hung(daemon.pid("web-1")):
            await _freeze_unanswered(driver)
        await _until(lambda: "web-1" not in driver._late, "it is not undone")
        assert daemon.state("web-1") == "running"
        await asyncio.to_thread(daemon.virsh, "suspend", "web-1")
        await driver._late.undo()
        assert daemon.state("web-1") == "paused"
