"""QEMU guests, domains of libvirt and containers are probed and resumed side by side: one round each in a thread, so that one whose QEMU, daemon or engine
hangs delays no other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from caesura_vmcontrol import qemu_control
from caesura_vmcontrol.container_engine import EnginePlan
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.procfs import Process
from caesura_vmcontrol.qemu_plans import QemuPlan, ReplacePlan, SwapPlan
from caesura_vmcontrol.resume_plans import ResumePlan

_BACK_OFF_S = 0.25  # s: the longest wait between two rounds of a VM that cannot be made to run
_FIRST_S = 0.005

VMM_PLANS = (QemuPlan, SwapPlan, ReplacePlan)
ASKING_PLANS = (*VMM_PLANS, EnginePlan, LibvirtPlan)
"""Those whose way out asks another process, which may hang."""
Look = Callable[[ResumePlan, Mapping[int, Process] | None], Condition]
Release = Callable[[ResumePlan, Mapping[int, Process] | None], None]


@dataclass(frozen=True)
class ProbeResult:
    """The result of one round. ``at``: when it ended, seconds on CLOCK_MONOTONIC."""

    vm: str
    was_held: bool
    state: Condition
    at: float
    owner: str = ""
    tries: tuple[str, ...] = ()
    why_not: str = ""
    """The reason of a round that could not make the guest run."""
    only_look: bool = False
    """It looked and did nothing else; the operation may be undecided."""


class SocketProbes:
    """The rounds of one operation's VMs that are asked over a socket; at most one under way for each.

    The first round of a guest always brings its operation to a decision, even while the guest runs: a swap that was not
    begun yet must not be begun later by an updater that wakes up.
    """

    def __init__(
        self, look: Look, release: Release, clock: Callable[[], float], log: Callable[..., None]
    ) -> None:
        self._log = log
        self._last_reasons: dict[str, str] = {}
        self._tries: dict[str, int] = {}
        self._look = look
        self._release = release
        self._clock = clock
        self._done: SimpleQueue[ProbeResult] = SimpleQueue()
        self._under_way: set[str] = set()
        self._pending: set[str] = set()
        self._fresh: set[str] = set()
        """The VMs whose round under way is a whole one that began after it was demanded."""
        self._decided: set[str] = set()
        self._not_before: dict[str, float] = {}
        self._wait_s: dict[str, float] = {}

    @property
    def under_way(self) -> frozenset[str]:
        """The VMs whose rounds have not ended yet."""
        return frozenset(self._under_way)

    @property
    def pending(self) -> frozenset[str]:
        """The VMs whose demanded round has not yet ended with a guest that runs or is gone."""
        return frozenset(self._pending)

    def demand(self, vms: Iterable[str]) -> None:
        """Something happened: what was seen of these VMs before may no longer be true.

        Each is owed a whole round that begins from now on. No pause between rounds delays it, and a round that is under
        way, or one that only looks, does not count.
        """
        named = frozenset(vms)
        self._pending |= named
        self._fresh -= named

    def begin(self, plan: ResumePlan, *, only_look: bool = False, pause_s: float = 0) -> None:
        """Start a round unless one is under way or it is too early for another.

        ``pause_s``: the least time since the last one ended, unless one was demanded since.
        """
        vm = plan.vm
        if vm in self._under_way:
            return
        not_before = self._not_before.get(vm, 0) + (0 if vm in self._pending else pause_s)
        if not only_look and self._clock() < not_before:
            return
        self._under_way.add(vm)
        if not only_look:
            self._fresh.add(vm)
        decide = vm not in self._decided
        work = threading.Thread(
            target=self._go, args=(plan, only_look, decide), name=f"round of {vm}", daemon=True
        )
        try:
            work.start()
        except RuntimeError:  # the host cannot start a thread: one after the other is better than not at all
            self._go(plan, only_look, decide)

    def ended(self, wait_s: float = 0) -> list[ProbeResult]:
        """The rounds that have ended since the last call; waits up to ``wait_s`` seconds until none is under way."""
        until = time.monotonic() + wait_s
        found: list[ProbeResult] = []
        while self._under_way:
            try:
                last = self._done.get(timeout=max(until - time.monotonic(), 0))
            except Empty:
                break
            self._under_way.discard(last.vm)
            if last.vm in self._fresh:
                self._fresh.discard(last.vm)
                if not last.why_not and last.state in ("running", "gone"):
                    self._pending.discard(last.vm)
            found.append(last)
            self._pace(last)
            self._log_failures(last)
        return found

    def _log_failures(self, last: ProbeResult) -> None:
        """Log what failed, each reason once."""
        for why in last.tries[self._tries.get(last.vm, 0) :]:
            self._log("guard.try_failed", vm=last.vm, why=why)
        self._tries[last.vm] = max(len(last.tries), self._tries.get(last.vm, 0))
        if last.why_not and self._last_reasons.get(last.vm) != last.why_not:
            self._log("guard.resume_failed", vm=last.vm, why=last.why_not)
        self._last_reasons[last.vm] = last.why_not

    def _pace(self, last: ProbeResult) -> None:
        longer_s = min(self._wait_s.get(last.vm, 0) * 2 or _FIRST_S, _BACK_OFF_S)
        wait_s = longer_s if last.why_not else 0
        self._wait_s[last.vm] = wait_s
        self._not_before[last.vm] = last.at + wait_s

    def _go(self, plan: ResumePlan, only_look: bool, decide: bool) -> None:
        """In a thread: nothing here may raise, or the VM would count as under way indefinitely."""
        was_held, owner, why_not = True, "", ""
        state: Condition = "held"
        tries: list[str] = []
        try:
            try:
                state = self._look(plan, None)
            except Exception:
                # Nobody says whether it is paused: then it is released. There may be a way for that where none is to look.
                if only_look:
                    raise
            was_held = state not in ("running", "gone")
            if not only_look and (was_held or decide or not _settled(plan)):
                try:
                    self._release(plan, None)
                    self._decided.add(plan.vm)
                finally:
                    tries = qemu_control.tries(plan) if isinstance(plan, VMM_PLANS) else []
                state = self._look(plan, None)
            owner = qemu_control.owner_of(plan) if isinstance(plan, VMM_PLANS) else ""
        except Exception as error:  # noqa: BLE001 - see above; whatever it was is logged
            why_not = str(error) or type(error).__name__
            state = "held"
        self._done.put(
            ProbeResult(plan.vm, was_held, state, self._clock(), owner, tuple(tries), why_not, only_look)
        )


def _settled(plan: ResumePlan) -> bool:
    return qemu_control.settled(plan) if isinstance(plan, VMM_PLANS) else True
