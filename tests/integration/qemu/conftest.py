"""QEMU drivers on folders of their own, and QEMUs that misbehave."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers.qemu.definition import Adopt, Definition, QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.driver import QemuDriver
from caesura_testing.guests import qemu_installed
from caesura_testing.patience import patient
from caesura_vmcontrol.procfs import alive, process_table, read_process

_WRAPPER = """#!/usr/bin/python3 -SE
import os, sys
words = sys.argv[1:]
if "--version" not in words:
    {change}
os.execv({binary!r}, [{binary!r}, *words])
"""


_HANGS_S = 60.0


class Rig:
    """One host: its folder, and one driver after the other on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver: QemuDriver | None = None
        self.qemu = shutil.which("qemu-system-x86_64") or ""

    def build(self, vms: dict[str, Definition | Adopt | None], **options: Any) -> QemuDriver:
        """A driver that is not open yet."""
        specs = tuple(
            QemuVm(
                name=name,
                qemu=what if isinstance(what, Definition) else None,
                adopt=what if isinstance(what, Adopt) else None,
            )
            for name, what in vms.items()
        )
        given: dict[str, Any] = {
            "run_dir": str(self.folder / "run"),
            "powerdown_s": 0,
            "start_timeout_s": 20.0,
        } | options
        return QemuDriver(
            "host-1",
            specs,
            QemuOptions(**given),
            self.folder / "state",
            accel="tcg,thread=multi",
            environ=os.environ,
            max_digest_bytes=2**30,
        )

    async def open(self, vms: dict[str, Definition | Adopt | None], **options: Any) -> QemuDriver:
        """The next life. The one before is dead: it closes its connections, and that is all it does."""
        if self.driver is not None:
            await self.crash()
        self.driver = self.build(vms, **options)
        await self.driver.open()
        return self.driver

    async def crash(self) -> None:
        """What the kernel does for a host updater that was killed."""
        driver = self.driver
        assert driver is not None
        for guest in driver._guests.values():
            if guest.prepared is not None and guest.prepared.qmp is not None:
                await guest.prepared.qmp.close()
            if guest.prepared is not None and guest.prepared.watch is not None:
                guest.prepared.watch.close()
            guest.prepared = None
        await driver.close(stop_vms=False)
        self.driver = None

    def run_file(self, vm: str) -> str:
        """Its content."""
        return (self.folder / "state" / "vms" / f"{vm}.qemu.json").read_text()

    def wrapper(self, change: str, name: str = "qemu-wrapped") -> str:
        """A QEMU whose command line is changed by Python code on the list ``words``."""
        path = self.folder / name
        path.write_text(_WRAPPER.format(change=change, binary=self.qemu))
        path.chmod(0o700)
        return str(path)

    def script(self, text: str, name: str = "script") -> str:
        """A shell script."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o700)
        return str(path)

    def processes(self) -> list[int]:
        """Every living QEMU that has to do with this folder."""
        found = []
        for pid, process in process_table().items():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                if (
                    str(self.folder).encode() in words
                    and b"memory-backend" in words
                    and process.state not in "ZX"
                ):
                    found.append(pid)
        return found

    async def only(self, pid: int) -> None:
        """Wait until one process is left: nobody runs a guest twice."""
        await until(lambda: self.processes() == [pid], f"{pid} alone, not {self.processes()}")

    def place(self, name: str | Path) -> Path:
        """A folder for somebody else's sockets."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder

    def start(self, argv: list[str], log: Path) -> subprocess.Popen[bytes]:
        """A process of somebody else's."""
        with log.open("wb") as file:
            return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def ram_files(self, vm: str) -> list[Path]:
        """The RAM files of our VM of this name."""
        assert self.driver is not None
        return list(self.driver._supervisor._launcher.ram_dir.glob(f"{vm}.ram"))

    def disk(self, name: str, *, size: str = "8M") -> Path:
        """A new qcow2 image."""
        path = self.folder / name
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), size], check=True)
        return path

    @staticmethod
    def check_disk(path: Path) -> str:
        """What `qemu-img check` says; it must be content."""
        done = subprocess.run(["qemu-img", "check", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done
        return done.stdout

    async def end(self) -> None:
        """Stop everything; nothing may be left but logs."""
        if self.driver is not None:
            for vm in self.driver.states():
                await self.driver.release(vm)
            await self.driver.close(stop_vms=True)
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert left == []
        files = list((self.folder / "run").rglob("*"))
        assert files == []


def pid_of(driver: QemuDriver, vm: str) -> int:
    """The process that runs the guest."""
    run = driver._guests[vm].run
    assert run is not None
    return run.pid


def next_pid(driver: QemuDriver, vm: str) -> int:
    """The process that a swap has prepared."""
    prepared = driver._guests[vm].prepared
    assert prepared is not None
    pid: int = prepared.plan.new.pid  # type: ignore[union-attr]
    return pid


def soon() -> float:
    """A generous instant."""
    return time.monotonic() + 10


async def until(holds: Callable[[], bool], what: str, timeout_s: float = 10) -> None:
    """Wait for something that announces itself to nobody."""
    try:
        async with asyncio.timeout(patient(timeout_s)):
            while not holds():  # noqa: ASYNC110 - the kernel does not call us
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


def runs(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    process = read_process(pid)
    return process is not None and alive(pid, process.start_ticks)


class HungDisk:
    """A file system of its own whose writes do not return while it is frozen (ioctl FIFREEZE)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def hangs(self) -> Iterator[None]:
        """Every write to it hangs in here, and is done afterwards; a test that waits for one fails after a minute."""
        subprocess.run(["fsfreeze", "--freeze", self.folder], check=True)
        limit = subprocess.Popen(
            ["sh", "-c", f"sleep {patient(_HANGS_S)}; exec fsfreeze --unfreeze {self.folder}"],
            start_new_session=True,
        )
        try:
            yield
            assert limit.poll() is None, "something waited for the disk"
        finally:
            if limit.poll() is None:
                os.killpg(limit.pid, signal.SIGKILL)
                subprocess.run(["fsfreeze", "--unfreeze", self.folder], check=True)
            limit.wait()


class Tools:
    """What the tests share; fixtures are how a conftest is shared."""

    pid_of = staticmethod(pid_of)
    next_pid = staticmethod(next_pid)
    soon = staticmethod(soon)
    until = staticmethod(until)
    runs = staticmethod(runs)


@pytest.fixture
def tools() -> type[Tools]:
    """See the class."""
    return Tools


@pytest.fixture(scope="session", autouse=True)
def no_stray_loop() -> None:
    """On Python 3.11 pytest-asyncio asks for the current loop, which makes one that nobody closes."""
    asyncio.set_event_loop(None)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """A host. Its folder has a short name: a unix socket's path has 107 bytes."""
    if not qemu_installed():
        pytest.skip("no QEMU on this machine")
    with tempfile.TemporaryDirectory(prefix="cq-", dir="/tmp") as folder:
        rig = Rig(Path(folder))
        yield rig
        await rig.end()


@pytest.fixture
def hung_disk() -> Iterator[HungDisk]:
    """A disk in a file; needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    with tempfile.TemporaryDirectory(prefix="ch-", dir="/tmp") as folder:
        image, place = Path(folder, "image"), Path(folder, "disk")
        place.mkdir()
        with image.open("wb") as file:
            file.truncate(32 << 20)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
        try:
            yield HungDisk(place)
        finally:
            subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A tmpfs of 8 MiB with a short name; needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    with tempfile.TemporaryDirectory(prefix="cs-", dir="/tmp") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
        yield Path(folder)
        subprocess.run(["umount", "-l", folder], check=True)
