"""The pause guard is asked ahead of every pause which ways out of the VMs are none for it: they were found with the host updater's rights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from caesura.runtime.logs import get_logger
from caesura_host_updater.drivers.port import Driver, MembershipCapable
from caesura_host_updater.guard_client import GuardClient, GuardUnavailable
from caesura_host_updater.vm_view import plan_of
from caesura_vmcontrol.libvirt_connections import open_ahead
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.resume_plans import ResumePlan

_log = get_logger("caesura.guard_client")


class GuardInspection:
    """See the module. It also has the guard open its connections to libvirt, which polkit authenticates, and opens ours.

    Args:
        vms: the names of those that there are.
        is_busy: whether an operation is under way: then the guard has more urgent work, and has been asked.
        on_change: called when the guard says something new.
    """

    def __init__(
        self,
        driver: Driver,
        guard: GuardClient,
        vms: Callable[[], Iterable[str]],
        is_busy: Callable[[], bool],
        on_change: Callable[[], None],
    ) -> None:
        self._driver = driver
        self._guard = guard
        self._vms = vms
        self._is_busy = is_busy
        self._on_change = on_change
        self._wanted = asyncio.Event()

    def ask(self) -> None:
        """VMs came or were started, or the guard is another one."""
        self._wanted.set()

    async def run(self) -> None:
        """Ask whenever ``ask`` was called and no operation is under way. Never ends."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            if self._is_busy():
                continue
            plans = self._plans()
            if not plans:
                continue
            open_ahead(plans)  # a pause may begin, of all of them perhaps, and polkit may be slow
            try:
                if await self._guard.inspect(plans):
                    self._on_change()
            except GuardUnavailable as error:
                _log.debug("guard.not_inspected", why=str(error))

    def _plans(self) -> list[ResumePlan]:
        if not isinstance(self._driver, MembershipCapable):
            return []  # its VMs are in the host file, and their ways out are the guard's by that
        plans = (plan_of(self._driver, vm) for vm in self._vms())
        return [plan for plan in plans if isinstance(plan, LibvirtPlan)]
