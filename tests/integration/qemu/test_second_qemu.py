"""The second QEMU version boots the same guest on the same machine type; the trial boot is one of a real kernel."""

from __future__ import annotations

import asyncio

import pytest

from caesura_host_updater.drivers.qemu.accel import probe_command, try_boot
from caesura_testing.guests import QEMU, Definition, boot, image, qemu_installed, second_qemu

pytestmark = pytest.mark.skipif(not qemu_installed(), reason="qemu-system-x86_64 is not installed")


async def test_the_guest_boots_under_the_second_version() -> None:
    second = await asyncio.to_thread(second_qemu)
    if second.binary is None:
        pytest.skip(f"no second QEMU: {second.reason}")
    assert second.version.startswith("10.")
    async with boot(
        Definition(binary=second.binary, machine="pc-q35-7.2", memory_mib=160, run=("memory",))
    ) as guest:
        assert (await guest.verify_memory())["ok"]
        version = (await guest.execute("query-version"))["qemu"]
        assert ".".join(str(version[key]) for key in ("major", "minor", "micro")) == second.version


async def test_a_real_kernel_comes_to_the_end_of_the_trial_boot() -> None:
    files = await asyncio.to_thread(image)
    assert await try_boot(probe_command(QEMU, "tcg", "qemu64", files.kernel)) == ""
