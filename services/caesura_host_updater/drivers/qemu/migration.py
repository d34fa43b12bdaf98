"""Swap and replace of one guest: preparing, handing over, saving, and cleaning up afterwards.

Every failure takes the same way out as the pause guard's: ``caesura_vmcontrol.vm_control.resume_vm`` of the plan that was prepared.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread, in_thread_to_its_end
from caesura_host_updater.drivers.port import FreezeFailed, HandOver, SwapFailed
from caesura_host_updater.drivers.qemu import commandline
from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp, QmpEventWatch, QmpFailed
from caesura_host_updater.drivers.qemu.checkpointing import CAPABILITIES, save_state
from caesura_host_updater.drivers.qemu.cleanup import end_losers, forget, link_sockets, remove_files, run_of
from caesura_host_updater.drivers.qemu.compatibility import differences
from caesura_host_updater.drivers.qemu.guest import Guest, NotAttached, Prepared
from caesura_host_updater.drivers.qemu.handover import (
    SWAP_CAPABILITIES,
    Handed,
    HandOverFailed,
    MemoryDiffers,
    error_of_migration,
    read_capabilities,
    restore_capabilities,
    run_hand_over,
    set_capabilities,
)
from caesura_host_updater.drivers.qemu.launching import Launcher
from caesura_host_updater.drivers.qemu.memory_comparison import Views, compare, find_views
from caesura_host_updater.drivers.qemu.observer import read_snapshot
from caesura_host_updater.drivers.qemu.process_records import Records, VmProcessRecord
from caesura_host_updater.drivers.qemu.realtime import RealtimeBoost
from caesura_host_updater.drivers.qemu.vmm import NoVmm, last_words
from caesura_host_updater.spawn import ExitWatch, reap
from caesura_vmcontrol import claims
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.process_control import restore_priority
from caesura_vmcontrol.procfs import boot_id, send_signal
from caesura_vmcontrol.qemu_control import heir, holder
from caesura_vmcontrol.qemu_plans import QemuPlan, ReplacePlan, SwapPlan
from caesura_vmcontrol.resume_plans import ResumePlan
from caesura_vmcontrol.vm_control import condition, resume_vm

_HAND_OVER_S = 2.0  # s: 3 to 10 ms is usual; a new process that hangs is given up after this
_RECOVER_S = 4.0  # s: how long we try to recover by ourselves before the caller does
_END_S = 2.0  # s: for a killed process to be dead
_AGAIN_S = 0.005  # s: between two tries of the way out
_LONGEST_AGAIN_S = 0.1  # s
_ERROR_S = 0.3  # s: for the old process to say why

_log = get_logger("caesura.qemu")


class Migrator:
    """See the module."""

    def __init__(self, launcher: Launcher, records: Records, threads: ThreadPoolExecutor) -> None:
        self._launcher = launcher
        self._records = records
        self._threads = threads
        self._boost = RealtimeBoost()
        self._recoveries: dict[str, asyncio.Future[tuple[Condition, str]]] = {}
        self._cleanup_tasks: set[asyncio.Task[None]] = set()

    # -- the pause ------------------------------------------------------------------------------------------

    async def hand_over(self, guest: Guest, by: float) -> HandOver:
        """Swap. Raises SwapFailed: the old process runs the guest, unless its text says otherwise."""
        prepared, old = guest.prepared, guest.qmp
        if prepared is None or prepared.qmp is None or not isinstance(prepared.plan, SwapPlan) or old is None:
            raise SwapFailed(guest.vm, "no swap was prepared")
        views = await self._views(guest, prepared.operation, prepared.plan)
        if guest.state != "running":
            raise SwapFailed(guest.vm, f"is {guest.state} before anything was done")
        if time.monotonic() >= by:
            raise SwapFailed(guest.vm, "it was too late to begin")
        try:
            await self._begin(guest, prepared, old, SWAP_CAPABILITIES)
        except (HandOverFailed, QmpFailed, OSError) as error:
            raise SwapFailed(guest.vm, str(error)) from error
        called_at = time.monotonic()
        limit = min(by, called_at + _HAND_OVER_S)
        channel = f"unix:{self._launcher.folder(guest.vm) / 'mig'}"
        with old.watch() as watch:
            try:
                with self._boost((prepared.plan.old.pid, prepared.plan.new.pid)):
                    handed = await run_hand_over(
                        old,
                        prepared.qmp,
                        prepared.plan,
                        channel,
                        limit,
                        lambda: compare(views),
                        moved_bytes=prepared.moved_bytes,
                    )
            except (HandOverFailed, QmpFailed, OSError) as error:
                return await self._failed_hand_over(guest, prepared, error, called_at, watch)
        return await self._committed(guest, prepared, handed, called_at)

    async def _views(self, guest: Guest, operation: str, plan: SwapPlan) -> Views | str:
        memory = commandline.memory_of(guest.run.argv) if guest.run is not None else "it is not running"
        return await find_views(memory, plan, f"{operation}/{guest.vm}", self._threads)

    async def _committed(
        self, guest: Guest, prepared: Prepared, handed: Handed, called_at: float
    ) -> HandOver:
        former, new, plan = guest.run, prepared.qmp, prepared.plan
        if former is None or new is None or not isinstance(plan, SwapPlan):
            raise SwapFailed(guest.vm, "its process ended while it was handed over")
        send_signal(former.pid, former.start_ticks, signal.SIGKILL)
        if prepared.watch is not None:
            prepared.watch.close()
        prepared.qmp = prepared.watch = None
        try:
            run = run_of(former, plan.new.pid, plan.new.start_ticks)
        except NoVmm as error:
            raise SwapFailed(guest.vm, f"it ran in the new process, which ended at once: {error}") from error
        left, watch = guest.switch_to(run, new)
        self._dispose(former.pid, left, watch)
        await self.restore_capabilities(guest)
        # To its end even when it is called off: a release removes the names that the sockets have before.
        await in_thread_to_its_end(f"publish {guest.vm}", lambda _: self._publish(guest, run))
        return HandOver(
            called_at=called_at,
            frozen_at=max(called_at, handed.stopped_at),
            resumed_at=max(called_at, handed.stopped_at, handed.resumed_at),
            detail=prepared.detail,
            sampled=handed.compared.equal,
            sampled_note=handed.compared.note,
        )

    async def _failed_hand_over(
        self, guest: Guest, prepared: Prepared, error: Exception, called_at: float, told_by_old: QmpEventWatch
    ) -> HandOver:
        differs = str(error) if isinstance(error, MemoryDiffers) else ""
        stopped_at = _at("STOP", told_by_old)
        state = await self.recover(guest, time.monotonic() + _RECOVER_S)
        resumed_at = time.monotonic()
        reasons = [str(error), *claims.failures(prepared.plan.claims)]
        log = self._records.next_log(guest.vm)
        if words := await in_thread("last words", lambda: last_words(log)):
            reasons.append(f"the new QEMU said: {words}")
        if state == "running":
            await self.settle(guest)
            if guest.run is not None and guest.run.pid != prepared.plan.old.pid:
                # The guard was quicker, or an answer was lost: the new process has it all the same.
                detail = f"{prepared.detail} ({'; '.join(reasons)})"
                return HandOver(
                    called_at=called_at,
                    frozen_at=called_at,
                    resumed_at=resumed_at,
                    detail=detail,
                    sampled_note="the swap was not ended by the host updater, so nothing was compared",
                )
            if guest.qmp is not None and (reason := await error_of_migration(guest.qmp, _ERROR_S)):
                reasons.append(f"the old QEMU said: {reason}")
        else:
            reasons.append(f"the guest is {state}")
        if stopped_at is None and _at("STOP", told_by_old) is not None:
            stopped_at = called_at  # a QEMU that hung says late that it stopped, and not exactly when
        back_at = None
        if stopped_at is not None and state == "running":
            back_at = max(stopped_at, _at("RESUME", told_by_old) or resumed_at)
        raise SwapFailed(
            guest.vm,
            "; ".join(dict.fromkeys(reasons)),
            frozen_at=stopped_at,
            resumed_at=back_at,
            differs=differs,
        )

    async def checkpoint(self, guest: Guest, by: float, *, gone: bool) -> None:
        """Replace, first half. Raises FreezeFailed."""
        prepared, qmp = guest.prepared, guest.qmp
        if prepared is None or not isinstance(prepared.plan, ReplacePlan) or qmp is None:
            raise FreezeFailed(guest.vm, "no replace was prepared")
        called_at = time.monotonic()
        if called_at >= by:
            raise FreezeFailed(guest.vm, "it was too late to begin")
        try:
            await self._begin(guest, prepared, qmp, CAPABILITIES)
            # What must outlive the kernel ends on a disk, which may need the whole time.
            limit = by if prepared.plan.across is not None else min(by, called_at + _HAND_OVER_S)
            with self._boost((prepared.plan.old.pid,)):
                await save_state(qmp, prepared.plan, limit, gone=gone, moved_bytes=prepared.moved_bytes)
        except (HandOverFailed, QmpFailed, OSError) as error:
            reason = await error_of_migration(qmp, _ERROR_S)
            raise FreezeFailed(guest.vm, f"{error}; QEMU said: {reason}" if reason else str(error)) from error

    # -- the way out ----------------------------------------------------------------------------------------

    async def recover(self, guest: Guest, until: float) -> Condition:
        """Try until the guest runs or is gone, or ``until``. One try at a time, however many wait for it."""
        state: Condition = "held"
        plan = guest.plan()
        again_s = _AGAIN_S
        while plan is not None:
            trying = self._recoveries.get(guest.vm)
            if trying is None:
                trying = asyncio.get_running_loop().run_in_executor(self._threads, _try_recovery, plan)
                self._recoveries[guest.vm] = trying
                trying.add_done_callback(lambda _: self._recoveries.pop(guest.vm, None))
            done, _ = await asyncio.wait({trying}, timeout=max(until - time.monotonic(), 0.001))
            if done:
                state, why = trying.result()
                if state in ("running", "gone"):
                    return state
                guest.last_error = why
                await asyncio.sleep(again_s)
                again_s = min(again_s * 2, _LONGEST_AGAIN_S)
            if time.monotonic() >= until:
                return state
        return "gone"

    async def settle(self, guest: Guest) -> None:
        """The guest runs: find out in which process, and continue with that one."""
        prepared = guest.prepared
        if prepared is None:
            return
        owner = await in_thread("claims", lambda: _owner(prepared.plan))
        former = guest.run or await in_thread("run file", lambda: self._records.read(guest.vm))
        if former is None or (owner is not None and owner.kind in ("file", "left", "gone")):
            return
        if owner is not None and owner.kind == "new":
            pid, start_ticks = owner.pid, owner.start_ticks
        else:
            pid, start_ticks = prepared.plan.old.pid, prepared.plan.old.start_ticks
        restore_priority(pid)  # a previous run may have been killed while it was boosted
        if guest.run is not None and guest.run.pid == pid and guest.qmp is not None and not guest.qmp.closed:
            return
        try:
            run = former
            # A pid is one of its boot: after a change of the kernel the guest's new process may well have the old one's.
            if (pid, start_ticks, boot_id()) != (former.pid, former.start_ticks, former.boot_id):
                run = await in_thread("look at it", lambda: run_of(former, pid, start_ticks))
        except NoVmm as error:
            guest.last_error = str(error)
            return  # it ended since: the next query reports it
        present = None
        if prepared.qmp is not None and prepared.qmp.listener == pid and not prepared.qmp.closed:
            present, prepared.qmp = prepared.qmp, None
        try:
            if run is not former:
                await in_thread_to_its_end("link sockets", lambda _: link_sockets(run))
            await guest.attach(run, present)
        except (NotAttached, OSError) as error:
            guest.last_error = str(error)
            _log.error("vm.not_attached", vm=guest.vm, pid=pid, why=guest.last_error)
        await in_thread_to_its_end("run file", lambda _: self._write(guest.vm, run))
        _log.info("vm.settled", vm=guest.vm, pid=pid, owner=owner.text if owner is not None else "old")

    def _publish(self, guest: Guest, run: VmProcessRecord) -> None:
        """The new process's sockets get the names that everybody knows. Blocking."""
        try:
            link_sockets(run)
        except OSError as error:
            guest.last_error = f"its sockets could not be renamed: {error}"
            _log.error("vm.sockets_not_renamed", vm=guest.vm, why=guest.last_error)
        self._write(guest.vm, run)

    def _write(self, vm: str, run: VmProcessRecord) -> None:
        try:
            self._records.write(vm, run)
        except OSError as error:
            # The claims say the same until the operation is released, and the sockets after it.
            _log.error("vm.run_file_not_written", vm=vm, why=str(error))

    # -- afterwards -----------------------------------------------------------------------------------------

    async def release(self, guest: Guest) -> None:
        """The operation is over: the process that does not have the guest is ended, and what was prepared is removed."""
        prepared = guest.prepared
        if prepared is None:
            return
        if not await self._is_settled(guest, prepared):
            prepared.over = True
            _log.error("vm.not_released", vm=guest.vm, operation=prepared.operation, why=guest.last_error)
            return
        loop = asyncio.get_running_loop()
        owner = await loop.run_in_executor(self._threads, end_losers, prepared.plan)
        if owner is None:
            prepared.over = True
            _log.error("vm.not_released", vm=guest.vm, operation=prepared.operation)
            return
        guest.prepared = None
        if prepared.qmp is not None:
            await prepared.qmp.close()
        if prepared.watch is not None:
            prepared.watch.close()
            reap(prepared.watch.pid)
        await self.restore_capabilities(guest)
        present, own = (
            guest.run,
            self._launcher.own_files(guest.vm, prepared.operation, across=prepared.method == "kexec"),
        )

        def clean_up() -> None:
            run = present or self._records.read(guest.vm)
            forget(guest.vm, run, prepared.folder, own, self._records, new=owner.kind == "new")

        await in_thread(f"release {guest.vm}", clean_up)

    async def _is_settled(self, guest: Guest, prepared: Prepared) -> bool:
        """Whether the process that has the guest is the VM for us: a new one has no other sockets than those that go now."""
        found = await self.holder(prepared)
        if found is None or found[0] == prepared.plan.old.pid:
            return True
        if guest.run is None or guest.run.pid != found[0]:
            await self.settle(guest)
        return guest.run is not None and guest.run.pid == found[0]

    async def holder(self, prepared: Prepared) -> tuple[int, int] | None:
        """The living process that has the guest; None: none, or it is not known."""
        try:
            return await in_thread(f"holder of {prepared.plan.vm}", lambda: holder(prepared.plan))
        except OSError:
            return None

    async def restore_capabilities(self, guest: Guest) -> None:
        """What our migrations need must not stay set for somebody else's next one. Called again until it is done."""
        kept = self._launcher.usual_capabilities(guest.vm)
        if guest.qmp is None or guest.qmp.closed or not kept.exists():
            return
        try:
            await restore_capabilities(guest.qmp, _read_capabilities(kept))
        except QmpFailed as error:
            _log.warning("vm.migration_capabilities_not_restored", vm=guest.vm, why=str(error))
            return
        remove_files(kept)
        with suppress(OSError):
            kept.parent.rmdir()  # of a VM whose sockets are elsewhere

    async def _begin(
        self, guest: Guest, prepared: Prepared, qmp: AsyncQmp, capabilities: Mapping[str, bool]
    ) -> None:
        """The last look while the guest runs: what was compared must be what is handed over. Then it is begun, and noted.

        Raises:
            HandOverFailed: it was changed since it was compared.
            QmpFailed, OSError: it cannot be asked, or nothing can be written down.
        """
        if (status := await qmp.status()) != "running":
            raise HandOverFailed(f"is {status} before anything was done")
        seen = prepared.seen
        if seen is not None:
            now = await read_snapshot(qmp)
            wrong = [*now.busy, *now.blockers, *differences(now, seen, "")]
            if wrong:
                raise HandOverFailed(f"it was changed since it was compared: {'; '.join(wrong)}")
        kept = self._launcher.usual_capabilities(guest.vm)
        if not kept.exists():  # else those of an operation that is still to be restored
            kept.write_bytes(msgspec.json.encode(await read_capabilities(qmp)))
        claims.note(prepared.plan.claims, "begun")
        prepared.begun = True
        await set_capabilities(qmp, capabilities)

    def _dispose(self, pid: int, qmp: AsyncQmp | None, watch: ExitWatch | None) -> None:
        """Reap a process that was killed, and close its connection, while the guest runs on elsewhere."""
        if watch is not None:
            watch.close()
        with suppress(ProcessLookupError):
            ExitWatch(pid, lambda: None)  # reaps it and closes itself
        if qmp is not None:
            task = asyncio.create_task(qmp.close())
            self._cleanup_tasks.add(task)
            task.add_done_callback(self._cleanup_tasks.discard)

    async def close(self) -> None:
        """Wait for what is still being closed."""
        if self._cleanup_tasks:
            await asyncio.wait(self._cleanup_tasks)
        if self._recoveries:
            await asyncio.wait(self._recoveries.values())


def _read_capabilities(path: Path) -> dict[str, bool]:
    """Empty, QEMU's default, where it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, bool])
    except (OSError, msgspec.DecodeError):
        return {}


def _at(name: str, watch: QmpEventWatch) -> float | None:
    """When QEMU last said this, on CLOCK_MONOTONIC."""
    return next((event.at for event in reversed(watch.events) if event.name == name), None)


def _try_recovery(plan: ResumePlan) -> tuple[Condition, str]:
    """One try of the way out, in a thread: what came of it, and why no more."""
    why = ""
    try:
        if not isinstance(plan, QemuPlan) or condition(plan) != "running":
            resume_vm(plan)
        return condition(plan), why
    except OSError as error:
        why = str(error)
    try:
        return condition(plan), why
    except OSError as error:
        return "held", f"{why}; {error}"


def _owner(plan: SwapPlan | ReplacePlan) -> claims.Owner | None:
    return claims.current(plan.claims)[1] if Path(plan.claims).is_dir() else heir(plan)
