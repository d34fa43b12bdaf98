"""What runs already and is paused: a process with everything below it, or a cgroup. It is resumed, and ended only by an event that does."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.process.freezers import ProcessPlan, own_cgroups
from caesura_host_updater.spawn import ExitWatch
from caesura_rehearse.targets.pause import pids_of
from caesura_rehearse.targets.target import NoTarget
from caesura_vmcontrol.plan_errors import BadPlan
from caesura_vmcontrol.procfs import STOPPED, alive, process_table, read_process, send_signal
from caesura_vmcontrol.resume_plans import CgroupPlan, SignalPlan
from caesura_vmcontrol.vm_control import condition

_KILLED_S = 5.0  # s: for what was killed to be gone
_LOOK_S = 0.01  # s: between two looks at processes that are not our children

_log = get_logger("caesura.rehearse")


class RunningProcess:
    """A process that somebody else started, with everything below it.

    Raises:
        NoTarget: it does not exist, is not ours to signal, is paused already, or this process is below it.
    """

    restart_obstacle = "it was not started here"

    def __init__(self, vm: str, pid: int) -> None:
        self.vm = vm
        self.what = f"process {pid}"
        self.ended = asyncio.Event()
        self.exit_code: int | None = None
        self.on_exit: Callable[[], None] = lambda: None
        found = read_process(pid)
        if found is None or pid <= 1:
            raise NoTarget(f"there is no process {pid}")
        try:
            os.kill(pid, 0)
        except PermissionError:
            raise NoTarget(
                f"process {pid} belongs to another user: it cannot be paused without root"
            ) from None
        except ProcessLookupError:
            raise NoTarget(f"there is no process {pid}") from None
        if found.state == STOPPED:
            raise NoTarget(f"process {pid} is stopped already: resume it first (kill -CONT {pid})")
        self._pid, self._start_ticks = pid, found.start_ticks
        if os.getpid() in {each.pid for each in self._bare().members(process_table())}:
            raise NoTarget(f"process {pid} has started this command: it would pause itself")
        self._watch = ExitWatch(pid, self._over, reap=False)

    def _over(self) -> None:
        self.ended.set()
        self.on_exit()

    def _bare(self) -> SignalPlan:
        return SignalPlan(self.vm, self._pid, self._start_ticks)

    async def start(self) -> None:
        """It runs already."""

    def plan(self) -> ProcessPlan:
        """As in ``Target``."""
        if not alive(self._pid, self._start_ticks):
            raise NoTarget(f"{self.what} does not run any more")
        others = tuple((each.pid, each.start_ticks) for each in self._bare().members(process_table()))
        return SignalPlan(self.vm, self._pid, self._start_ticks, others)

    async def end(self, grace_s: float, *, again: bool = False) -> None:  # noqa: ARG002 - as in the protocol
        """As in ``Target``."""
        try:
            plan = await in_thread(self.what, self.plan)
        except NoTarget:
            return
        send_signal(self._pid, self._start_ticks, signal.SIGTERM)
        await _until_gone(plan, grace_s)

    def hurry(self) -> None:
        """It is not ended with us."""

    async def close(self, grace_s: float) -> None:  # noqa: ARG002 - as in the protocol
        """Stop watching it."""
        self._watch.close()


class RunningCgroup:
    """All processes of a cgroup, v1 or v2, and of those below it.

    Raises:
        NoTarget: it has no freezer, may not be written to, is empty, is paused already, or this process is in it.
    """

    restart_obstacle = "it was not started here"

    def __init__(self, vm: str, folder: Path) -> None:
        self.vm = vm
        self.what = f"cgroup {folder}"
        self.ended = asyncio.Event()
        self.exit_code: int | None = None
        self.on_exit: Callable[[], None] = lambda: None
        real = folder.resolve()
        kinds: tuple[tuple[Literal["cgroup2", "cgroup1"], str], ...] = (
            ("cgroup2", "cgroup.freeze"),
            ("cgroup1", "freezer.state"),
        )
        for kind, name in kinds:
            if (real / name).exists():
                try:
                    self._plan = CgroupPlan(vm, kind, str(real / name))
                except BadPlan as error:
                    raise NoTarget(str(error)) from error
                break
        else:
            raise NoTarget(
                f"{folder} is not a cgroup that can be frozen: it has neither cgroup.freeze nor freezer.state"
            )
        if not os.access(self._plan.control, os.W_OK):
            raise NoTarget(f"{folder} cannot be frozen by this user")
        state = condition(self._plan)
        if state == "gone":
            raise NoTarget(f"{folder} has no processes")
        if state != "running":
            raise NoTarget(f"{folder} is frozen already: thaw it first")
        own = own_cgroups(Path("/proc/self/cgroup").read_text(encoding="utf-8")).get(kind)
        if os.getpid() in pids_of(self._plan):
            raise NoTarget(f"this command runs in {folder} (its own is {own}): it would pause itself")

    async def start(self) -> None:
        """It runs already."""

    def plan(self) -> ProcessPlan:
        """As in ``Target``."""
        if condition(self._plan) == "gone":
            self.ended.set()
            raise NoTarget(f"{self.what} has no processes any more")
        return self._plan

    async def end(self, grace_s: float, *, again: bool = False) -> None:  # noqa: ARG002 - as in the protocol
        """As in ``Target``: SIGTERM for each of its processes."""
        await in_thread(self.what, lambda: _signal_all(self._plan, signal.SIGTERM))
        await _until_gone(self._plan, grace_s)
        self.ended.set()

    def hurry(self) -> None:
        """It is not ended with us."""

    async def close(self, grace_s: float) -> None:
        """Nothing to do: it is resumed after each pause."""


async def _until_gone(plan: ProcessPlan, grace_s: float) -> None:
    until, killed = time.monotonic() + grace_s, False
    while await in_thread("look", lambda: condition(plan)) != "gone":
        if time.monotonic() > until:
            if killed:
                _log.warning("target.not_gone", vm=plan.vm)
                return
            killed, until = True, time.monotonic() + _KILLED_S
            await in_thread("kill", lambda: _signal_all(plan, signal.SIGKILL))
        await asyncio.sleep(_LOOK_S)  # the kernel notifies only the parent


def _signal_all(plan: ProcessPlan, number: signal.Signals) -> None:
    for pid in pids_of(plan):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
