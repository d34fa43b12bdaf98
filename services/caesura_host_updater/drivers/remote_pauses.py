"""What drivers need whose pauses another process carries out (an engine, a daemon): a pause that comes late, one resume at a time."""

from __future__ import annotations

import asyncio
import json
import operator
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import Worker, in_thread
from caesura_host_updater.drivers.port import NotRunningYet
from caesura_vmcontrol.durable_files import write_durably
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.resume_plans import ResumePlan, plan_from_json, plan_to_json
from caesura_vmcontrol.vm_control import condition, resume_vm

_LATE_S = 600.0
"""s: how long a pause that was not answered is looked for: a request that was accepted may take effect later."""
_ASK_AGAIN_S = 60.0  # s: between two questions whether one can still come
_SUFFIX = ".late"

P = TypeVar("P", bound=ResumePlan)
T = TypeVar("T")

_log = get_logger("caesura.driver")


class LatePauses(Generic[P]):
    """Pauses that were asked for and not answered, on disk, too; one that is carried out after all is undone, once.

    Args:
        plan_of: how the VM of a noted plan is resumed now; None: it does not run, or nobody says. Then the noted plan counts.
        who: what carries pauses out, for the log.
        folder: where they are noted.
        is_same_life: whether two plans are of the same process.
        is_excluded: whether the pause of a VM that runs cannot come any more, asked after ``_LATE_S``; left out: then it cannot. Blocking.
    """

    def __init__(
        self,
        plan_of: Callable[[P], P | None],
        who: str,
        folder: Path,
        is_same_life: Callable[[P, P], bool] = operator.eq,
        is_excluded: Callable[[P], bool] = lambda _: True,
    ) -> None:
        self._plan_of = plan_of
        self._who = who
        self._folder = folder
        self._is_same_life = is_same_life
        self._is_excluded = is_excluded
        self._expected: dict[str, P] = {}
        """The life that was to be paused."""
        self._ask_at: dict[str, float] = {}
        """When it is asked whether that can still come."""
        self._locks: dict[str, threading.Lock] = {}
        """Each is held while a pause of that VM is undone."""
        self._disk = Worker("late pauses")

    async def open(self, kind: type[P]) -> None:
        """Look for those that a previous run of this boot expected."""
        for plan in await in_thread("late pauses", lambda: _read(self._folder, kind)):
            self._expected[plan.vm], self._ask_at[plan.vm] = plan, time.monotonic() + _LATE_S

    async def close(self, patience_s: float = 1.0) -> None:
        """Complete what is being noted, for ``patience_s`` seconds at most."""
        await self._disk.close(patience_s)

    def __contains__(self, vm: str) -> bool:
        return vm in self._expected

    def forget(self, plan: P) -> bool:
        """A new pause of it begins; whether one was expected, under whatever name. In a thread: waits until one of it that is being undone is over."""
        vms = [vm for vm, life in list(self._expected.items()) if self._is_same_life(life, plan)]
        was_expected = False
        for vm in {plan.vm, *vms}:
            with self._lock_of(vm):
                was_expected |= self._pop(vm)
        return was_expected

    def forget_resumed(self, vm: str) -> None:
        """Its pause was seen, and it runs: nothing is late any more. Never waits: who resumed it takes the time right after."""
        self._pop(vm)

    def _lock_of(self, vm: str) -> threading.Lock:
        return self._locks.setdefault(vm, threading.Lock())

    def _pop(self, vm: str) -> bool:
        if self._expected.pop(vm, None) is None:
            return False
        self._disk.post(lambda: self._note(vm, None))
        return True

    def expect(self, plan: P) -> None:
        """A pause of it was not answered."""
        self._ask_at[plan.vm] = time.monotonic() + _LATE_S
        self._expected[plan.vm] = plan
        note = json.dumps({"boot_id": boot_id(), "plan": plan_to_json(plan)}).encode()
        self._disk.post(lambda: self._note(plan.vm, note))

    def _note(self, vm: str, note: bytes | None) -> None:
        name = f"{vm}{_SUFFIX}"
        try:
            if note is None:
                (self._folder / name).unlink(missing_ok=True)
            else:
                write_durably(str(self._folder), name, note)
        except OSError as error:
            _log.warning("vm.late_pause_not_noted", vm=vm, why=str(error))

    async def undo(self) -> None:
        """Resume what was paused late, and forget what cannot be paused late any more.

        One of which nobody says anything stays noted: a VM that is not listed may be paused all the same.
        """
        await asyncio.gather(*(self._undo_one(vm, life) for vm, life in list(self._expected.items())))

    async def _undo_one(self, vm: str, life: P) -> None:
        plan = self._plan_of(life)
        if plan is not None and not self._is_same_life(life, plan):
            self._pop(vm)
            return
        is_due = time.monotonic() > self._ask_at[vm]
        with suppress(OSError):
            if await self._in_thread(vm, self._undo, plan or life):
                _log.error("vm.paused_late", vm=vm, hint=f"{self._who} carried out a pause that had failed")
            elif is_due:
                await self._in_thread(vm, self._exclude, plan or life)

    @staticmethod
    async def _in_thread(vm: str, work: Callable[[str, P], T], plan: P) -> T:
        return await in_thread(f"late pause of {vm}", lambda: work(vm, plan))

    def _exclude(self, vm: str, plan: P) -> None:
        with self._lock_of(vm):  # the question may be a resume, and our next pause may have begun since
            if vm not in self._expected:
                return
            self._ask_at[vm] = time.monotonic() + _ASK_AGAIN_S
            if self._is_excluded(plan):
                self._pop(vm)

    def _undo(self, vm: str, plan: P) -> bool:
        with self._lock_of(vm):
            # Our next pause may have begun since.
            if vm not in self._expected or condition(plan) in ("running", "gone"):
                return False
            resume_vm(plan)
            # It came: the next pause is somebody else's.
            if condition(plan) in ("running", "gone"):
                self._pop(vm)
            return True


def _read(folder: Path, kind: type[P]) -> list[P]:
    found: list[P] = []
    for file in folder.glob(f"*{_SUFFIX}"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            noted: dict[str, Any] = json.loads(file.read_bytes())
            plan = plan_from_json(noted["plan"])
            if noted["boot_id"] == boot_id() and isinstance(plan, kind):
                found.append(plan)
                continue
        with suppress(OSError):
            file.unlink()
    return found


class ResumeTries(Generic[T]):
    """One try at a time for each VM: while another process keeps one waiting, no further request is sent after it."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Future[T]] = {}

    async def resume(self, vm: str, timeout_s: float, work: Callable[[], T], silent: str) -> T:
        """What ``work`` returns, in a thread; the try that is under way, if there is one.

        Raises:
            NotRunningYet: not within ``timeout_s`` seconds; the text begins with ``silent``.
        """
        trying = self._under_way.get(vm)
        if trying is None or trying.done():
            trying = asyncio.ensure_future(in_thread(f"resume {vm}", work))
            self._under_way[vm] = trying
        done, _ = await asyncio.wait([trying], timeout=timeout_s)
        if not done:
            raise NotRunningYet(vm, f"{silent} within {timeout_s:g} s")
        self._under_way.pop(vm, None)
        return trying.result()
