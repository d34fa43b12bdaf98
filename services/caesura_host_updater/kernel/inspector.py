"""Looks at the host's kernel, in threads of its own: what plans and operations by method kexec need to know of it."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from caesura.contract.messages import HostKernel, KernelFigure
from caesura.lifecycle.loaded_kernel import RECORD, LoadedKernel
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_host_updater.kernel.figures import add_figure, read_figures
from caesura_host_updater.kernel.preflight import (
    KernelFacts,
    figure_error,
    loaded_error,
    obstacles,
)
from caesura_vmcontrol.kernel_change import KernelChange
from caesura_vmcontrol.mounts import mounts_in
from caesura_vmcontrol.process_control import QEMU_MARK
from caesura_vmcontrol.ram_places import carve_out_error

_LOOK_S = 10.0  # s: between two looks for the inventory
_READ_S = 5.0  # s: for one look, which takes milliseconds
_OF_THE_FLEET = ("caesura-coordinator", "caesura-metadata-publisher", "caesura-metrics-exporter")
_BROKERS = ("mosquitto", "nats-server", "emqx", "rabbitmq-server")
_VMMS = ("qemu-system-", "qemu-kvm", "firecracker", "cloud-hyperviso", "crosvm", "VBoxHeadless")
"""As ``comm`` has them: its first 15 characters."""
_EXEC_S = 1.0  # s: for a process to become another program
_EXEC_LOOK_S = 0.01
_OURS = f"{QEMU_MARK}=".encode()
_TEXT = 1000  # characters of a problem: an inventory holds several

_log = get_logger("caesura.kernel")


class _NotSeen(Exception):
    """The host's files cannot be read, or do not answer."""


class KernelInspector:
    """See the module.

    Args:
        options: the host file's table ``[kernel]``.
        state_dir: the state folder.
        guard_pid: the pause guard's process; 0: there is none.
        broker_hosts: where the broker is, as the settings say: one for each node of a cluster.
        changed: called when what the inventory says of the kernel has changed.
        root: where the host's files are; another one in tests only.
        carve_out_error: why guests' RAM would not stay there; injected by tests only.
    """

    def __init__(
        self,
        options: KernelOptions,
        state_dir: Path,
        *,
        guard_pid: Callable[[], int],
        broker_hosts: Sequence[str],
        changed: Callable[[], None],
        root: Path = Path("/"),
        carve_out_error: Callable[[str], str] = carve_out_error,
    ) -> None:
        self._carve_out_error = carve_out_error
        self._options = options
        self._state_dir = state_dir
        self._guard_pid = guard_pid
        self._broker_hosts = tuple(broker_hosts)
        self._changed = changed
        self._root = root
        self.record: HostKernel | None = None
        """For the inventory; None where the operator does not allow the method."""

    async def run(self) -> None:
        """Look again and again. Never ends."""
        if not self._options.kexec:
            await asyncio.Event().wait()
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        """Look once."""
        if not self._options.kexec:
            return
        try:
            facts, figures = await self._found()
        except _NotSeen as error:
            release = self.record.release if self.record is not None else ""
            record = HostKernel(release=release, kexec=True, problems=(str(error),))
        else:
            record = HostKernel(
                release=facts.release,
                kexec=True,
                problems=tuple(each[:_TEXT] for each in obstacles(facts)),
                figures=figures,
            )
        if record != self.record:
            self.record = record
            for problem in record.problems:
                _log.warning("kernel.not_ready", why=problem)
            self._changed()

    async def error(self, release: str, budget_s: float) -> str:
        """Why the loaded kernel cannot be started now under VMs that may be paused for ``budget_s``; empty: it can."""
        if not self._options.kexec:
            return "the host file does not allow it: [kernel] kexec = true"
        try:
            facts, figures = await self._found()
        except _NotSeen as error:
            return str(error)
        wrong = list(obstacles(facts))
        wrong += (loaded_error(facts, self._options, release), figure_error(figures, release, budget_s))
        return "; ".join(each for each in wrong if each)

    def change_to(self, release: str) -> KernelChange:
        """What the guard has to know."""
        return KernelChange(release, self._options.carve_out, watchdog_s=self._options.watchdog_s)

    async def measured(self, figure: KernelFigure) -> None:
        """Keep a measurement; a disk that refuses it is logged: then nothing is planned by it."""
        try:
            await in_thread("kernel", lambda: add_figure(self._state_dir, figure))
        except OSError as error:
            _log.error("kernel.figure_not_kept", why=str(error))
            return
        await self.look()

    async def _found(self) -> tuple[KernelFacts, tuple[KernelFigure, ...]]:
        try:
            async with asyncio.timeout(_READ_S):
                return await in_thread("kernel", self._read)
        except (TimeoutError, OSError) as error:
            why = f"the host's kernel cannot be looked at: {str(error) or 'its files do not answer'}"
            raise _NotSeen(why) from error

    def _read(self) -> tuple[KernelFacts, tuple[KernelFigure, ...]]:
        """Blocking. Raises OSError."""
        proc = self._root / "proc"
        facts = KernelFacts(
            boot_id=_text(proc / "sys/kernel/random/boot_id"),
            release=_text(proc / "sys/kernel/osrelease"),
            command_line=_text(proc / "cmdline"),
            kexec_loaded=_optional(self._root / "sys/kernel/kexec_loaded"),
            loaded=self._loaded(),
            mounts=mounts_in((proc / "self/mounts").read_text(errors="replace")),
            carve_out_error=self._carve_out_error(self._options.carve_out),
            state_dir=str(self._state_dir),
            guard_capabilities=_capabilities(proc, self._guard_pid()),
            services=_services(proc),
            # A cluster of which one node is here has others, while this kernel is replaced.
            broker_here=self._broker_hosts[0] if all(map(_is_here, self._broker_hosts)) else "",
            foreign_guests=_foreign_guests(proc),
            rtc_is_local=_optional(self._root / "etc/adjtime").splitlines()[2:3] == ["LOCAL"],
        )
        # What was measured on the shorter way says nothing of the longer one.
        early = self._options.early
        return facts, tuple(each for each in read_figures(self._state_dir) if early or not each.early)

    def _loaded(self) -> LoadedKernel | None:
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode((self._root / RECORD[1:]).read_bytes(), type=LoadedKernel)
        return None


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip()


