"""Boots our small guest on this host, and measures how long each method pauses it and how right its clock is afterwards.

The guest is run by the driver ``qemu``, as a host updater has it, in folders of its own: no host updater, no pause guard and no VM of the
host has to do with it. Whatever ends the measurement ends the guest: the driver at the end and on Ctrl-C, a sweeper if this process is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from caesura.runtime.cleanup import shielded
from caesura.runtime.errors import CaesuraError
from caesura.runtime.identity import new_id
from caesura_demo.sweeper import start_sweeper
from caesura_doctor.figures import METHODS, Figures, MeasuredMethod, PauseSample, figures_of
from caesura_doctor.measure_checks import RAM_DIR, MeasuredHost
from caesura_host_updater.drivers.port import DriverError
from caesura_host_updater.drivers.qemu.accel import Accelerator, find_accelerator
from caesura_host_updater.drivers.qemu.definition import Definition, QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.driver import QemuDriver

_VM = "measured"
_CPU = "qemu64"
_MARK = "CAESURA_DOCTOR_RUN"
_BOOT_S = 300.0  # s: a guest is up within seconds; emulated on a busy machine, within a minute
_START_S = 60.0
_PAUSE_S = 60.0  # s: for one pause, which takes milliseconds
_MEMORY_S = 300.0
_AGAIN_S = 0.2
_PATTERN_PERCENT = 50
_ACCELERATORS = {"kvm": "kvm", "tcg": "tcg,thread=multi"}

Say = Callable[[str], None]
AcceleratorChoice = Literal["auto", "kvm", "tcg"]


class MeasurementFailed(CaesuraError):
    """The guest did not come up, or a pause of it failed; the text says which."""


async def choose_accelerator(choice: AcceleratorChoice, host: MeasuredHost) -> Accelerator:
    """KVM if a kernel boots with it, else TCG and why; seconds where it must be tried."""
    if choice != "auto":
        return Accelerator(choice, "as --accel says")
    return await find_accelerator(host.binary, cpu=_CPU, kernel=host.image.kernel)


async def measure(
    host: MeasuredHost, accelerator: Accelerator, *, memory_mib: int, runs: int, say: Say
) -> Figures:
    """``runs`` pauses of each method, by turns.

    Raises:
        MeasurementFailed: with what had to do with it; nothing is left.
    """
    async with _folders() as (folder, ram_dir, environ):
        guest = _Guest(host, accelerator, memory_mib, folder, ram_dir, environ)
        say(f"booting a guest of {memory_mib} MiB with {accelerator.name}")
        try:
            async with guest.running() as boot_s:
                samples = []
                for number in range(1, runs + 1):
                    done = [await guest.pause(method, f"run-{number}-{method}") for method in METHODS]
                    samples += done
                    told = ", ".join(f"{each.method} {each.pause_s * 1000:.1f} ms" for each in done)
                    say(f"run {number} of {runs}: {told}")
                return Figures(
                    qemu=host.version,
                    accelerator=accelerator.name,
                    accelerator_reason=accelerator.reason,
                    memory_mib=memory_mib,
                    boot_s=boot_s,
                    pattern_bytes=guest.pattern_bytes,
                    pauses=len(samples),
                    pauses_unharmed=sum(each.memory_equal for each in samples),
                    methods=figures_of(samples),
                )
        except (DriverError, OSError, TimeoutError) as error:
            raise MeasurementFailed(
                f"{error or 'the guest did not answer in time'}{guest.last_words()}"
            ) from error


@asynccontextmanager
async def _folders() -> AsyncIterator[tuple[Path, Path, Mapping[str, str]]]:
    """One with a short path for sockets, one for the guest's RAM, and the environment that marks its processes."""
    run = new_id()
    sweeper = await start_sweeper(f"{_MARK}={run}", ())
    made: list[Path] = []
    try:
        for base in ("/tmp", RAM_DIR):  # noqa: S108 - private folders with short paths, which unix sockets need
            made.append(Path(tempfile.mkdtemp(prefix="caesura-doctor-", dir=base)))
            sweeper.remember(made[-1])
        yield made[0], made[1], {**os.environ, _MARK: run}
    finally:
        for each in made:
            shutil.rmtree(each, ignore_errors=True)
        await shielded(sweeper.dismiss())


