"""Guests that shut down by themselves for an update that needs a reboot, and are started again."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from contextlib import suppress

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.guest_agent import AgentRefused, guest_agent
from caesura_host_updater.drivers.port import DriverError, ShutdownFailed
from caesura_host_updater.drivers.qemu.async_qmp import QmpFailed
from caesura_host_updater.drivers.qemu.guest import NO_REBOOT, Guest
from caesura_host_updater.drivers.qemu.process_records import Records, VmProcessRecord
from caesura_host_updater.drivers.qemu.supervisor import VmSupervisor
from caesura_host_updater.drivers.shutdown_requests import ShutdownRequests
from caesura_host_updater.spawn import ExitWatch
from caesura_vmcontrol.procfs import send_signal

_AGENT_S = 3.0  # s: a guest agent answers within milliseconds; then ACPI is tried
_LOOK_S = 0.1  # s: between two looks at a guest that is down in a process that stays (-no-shutdown)
_QUIT_S = 2.0  # s: for such a process to end

_log = get_logger("caesura.qemu")


class Restarter:
    """See the module. All instants are seconds on CLOCK_MONOTONIC."""

    def __init__(self, guests: Mapping[str, Guest], records: Records, supervisor: VmSupervisor) -> None:
        self._guests = guests
        self._supervisor = supervisor
        self._requests = ShutdownRequests(records.folder)
        self.down: set[str] = set()
        """VMs that were asked to shut down and do not run again yet."""
        self.failed: set[str] = set()
        """Those of them that could not be started when that was last tried."""
        self._answering: set[str] = set()
        """VMs whose guest agent answered before they shut down: they are up when it answers again."""
        self._starts = {vm: asyncio.Lock() for vm in guests}
        self._late: dict[str, asyncio.Task[None]] = {}
        """VMs that were asked to shut down and did not in time: started when they end after all."""

    async def open(self) -> None:
        """See to the VMs that a previous run asked: those that had ended have been started."""
        for vm, guest in self._guests.items():
            if not await in_thread("shutdown request", lambda vm=vm: self._requests.left_s(vm)):  # type: ignore[misc]
                continue
            if guest.run is not None:
                self.down.add(vm)
                self._start_when_ended(guest)

    async def close(self) -> None:
        """Stop waiting for the end of VMs."""
        for task in self._late.values():
            task.cancel()
        await asyncio.gather(*self._late.values(), return_exceptions=True)

    # -- down -------------------------------------------------------------------------------------------------

    async def shut_down(self, guest: Guest, by: float) -> str:
        """Ask the guest, and wait for the end of its process; returns by what it was asked.

        Raises:
            ShutdownFailed: it still runs at ``by``, or there is no way to ask it.
        """
        vm, run = guest.vm, guest.run
        if guest.spec.qemu is None:
            raise ShutdownFailed(vm, NO_REBOOT)
        self.down.add(vm)
        if run is None:
            return "itself"
        try:
            await in_thread("shutdown request", lambda: self._requests.note(vm))
        except OSError as error:
            self.down.discard(vm)
            raise ShutdownFailed(vm, f"it was not asked: the request cannot be noted: {error}") from error
        try:
            how = await self._ask(guest, run, by)
        except ShutdownFailed:
            # Its QEMU may not have answered because it was ending: the guest was faster than the request.
            if not await self._ended_by(guest, run, min(by, time.monotonic() + _QUIT_S)):
                raise
            how = "itself"
        if not await self._ended_by(guest, run, by):
            raise ShutdownFailed(
                vm, f"its guest was asked by {how} and runs on; it was not killed", asked=True
            )
        await self._supervisor.end(guest, run)
        return how

    async def kill(self, guest: Guest, by: float) -> None:
        """Kill the QEMU of a guest that was asked to shut down, and wait for its end.

        Raises:
            ShutdownFailed: it still runs at ``by``.
        """
        vm, run = guest.vm, guest.run
        if run is None or vm not in self.down:
            return
        send_signal(run.pid, run.start_ticks, signal.SIGKILL)
        if not await self._ended_by(guest, run, by):
            raise ShutdownFailed(vm, "its QEMU did not end after SIGKILL", asked=True)
        await self._supervisor.end(guest, run)

    async def _ask(self, guest: Guest, run: VmProcessRecord, by: float) -> str:
        """By the guest agent, which no guest ignores, else by ACPI."""
        if run.agent:
            left = max(min(by - time.monotonic(), _AGENT_S), 0.0)
            try:
                async with guest_agent(
                    guest.vm, run.agent, asyncio.get_running_loop().time() + left
                ) as agent:
                    self._answering.add(guest.vm)
                    await agent.shutdown()
            except AgentRefused as error:
                _log.warning("vm.shutdown_refused", vm=guest.vm, why=error.why, hint="ACPI is tried")
            except DriverError as error:
                _log.info("vm.without_guest_agent", vm=guest.vm, why=error.why)
            else:
                return "its guest agent"
        if guest.qmp is None:
            raise ShutdownFailed(guest.vm, "it was not asked: its QEMU does not answer")
        try:
            await guest.qmp.execute("system_powerdown")
        except QmpFailed as error:
            raise ShutdownFailed(guest.vm, f"it could not be asked by ACPI: {error}") from error
        return "ACPI"

    @staticmethod
    async def _ended_by(guest: Guest, run: VmProcessRecord, by: float) -> bool:
        """Wait for the end of its process, and end one that stays though its guest is down; whether it ended."""
        ended = asyncio.Event()
        try:
            watch = ExitWatch(run.pid, ended.set, reap=False)
        except ProcessLookupError:
            return True
        try:
            while not ended.is_set() and time.monotonic() < by:
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(min(_LOOK_S, by - time.monotonic()), 0.0)):
                        await ended.wait()
                if not ended.is_set() and guest.shut_down and guest.qmp is not None:
                    with suppress(QmpFailed, TimeoutError):
                        async with asyncio.timeout(_QUIT_S):
                            await guest.qmp.execute("quit")
                            await ended.wait()
            return ended.is_set()
        finally:
            watch.close()

    # -- up ---------------------------------------------------------------------------------------------------

    async def start(self, guest: Guest, down_by: float) -> bool:
        """Start it when it has ended, and wait until it is up; whether it had ended.

        Raises:
            DriverError: it cannot be started.
        """
        vm, run = guest.vm, guest.run
        was_down = vm in self.down
        if run is not None and was_down and not await self._ended_by(guest, run, down_by):
            self._start_when_ended(guest)
            return False
        async with self._starts[vm]:
            if guest.run is run and run is not None and was_down:
                await guest.detach()  # its end was not noticed here yet
            if guest.run is None and not await self._supervisor.start(guest):
                self.failed.add(vm)
                raise DriverError(vm, guest.last_error or "it cannot be started")
        self.failed.discard(vm)
        await self._up(guest)
        self.down.discard(vm)
        guest.changed()
        return was_down

    async def _up(self, guest: Guest) -> None:
        """Until its guest agent answers, where it did before."""
        while guest.vm in self._answering:
            run = guest.run
            if run is None:
                raise DriverError(guest.vm, guest.last_error or "it ended after its start")
            try:
                by = asyncio.get_running_loop().time() + _AGENT_S
                async with guest_agent(guest.vm, run.agent, by) as agent:
                    await agent.ping()
            except DriverError:
                await asyncio.sleep(_LOOK_S)
            else:
                self._answering.discard(guest.vm)

    def _start_when_ended(self, guest: Guest) -> None:
        if guest.vm not in self._late or self._late[guest.vm].done():
            self._late[guest.vm] = asyncio.create_task(
                self._start_late(guest), name=f"start {guest.vm} when it has ended"
            )

    async def _start_late(self, guest: Guest) -> None:
        vm, run = guest.vm, guest.run
        left_s = await in_thread("shutdown request", lambda: self._requests.left_s(vm))
        if run is None or not await self._ended_by(guest, run, time.monotonic() + left_s):
            self.down.discard(vm)
            await in_thread("shutdown request", lambda: self._requests.forget(vm))
            return
        _log.warning("vm.ended_late", vm=vm, hint="it was asked to shut down, and is started again")
        self._answering.discard(vm)
        with suppress(DriverError):
            await self.start(guest, 0.0)
