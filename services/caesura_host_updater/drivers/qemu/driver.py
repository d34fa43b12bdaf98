"""The ``qemu`` driver: the port's verbs over real guests. See the package's modules for how each is done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

from caesura.contract.messages import Method, ProofCode, VmState
from caesura_host_updater.drivers.clock_setting import set_clock
from caesura_host_updater.drivers.digest import digest_of
from caesura_host_updater.drivers.guest_agent import guest_agent, read_boot_id
from caesura_host_updater.drivers.port import (
    Capabilities,
    ClockSet,
    DriverError,
    FreezeFailed,
    HandOver,
    NotPossible,
    NotRunningYet,
)
from caesura_host_updater.drivers.qemu import commandline
from caesura_host_updater.drivers.qemu.assessor import Assessor
from caesura_host_updater.drivers.qemu.async_qmp import QmpFailed, QmpTimeout
from caesura_host_updater.drivers.qemu.definition import QemuOptions, QemuVm
from caesura_host_updater.drivers.qemu.guest import PAUSED_BEFORE, Guest
from caesura_host_updater.drivers.qemu.launching import Launcher
from caesura_host_updater.drivers.qemu.migration import Migrator
from caesura_host_updater.drivers.qemu.prepare import Preparer
from caesura_host_updater.drivers.qemu.process_records import Records
from caesura_host_updater.drivers.qemu.restarting import Restarter
from caesura_host_updater.drivers.qemu.supervisor import VmSupervisor
from caesura_host_updater.drivers.qemu.trial import Trials
from caesura_host_updater.drivers.sampling import sampled_digest_of
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_vmcontrol import claims
from caesura_vmcontrol.qemu_plans import QemuPlan
from caesura_vmcontrol.qmp_commands import NOT_OURS
from caesura_vmcontrol.resume_plans import ResumePlan

_METHODS: tuple[Method, ...] = ("live", "swap", "freeze", "replace", "reboot", "kexec")
_CONT_S = 0.1  # s: what our own connection gets before the guard's way is taken


class QemuDriver:
    """See the module.

    Args:
        host: the host's name.
        specs: the VMs of the host file, discovered ones included.
        options: the host file's table ``[qemu]``.
        state_dir: where run files, claims and logs live.
        accel: the value of ``-accel`` for VMs that are started, such as ``tcg,thread=multi``.
        accel_reason: why that one, for people.
        environ: what QEMU processes inherit.
        max_digest_bytes: RAM files above this are not digested.
        kernel: the host file's table ``[kernel]``.
    """

    name = "qemu"

    def __init__(
        self,
        host: str,
        specs: tuple[QemuVm, ...],
        options: QemuOptions,
        state_dir: Path,
        *,
        accel: str,
        accel_reason: str = "",
        environ: Mapping[str, str],
        max_digest_bytes: int,
        kernel: KernelOptions | None = None,
    ) -> None:
        kernel = kernel or KernelOptions()
        self._max_digest_bytes = max_digest_bytes
        self._accel = f"{accel.partition(',')[0]} ({accel_reason})" if accel_reason else accel
        self._change = asyncio.Event()
        self._guests = {spec.name: Guest(spec, self._change.set, kernel) for spec in specs}
        records = Records(state_dir / "vms")
        launcher = Launcher(host, options, state_dir, records, accel=accel, environ=environ, kernel=kernel)
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="qemu")
        self._assessor = Assessor(self._guests, launcher, Trials(launcher, records, self._threads))
        self._preparer = Preparer(launcher, records, self._assessor, self._threads)
        self._migrator = Migrator(launcher, records, self._threads)
        self._supervisor = VmSupervisor(
            self._guests, options, launcher, records, self._migrator, self._assessor, self._threads
        )
        self._restarter = Restarter(self._guests, records, self._supervisor)

    # -- life ---------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Adopt the VMs that run, start the others, all at once."""
        await self._supervisor.open()
        await self._restarter.open()

    async def close(self, *, stop_vms: bool) -> None:
        """Release everything; with ``stop_vms``, stop those that were started here and remove what they leave behind."""
        await self._restarter.close()
        await self._supervisor.close(stop_vms=stop_vms)
        await self._migrator.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def ping(self) -> str:
        """Names VMs that do not run or cannot be talked to, and why."""
        wrong = [
            f"{guest.vm} ({why})"
            for guest in self._guests.values()
            if guest.vm not in self._restarter.down - self._restarter.failed and (why := guest.health_error())
        ]
        return f"not running: {', '.join(wrong)}" if wrong else ""

    def health_error(self, vm: str) -> str:
        """As ``ping``, of one VM."""
        return self._guests[vm].health_error()

    def detail(self) -> str:
        """QEMU's versions and the accelerator."""
        versions = {guest.qmp.version for guest in self._guests.values() if guest.qmp is not None}
        return f"QEMU {', '.join(sorted(versions)) or 'not running'}, {self._accel}"

    def capabilities(self, vm: str) -> Capabilities:
        """As the VM is now: its command line, its RAM file and its sockets decide."""
        guest = self._guests[vm]
        missing = {str(method): why for method, why in guest.missing.items()}
        if guest.run is None or guest.state == "unknown":
            why = guest.health_error() or "it is not running"
            missing |= {
                "swap": why,
                "replace": why,
                "kexec": why,
                "reboot": missing.get("reboot", why),
            }
            if guest.state == "unknown" or guest.spec.qemu is None:
                missing["freeze"] = why
        can = tuple(method for method in _METHODS if method not in missing)
        agent = guest.run.agent if guest.run is not None else guest.spec.qemu is not None
        ram = self._ram(guest)
        digests: tuple[ProofCode, ...] = () if isinstance(ram, str) else ("sampled_digest_equal",)
        if self.memory_size(vm):
            digests = ("digest_equal", *digests)
        return Capabilities(
            methods=can,
            missing=missing,
            clock="system" if agent else "none",
            digests=digests,
            no_digest=ram if isinstance(ram, str) else "",
        )

    def states(self) -> Mapping[str, VmState]:
        """As QEMU's events and the kernel say; nothing is waited for."""
        return {vm: guest.state for vm, guest in self._guests.items()}

    async def read_states(self) -> Mapping[str, VmState]:
        """As ``states``."""
        return self.states()

    async def changed(self) -> None:
        """Wait until a VM ended, or was lost or found."""
        await self._change.wait()
        self._change.clear()

    def process_of(self, vm: str) -> str:
        """``QEMU 7.2.22 (pid 4711)``."""
        return self._guests[vm].describe()

    # -- operations ---------------------------------------------------------------------------------------

    async def prepare(self, vm: str, operation: str, method: Method, binary: str) -> None:
        """Check, and for a swap start the new process. Raises DriverError with QEMU's own reason."""
        guest = self._guests[vm]
        if guest.prepared is not None and guest.prepared.over:
            await self._migrator.release(guest)
        await self._preparer.prepare(guest, operation, method, binary)

    def resume_plan(self, vm: str) -> ResumePlan:
        """The way out of what was prepared, else of a stop."""
        guest = self._guests[vm]
        plan = guest.plan()
        if plan is None:
            why = "has no QMP socket for the pause guard" if guest.run is not None else "is not running"
            raise DriverError(vm, why)
        return plan

    async def freeze(self, vm: str, by: float) -> None:
        """``stop``, and learn from QEMU that it is paused."""
        guest = self._guests[vm]
        qmp = guest.qmp
        if guest.unguarded:
            raise FreezeFailed(vm, guest.unguarded)
        if guest.run is None or qmp is None or guest.state == "stopped":
            raise FreezeFailed(vm, "is not running")
        left = by - time.monotonic()
        if left <= 0:
            raise FreezeFailed(vm, "it was too late to freeze it")
        if guest.prepared is not None:
            try:
                claims.note(guest.prepared.plan.claims, "begun")
            except OSError as error:
                raise FreezeFailed(vm, f"its stop cannot be noted: {error}") from error
            guest.prepared.begun = True
        with qmp.watch() as watch:
            try:
                await qmp.execute("stop", left)
                status = await qmp.status(max(by - time.monotonic(), 0.001))
            except QmpFailed as error:
                raise FreezeFailed(vm, str(error)) from error
        guest.stopped_by_us = any(event.name == "STOP" for event in watch.events)
        if status in NOT_OURS:
            guest.leave(status, NOT_OURS[status])
        elif status == "paused" and not guest.stopped_by_us:
            guest.leave(status, PAUSED_BEFORE)
        if guest.left:
            raise FreezeFailed(vm, guest.left)
        if status != "paused":
            raise FreezeFailed(vm, f"QEMU says {status} after a stop")

    async def hand_over(self, vm: str, by: float) -> HandOver:
        """Swap."""
        return await self._migrator.hand_over(self._guests[vm], by)

    async def checkpoint(self, vm: str, by: float, *, gone: bool = True) -> None:
        """Replace, first half."""
        await self._migrator.checkpoint(self._guests[vm], by, gone=gone)

    async def release(self, vm: str) -> None:
        """Forget what was prepared, and end the process that does not have the guest."""
        await self._migrator.release(self._guests[vm])

    async def resume(self, vm: str, timeout_s: float) -> Literal["running", "gone", "left"]:
        """Resume, roll back, or restore from the state file: whatever was prepared."""
        guest = self._guests[vm]
        until = time.monotonic() + timeout_s
        plan = guest.plan()
        if plan is None:
            return "gone"
        prepared = guest.prepared
        if (
            prepared is not None
            and not prepared.begun
            and not guest.stopped_by_us
            and guest.state == "paused"
        ):
            await guest.leave_as_found()
        while True:
            if guest.left:
                return "left"
            if isinstance(plan, QemuPlan) and await self._cont(guest, min(_CONT_S, timeout_s)):
                return "running"
            state = await self._migrator.recover(guest, until)
            if state == "gone":
                await self._supervisor.gone(guest)
                return "left" if guest.left else "gone"
            if state == "running":
                await self._migrator.settle(guest)
                if await self._runs(guest, until):
                    return "running"
            if not guest.left and time.monotonic() >= until:
                raise NotRunningYet(vm, guest.last_error or f"is {state} after {timeout_s:.2f} s")

    async def kill(self, vm: str, by: float) -> None:
        """SIGKILL to its QEMU."""
        await self._restarter.kill(self._guests[vm], by)

    async def shut_down(self, vm: str, by: float) -> str:
        """By the guest agent, else by ACPI."""
        return await self._restarter.shut_down(self._guests[vm], by)

    async def start(self, vm: str, down_by: float) -> bool:
        """A new process from the VM's definition; it is up when its guest agent answers, if that had answered before."""
        return await self._restarter.start(self._guests[vm], down_by)

    def why_left(self, vm: str) -> str:
        """Why ``resume`` left the VM as it is."""
        return self._guests[vm].left

    @staticmethod
    async def _cont(guest: Guest, timeout_s: float) -> bool:
        """Over our own connection, behind a ``stop`` that may still be under way."""
        if guest.qmp is None or guest.qmp.closed:
            return False
        try:
            status = await guest.qmp.status(timeout_s)
            if status in NOT_OURS:
                guest.leave(status, NOT_OURS[status])
                return False
            await guest.qmp.execute("cont", timeout_s)
            return await guest.qmp.status(timeout_s) == "running" and guest.state == "running"
        except QmpFailed:
            return False

    @staticmethod
    async def _runs(guest: Guest, until: float) -> bool:
        """Whether our own connection says so too: a ``stop`` that was given up may have come late."""
        if guest.qmp is None or guest.qmp.closed:
            return True  # the guard's word is all there is
        try:
            return await guest.qmp.status(max(until - time.monotonic(), 0.05)) in ("running", "suspended")
        except QmpTimeout:
            return False
        except QmpFailed:
            return True

    # -- memory and clock -----------------------------------------------------------------------------------

    def _ram(self, guest: Guest) -> commandline.GuestRam | str:
        run = guest.run
        if run is None and guest.prepared is not None:
            run = self._supervisor.last_run(guest.vm)
        return commandline.memory_of(run.argv) if run is not None else "it is not running"

    def memory_size(self, vm: str) -> int:
        """The size of the guest's RAM file; 0 where there is none or it is above the limit."""
        ram = self._ram(self._guests[vm])
        return ram.size if isinstance(ram, commandline.GuestRam) and ram.size <= self._max_digest_bytes else 0

    async def memory_digest(self, vm: str, stop_at: float) -> str | None:
        """BLAKE2b over the guest's RAM file."""
        ram = self._ram(self._guests[vm])
        if isinstance(ram, str):
            raise NotPossible(vm, ram)
        if ram.size > self._max_digest_bytes:
            raise NotPossible(
                vm,
                f"its RAM of {ram.size} bytes is above the limit for digests of all memory, {self._max_digest_bytes} bytes",
            )
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, _digest, Path(ram.file), ram.size, stop_at)
        except (OSError, ValueError) as error:
            raise DriverError(vm, f"its RAM file cannot be read: {error}") from error

    async def sampled_digest(self, vm: str, seed: str) -> str:
        """BLAKE2b over pages of the guest's RAM file."""
        ram = self._ram(self._guests[vm])
        if isinstance(ram, str):
            raise NotPossible(vm, ram)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, sampled_digest_of, Path(ram.file), seed)
        except (OSError, ValueError) as error:
            raise DriverError(vm, f"its RAM file cannot be read: {error}") from error

    async def guest_boot_id(self, vm: str) -> str:
        """Read by the guest agent in the guest."""
        run = self._guests[vm].run
        if run is None or not run.agent:
            raise NotPossible(vm, "there is no guest agent socket")
        return await read_boot_id(vm, partial(guest_agent, vm, run.agent))

    async def sync_clock(self, vm: str) -> ClockSet:
        """Through the guest agent."""
        guest = self._guests[vm]
        if guest.run is None or not guest.run.agent:
            raise NotPossible(vm, "has no guest agent socket" if guest.run is not None else "is not running")
        return await set_clock(vm, partial(guest_agent, vm, guest.run.agent))


def _digest(path: Path, size: int, stop_at: float) -> str | None:
    there = path.stat().st_size
    if there != size:
        raise ValueError(f"it has {there} bytes and the guest's RAM {size}")
    return digest_of(path, stop_at)
