"""``caesura doctor --measure``: a real guest is booted, paused in every way, and nothing of it is left whatever ends the command."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from caesura.runtime.identity import new_id
from caesura.runtime.processes import kill_marked, marked_processes
from caesura_testing.guests import GuestUnavailable, image, qemu_installed
from caesura_testing.patience import patient

_WORDS = ("-m", "caesura_ctl", "doctor", "--measure", "--accel", "tcg", "--memory", "192", "--json")


@pytest.fixture(scope="session", autouse=True)
def guest() -> None:
    if not qemu_installed():
        pytest.skip("QEMU is not installed")
    try:
        image()
    except GuestUnavailable as error:
        pytest.skip(str(error))


class Doctor:
    """The command, everything that it started (its QEMU inherits the mark), and the folders of its guest."""

    def __init__(self, process: asyncio.subprocess.Process, mark: str) -> None:
        self.process = process
        self._mark = mark
        self._folders: set[Path] = set()

    async def until_guest(self) -> None:
        """Wait until its QEMU runs."""
        async with asyncio.timeout(patient(60)):
            while not self._qemu():
                assert self.process.returncode is None, "it ended without a guest"
                await asyncio.sleep(0.02)

    def _qemu(self) -> bool:
        for pid in marked_processes(self._mark):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
                self._folders |= {Path(each) for each in re.findall(r"/[a-z/]+/caesura-doctor-\w+", words)}
        return len(self._folders) == 2

    def is_clean(self) -> bool:
        """Whether neither a process nor a folder is left."""
        return not any(marked_processes(self._mark)) and not any(each.exists() for each in self._folders)

    async def until_clean(self) -> None:
        """Wait for that: a killed one is cleaned up after by another process."""
        async with asyncio.timeout(patient(60)):
            while not self.is_clean():  # noqa: ASYNC110 - processes that are nobody's child here
                await asyncio.sleep(0.02)


@asynccontextmanager
async def started(*words: str) -> AsyncIterator[Doctor]:
    mark = f"CAESURA_TEST_DOCTOR={new_id()}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *_WORDS, *words),
        env={**os.environ, **dict([mark.split("=", 1)])},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Doctor(process, mark)
    finally:
        await kill_marked(mark)
        await process.wait()


async def test_figures_of_this_host() -> None:
    async with started("--runs", "2") as doctor:
        await doctor.until_guest()
        output, errors = await doctor.process.communicate()
        assert doctor.process.returncode == 0, errors.decode()
        assert doctor.is_clean()
    answer = json.loads(output)
    assert answer["healthy"]
    figures = answer["figures"]
    assert (figures["accelerator"], figures["memory_mib"]) == ("tcg", 192)
    assert figures["pauses"] == figures["pauses_unharmed"] == 6
    assert figures["pattern_bytes"] > 20 << 20
    assert [each["method"] for each in figures["methods"]] == ["freeze", "swap", "replace"]
    for each in figures["methods"]:
        assert each["runs"] == 2
        assert 0 < each["pause_least_s"] <= each["pause_median_s"] <= each["pause_most_s"]
    assert figures["methods"][0]["ratio"] == 1.0
    assert "run 2 of 2" in errors.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupt_leaves_nothing(number: signal.Signals) -> None:
    async with started("--runs", "1000") as doctor:
        await doctor.until_guest()
        doctor.process.send_signal(number)
        _, errors = await doctor.process.communicate()
        assert doctor.process.returncode == 130, errors.decode()
        assert b"Traceback" not in errors
        assert doctor.is_clean(), "at once"


async def test_a_measurement_that_is_killed_leaves_nothing_after_a_while() -> None:
    async with started("--runs", "1000") as doctor:
        await doctor.until_guest()
        doctor.process.kill()
        await doctor.process.wait()
        await doctor.until_clean()