def _optional(path: Path) -> str:
    with suppress(OSError):
        return _text(path)
    return ""


def _capabilities(proc: Path, pid: int) -> int | None:
    if not pid:
        return None
    for line in _optional(proc / str(pid) / "status").splitlines():
        if line.startswith("CapEff:"):
            return int(line.removeprefix("CapEff:"), 16)
    return None


def _services(proc: Path) -> tuple[str, ...]:
    """Programs of the fleet, by the words of their command lines; QEMU's and others' arguments do not count."""
    found = set()
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")[:2]  # an interpreter and its script
        except OSError:
            continue
        for word in words:
            name = os.path.basename(word.decode(errors="replace"))  # noqa: PTH119 - a word, not one of our paths
            if name in _OF_THE_FLEET or name in _BROKERS:
                found.add(name)
    return tuple(sorted(found))


def _foreign_guests(proc: Path) -> tuple[str, ...]:
    """VMMs that no host updater has started: their guests would end with this kernel. Another user's cannot be looked into, and is one."""
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        name = _optional(folder / "comm")
        if not name.startswith(_VMMS):
            continue
        try:
            environ = _environ(folder / "environ")
        except PermissionError:
            environ = b""
        except OSError:
            continue  # it has ended
        if not any(each.startswith(_OURS) for each in environ.split(b"\0")):
            found.append(f"{name} (pid {folder.name})")
    return tuple(sorted(found))


def _environ(path: Path) -> bytes:
    """What a process was started with. While it becomes another program (execve) it has its new name already, and no environment yet.

    Raises:
        OSError: it has ended, or is another user's.
    """
    until = time.monotonic() + _EXEC_S
    while not (found := path.read_bytes()) and time.monotonic() < until:
        time.sleep(_EXEC_LOOK_S)
    return found


def _is_here(host: str) -> bool:
    """Whether an address is this host's: what is sent there comes from that very address. Sends nothing."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            if probe.getsockname()[0] == address[0]:
                return True
    return False
