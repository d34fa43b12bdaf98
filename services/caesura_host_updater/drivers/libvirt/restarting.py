"""Domains that shut down by themselves for an update that needs a reboot, and are started again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.libvirt.connection import LibvirtConnection
from caesura_host_updater.drivers.libvirt.definition import LibvirtVm
from caesura_host_updater.drivers.libvirt.resume_paths import is_same_life
from caesura_host_updater.drivers.port import DriverError, ShutdownFailed
from caesura_host_updater.drivers.shutdown_requests import ShutdownRequests
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.procfs import alive
from caesura_vmcontrol.vm_control import condition

_POLL_S = 0.1  # s: between two looks at a domain that shuts down
_START_S = (
    30.0  # s: what libvirt gets for a start, which takes a second or two, before it is said that it hangs
)

_log = get_logger("caesura.driver")


class Domains(Protocol):
    """What the driver knows of them, as of its last look."""

    @property
    def vms(self) -> Mapping[str, LibvirtVm]:
        """The members."""

    @property
    def plans(self) -> Mapping[str, LibvirtPlan]:
        """Those that run, paused or not."""


class DomainRestarter:
    """See the module. All instants are seconds on CLOCK_MONOTONIC.

    Args:
        domains: the driver's view of them.
        connected: the driver's connection.
        look: has the view made again.
        folder: where shutdown requests are noted.
        on_change: called when ``errors`` has changed.
    """

    def __init__(
        self,
        domains: Domains,
        connected: Callable[[], LibvirtConnection],
        look: Callable[[], Awaitable[None]],
        folder: Path,
        on_change: Callable[[], None],
    ) -> None:
        self._domains = domains
        self._connected = connected
        self._look = look
        self._requests = ShutdownRequests(folder)
        self.down: set[str] = set()
        """VMs that were asked to shut down and do not run again yet."""
        self._asked: dict[str, LibvirtPlan] = {}
        """The lives that were asked; of a VM that did not run there is none."""
        self.errors: dict[str, str] = {}
        """Why those of them that have ended late are not started yet."""
        self._on_change = on_change
        self._starts: dict[str, asyncio.Future[None]] = {}
        """At most one start for each VM, however often it is tried: one that hangs cannot be called off."""
        self._late: dict[str, asyncio.Task[None]] = {}

    async def open(self) -> None:
        """Take over the VMs that a previous run asked: those that have ended are started."""
        for vm in self._domains.vms:
            if await in_thread("shutdown request", partial(self._requests.left_s, vm)):
                self._note_asked(vm)
        self.start_ended(())

    async def close(self) -> None:
        """Wait for no start any more."""
        for task in self._late.values():
            task.cancel()
        await asyncio.gather(*self._late.values(), return_exceptions=True)

    async def shut_down(self, vm: str, by: float) -> str:
        """By libvirt, which asks the guest's agent or ACPI; nothing is killed. Raises ShutdownFailed."""
        plan, spec = self._domains.plans.get(vm), self._domains.vms.get(vm)
        if spec is None:
            raise ShutdownFailed(vm, "there is no such domain any more")
        self._note_asked(vm)
        try:
            await in_thread("shutdown request", partial(self._requests.note, vm))
        except OSError as error:
            raise ShutdownFailed(vm, f"that it is asked cannot be noted: {error}") from error
        if plan is None:
            return "itself"
        try:
            async with asyncio.timeout(max(by - time.monotonic(), 0.01)):
                await in_thread(f"shut down {vm}", partial(self._connected().shut_down, spec.uuid))
        except (OSError, TimeoutError) as error:
            if not await has_ended(plan):
                raise ShutdownFailed(
                    vm, f"it could not be asked: {error or 'libvirt does not answer'}"
                ) from error
        while not await has_ended(plan):
            if time.monotonic() >= by:
                raise ShutdownFailed(
                    vm, "its guest was asked by libvirt and runs on; it was not killed", asked=True
                )
            await asyncio.sleep(_POLL_S)
        await self._look()
        return "libvirt"

    def _note_asked(self, vm: str) -> None:
        self.down.add(vm)
        self._asked.pop(vm, None)
        if vm in self._domains.plans:
            self._asked[vm] = self._domains.plans[vm]

    async def _forget(self, vm: str) -> None:
        """It runs again, or its end was somebody else's wish."""
        self.down.discard(vm)
        self._asked.pop(vm, None)
        await in_thread("shutdown request", partial(self._requests.forget, vm))

    def _runs_again(self, vm: str) -> bool:
        asked, plan = self._asked.get(vm), self._domains.plans.get(vm)
        return plan is not None and (asked is None or not is_same_life(asked, plan))

    async def start(self, vm: str, down_by: float) -> bool:
        """Start the domain when it has ended; it is up when libvirt says that it runs. Raises DriverError."""
        was_down = vm in self.down
        if was_down and self._runs_again(vm):  # since a try that was given up, or by somebody else
            await self._forget(vm)
            return True
        plan = self._domains.plans.get(vm)
        if was_down and plan is not None:
            while not await has_ended(plan) and time.monotonic() < down_by:  # noqa: ASYNC110 - a process of somebody else's
                await asyncio.sleep(_POLL_S)
        if plan is not None and not await has_ended(plan):
            return False  # it is started when it ends: see `start_ended`
        await self._start(vm)
        return was_down

    async def _start(self, vm: str) -> None:
        spec = self._domains.vms.get(vm)
        if spec is None:
            raise DriverError(vm, "there is no such domain any more")
        starting = self._starts.get(vm)
        if starting is None:
            work = partial(self._connected().start, spec.uuid)
            starting = self._starts[vm] = asyncio.ensure_future(in_thread(f"start {vm}", work))
            starting.add_done_callback(partial(self._drop_start, vm))
        done, _ = await asyncio.wait([starting], timeout=_START_S)
        if not done:
            raise DriverError(vm, f"libvirt has not started it within {_START_S:g} s")
        try:
            starting.result()
        except OSError as error:
            raise DriverError(vm, f"it cannot be started: {error}") from error
        await self._look()
        if vm not in self._domains.plans:
            raise DriverError(vm, "it was started, and does not run")
        await self._forget(vm)

    def _drop_start(self, vm: str, start: asyncio.Future[None]) -> None:
        """Also where nobody waits for it any more: what it said then is not the answer to a later one."""
        self._starts.pop(vm, None)
        if not start.cancelled():
            start.exception()  # mark it as retrieved

    def start_ended(self, of_operation: Iterable[str]) -> None:
        """Start VMs that did not shut down in time and have ended since, unless an operation has them; waits for none of them.

        One that was started by somebody else, or late, is forgotten.
        """
        for vm in self.errors.keys() - self.down:
            del self.errors[vm]  # an operation has started it
        for vm in self.down.difference(of_operation):
            is_over = vm in self._domains.vms and (vm not in self._domains.plans or self._runs_again(vm))
            if is_over and (vm not in self._late or self._late[vm].done()):
                self._late[vm] = asyncio.create_task(self._start_late(vm), name=f"start {vm}")

    async def _start_late(self, vm: str) -> None:
        try:
            left_s = await in_thread("shutdown request", partial(self._requests.left_s, vm))
            if not left_s or self._runs_again(vm):
                # It ended long after it was asked: that was somebody else's wish.
                self._tell(vm, "")
                await self._forget(vm)
                return
            why = await self._why_not_started(vm)
            while vm in self._starts:
                self._tell(vm, why)
                why = await self._why_not_started(vm)
            self._tell(vm, why)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next look tries again
            self._tell(vm, repr(error))

    async def _why_not_started(self, vm: str) -> str:
        try:
            await self._start(vm)
        except DriverError as error:
            return error.why
        return ""

    def _tell(self, vm: str, why: str) -> None:
        if why == self.errors.get(vm, ""):
            return
        if why:
            _log.error("vm.not_started_yet", vm=vm, why=why)
            self.errors[vm] = why
        else:
            del self.errors[vm]
        self._on_change()


async def has_ended(plan: LibvirtPlan) -> bool:
    """Whether a domain is over in the plan's life; False where nobody says."""
    if plan.pid:
        return not alive(plan.pid, plan.start_ticks)
    try:
        return await in_thread(f"look at {plan.vm}", partial(condition, plan)) == "gone"
    except OSError:
        return False