class _Guest:
    """The guest and the driver that has it."""

    def __init__(
        self,
        host: MeasuredHost,
        accelerator: Accelerator,
        memory_mib: int,
        folder: Path,
        ram_dir: Path,
        environ: Mapping[str, str],
    ) -> None:
        self.pattern_bytes = 0
        self._folder = folder
        self._memory_socket = folder / "run" / _VM / "memory"
        self._boot_id = ""
        words = ["console=ttyS0", "quiet", "rdinit=/init", "panic=-1", "caesura.ip=none"]
        words += ["caesura.run=memory", f"caesura.memory={_PATTERN_PERCENT}"]
        definition = Definition(
            memory_mib=memory_mib,
            machine=host.machine,
            cpu=_CPU,
            kernel=host.image.kernel,
            initrd=host.image.initrd,
            append=" ".join(words),
            extra=(
                *("-device", "virtio-serial-pci,id=measured"),
                *("-chardev", f"socket,id=pattern,path={self._memory_socket},server=on,wait=off"),
                *("-device", "virtserialport,bus=measured.0,chardev=pattern,name=org.caesura.memory.0"),
            ),
        )
        self._driver = QemuDriver(
            "doctor",
            (QemuVm(name=_VM, qemu=definition),),
            QemuOptions(
                binary=host.binary,
                run_dir=str(folder / "run"),
                ram_dir=str(ram_dir),
                powerdown_s=0.0,  # there is nothing in it to be saved
                start_timeout_s=_START_S,
            ),
            folder / "state",
            accel=_ACCELERATORS[accelerator.name],
            environ=environ,
            max_digest_bytes=0,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[float]:
        """Up: its agent answers, its pattern is written, its clock is set. Yields how long it took until the first."""
        began = time.monotonic()
        try:
            await self._driver.open()
            if why := self._driver.ping():
                raise DriverError(_VM, why)
            async with asyncio.timeout(_BOOT_S):
                self._boot_id = await self._until_up()
            boot_s = time.monotonic() - began
            self.pattern_bytes = int((await self._ask_memory("verify"))["bytes"])
            await self._driver.sync_clock(_VM)  # a guest boots up to a second off: its RTC has whole seconds
            yield boot_s
        finally:
            await shielded(self._driver.close(stop_vms=True))

    async def _until_up(self) -> str:
        while True:
            try:
                return await self._driver.guest_boot_id(_VM)
            except DriverError:
                if self._driver.states()[_VM] != "running":
                    raise
            await asyncio.sleep(_AGAIN_S)  # the guest's kernel does not tell when its agent has begun

    async def pause(self, method: MeasuredMethod, operation: str) -> PauseSample:
        """One pause, and what there is to see of it afterwards. Raises DriverError."""
        driver = self._driver
        await driver.prepare(_VM, operation, method, "")
        try:
            began = time.monotonic()
            by = began + _PAUSE_S
            if method == "swap":
                done = await driver.hand_over(_VM, by)
                pause_s = done.resumed_at - done.called_at
            else:
                if method == "freeze":
                    await driver.freeze(_VM, by)
                else:
                    await driver.checkpoint(_VM, by, gone=False)
                if await driver.resume(_VM, _PAUSE_S) != "running":
                    raise DriverError(_VM, f"it does not run after a {method}: {driver.health_error(_VM)}")
                pause_s = time.monotonic() - began
        finally:
            await driver.release(_VM)
        asked = time.monotonic()
        clock = await driver.sync_clock(_VM)
        took_s = time.monotonic() - asked
        unharmed = (await self._ask_memory("verify"))["ok"] is True
        return PauseSample(
            method=method,
            pause_s=pause_s,
            clock_before_s=clock.before_s,
            clock_after_s=clock.after_s,
            clock_took_s=took_s,
            memory_equal=unharmed and await driver.guest_boot_id(_VM) == self._boot_id,
        )

    async def _ask_memory(self, request: str) -> dict[str, Any]:
        """The answer of the guest's workload ``memory``, which begins to listen when its pattern is written."""
        async with asyncio.timeout(_MEMORY_S):
            reader, writer = await asyncio.open_unix_connection(str(self._memory_socket))
            try:
                writer.write(f"{request}\n".encode())
                answer: dict[str, Any] = json.loads(await reader.readline())
                return answer
            finally:
                writer.close()

    def last_words(self) -> str:
        """Of the guest's console, for the text of a failure."""
        with suppress(OSError, StopIteration, IndexError):
            file = next((self._folder / "state").rglob("*serial*"))
            return f" (the last line of its console: {file.read_text(errors='replace').splitlines()[-1].strip()})"
        return ""
