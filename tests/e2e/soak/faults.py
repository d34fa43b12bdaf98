"""The faults that are put into a pause, each undone by its own ``undo``: see ``test_fault_in_each_pause``."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from caesura.bus.local_broker import LocalBroker

Act = Callable[[], Awaitable[None]]
"""One fault; ``undo`` brings back what an operator or a service manager would."""


class Pipe:
    """A named pipe that a service writes its output to, and that can be filled to the brim."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path, 0o600)
        self._handle = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def fill(self) -> None:
        """From now on whoever writes to it waits."""
        with suppress(BlockingIOError):
            while True:
                os.write(self._handle, b"." * 65536)
        with suppress(BlockingIOError):
            while True:
                os.write(self._handle, b".")

    def drain(self) -> None:
        """Read what is in it: who waited continues."""
        with suppress(BlockingIOError):
            while os.read(self._handle, 1 << 20):
                pass

    def close(self) -> None:
        """Writers get an error from now on."""
        os.close(self._handle)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A small tmpfs at ``folder`` for the time of the block; needs root."""
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)  # services may still have files open


class Faults:
    """See the module.

    Args:
        disk: the host whose state folder is a small disk of its own; empty: none.
        pipes: service to the pipe that its output goes to.
    """

    def __init__(self, stage: Any, broker: LocalBroker, *, disk: str, pipes: dict[str, Pipe]) -> None:
        self.sandbox = stage.sandbox
        self._broker = broker
        self._disk = disk
        self._pipes = pipes
        self._stopped: list[int] = []
        self._fifo: Path | None = None

    def kinds(self) -> dict[str, tuple[str, Callable[[str], Awaitable[None]]]]:
        """Name to the update that is rolled out and the fault, which is given the host with the pause."""
        kinds: dict[str, tuple[str, Callable[[str], Awaitable[None]]]] = {
            "updater killed": ("patch", self._kill_updater),
            "updater stopped": ("patch", self._stop_updater),
            "guard killed": ("patch", self._kill_guard),
            "guard stopped": ("patch", self._stop_guard),
            "updater and guard killed": ("patch", self._kill_both),
            "update hangs": ("hangs", self._nothing),
            "update ignores SIGTERM": ("ignores", self._nothing),
            "broker killed": ("patch", self._kill_broker),
            "broker stopped": ("patch", self._stop_broker),
            "agent killed": ("patch", self._kill_agent),
            "coordinator killed": ("patch", self._kill_coordinator),
            "VM killed": ("patch", self._kill_vm),
            "a FIFO in updates.d": ("patch", self._fifo_in_updates),
            "updater's output is a full pipe": ("patch", self._fill_updaters_pipe),
            "guard's output is a full pipe, and the updater is killed": ("patch", self._fill_guards_pipe),
        }
        if self._disk:
            kinds["disk full"] = ("patch", self._fill_disk)
        return kinds

    def host_of(self, kind: str, chosen: str, piped: str) -> str:
        """The host that this kind of fault needs, else the chosen one."""
        return self._disk if kind == "disk full" else piped if "pipe" in kind else chosen

    async def undo(self) -> None:
        """What was stopped continues, what is full is emptied, what ended is started again."""
        for pid in self._stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()
        if self._fifo is not None:
            self._fifo.unlink()
            self._fifo = None
        for pipe in self._pipes.values():
            pipe.drain()
        if self._disk:
            (self.sandbox.folder / self._disk / "ballast").unlink(missing_ok=True)
        if self._broker.pid is None:
            await self._broker.start()
        for name, process in list(self.sandbox.running.items()):
            if process.returncode is not None:
                await self.sandbox.start(name)

    # -- the faults --

    async def _nothing(self, _: str) -> None:
        """The update itself is the fault."""

    async def _kill_updater(self, host: str) -> None:
        await self.sandbox.kill(host)

    async def _stop_updater(self, host: str) -> None:
        self._stop(self.sandbox.running[host].pid)

    async def _kill_guard(self, host: str) -> None:
        if f"{host}-guard" in self.sandbox.running:
            await self.sandbox.kill(f"{host}-guard")  # and wait: `undo` starts only what has ended
            return
        with suppress(LookupError):
            os.kill(self.sandbox.guard_pid(host), signal.SIGKILL)

    async def _stop_guard(self, host: str) -> None:
        with suppress(LookupError):
            self._stop(self.sandbox.guard_pid(host))

    async def _kill_both(self, host: str) -> None:
        self.sandbox.signal(host, signal.SIGSTOP)  # so that it starts no other guard in between
        await self._kill_guard(host)
        await self.sandbox.kill(host)
        await self.undo()  # nobody is left who could resume: a service manager restarts them at once

    async def _kill_broker(self, _: str) -> None:
        await self._broker.kill()

    async def _stop_broker(self, _: str) -> None:
        assert self._broker.pid is not None
        self._stop(self._broker.pid)

    async def _kill_agent(self, host: str) -> None:
        for pid in self._vm_pids(host):
            if b"caesura_vm_agent" in _words(pid):
                os.kill(pid, signal.SIGKILL)

    async def _kill_vm(self, host: str) -> None:
        for pid in self._vm_pids(host)[:1]:
            os.kill(pid, signal.SIGKILL)

    async def _kill_coordinator(self, _: str) -> None:
        await self.sandbox.kill("coordinator")

    async def _fifo_in_updates(self, _: str) -> None:
        self._fifo = self.sandbox.folder / "updates.d" / "hung.toml"
        os.mkfifo(self._fifo)  # a reader waits for a writer that never comes, as on a hung NFS mount

    async def _fill_updaters_pipe(self, host: str) -> None:
        self._pipes[host].fill()

    async def _fill_guards_pipe(self, host: str) -> None:
        self._pipes[f"{host}-guard"].fill()
        await self.sandbox.kill(host)

    async def _fill_disk(self, host: str) -> None:
        handle = os.open(self.sandbox.folder / host / "ballast", os.O_WRONLY | os.O_CREAT)
        try:
            while True:
                os.write(handle, b"." * 4096)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(handle)

    def _stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self._stopped.append(pid)

    def _vm_pids(self, host: str) -> list[int]:
        """Processes of the host's VMs, the first process of each before the others."""
        found = self.sandbox.watch.learn()
        names = [vm for vm, place in self.sandbox.hosts.items() if place == host]
        return sorted(pid for vm in names for pid in found.get(vm, []))


def _words(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
