"""What the guard does with an armed operation: wait, fire, keep enforcing. No sockets here."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any, Literal, Protocol

from caesura_vmcontrol import claims
from caesura_vmcontrol.bounded_calls import BoundedCalls
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.intent import GuardAction, Intent, Intervention
from caesura_vmcontrol.kernel_change import VmArrival
from caesura_vmcontrol.probes import ASKING_PLANS, ProbeResult, SocketProbes
from caesura_vmcontrol.procfs import Process, process_table
from caesura_vmcontrol.resume_plans import ResumePlan, SignalPlan
from caesura_vmcontrol.vm_control import condition, resume_vm

_RETRY_S = 0.005  # s: between two looks at VMs that do not run yet
_ENFORCE_S = 0.02  # s: between two looks while a late freeze of a stopped updater may still arrive
_ENFORCE_IDLE_S = 0.1  # s: the same, after a minute of that: a process table costs milliseconds
_ENFORCE_QEMU_S = 0.1  # s: the same for VMs that are asked over a socket: a thread and two queries each time
_LATE_S = 2.0
"""How long the guard keeps enforcing after its owner's death, in seconds: the owner's requests may take effect later.

QEMU carries out a ``stop`` that waits in its socket, and pauses the guest at the end of a migration that was begun: both
within milliseconds on an idle host, a device's state of some megabytes within a second on a busy one.
"""
_LOOK_ROUND_S = 0.8  # s: how long an acknowledgement waits for QEMU guests: each is queried for half a second
_LAST_ROUND_S = 0.3  # s: and for rounds that are under way; both together well under the updater's patience
_STORE_RETRY_S = 1.0  # s: between two tries to record what was done on a full disk

_STORE_S = 0.5  # s: an fsync on a busy disk; every VM runs or is gone by then
_STORE = ""
"""The key of a call that writes the intent; no VM has this name."""

State = Literal["ready", "armed", "firing", "fired"]
Log = Callable[..., None]


class GuardRefusal(Exception):
    """The guard refuses the request; the text gives the reason."""


class IntentStore(Protocol):
    """Where the intent is kept; ``IntentFile`` is the real one."""

    def store(self, intent: Intent) -> None:
        """Make it durable. Raises OSError."""

    def clear(self) -> None:
        """Remove it. Raises OSError."""


class Watchdog:
    """One operation at a time: armed, then disarmed or fired.

    After it fired, it enforces "nothing of this operation is paused" until the operation is disarmed or its owner is
    dead: an updater that was stopped between its last check and its freeze call may freeze a VM long after the deadline.

    A look shows nothing of what happens after it began. So each event after which a VM may be paused (the guard fires, the
    owner dies, a disarm, the guard's own end) demands another whole look at every VM, and neither the pause between two looks
    nor a look that is under way replaces it.

    Args:
        store: where intents are kept.
        clock: seconds on CLOCK_MONOTONIC.
        look: the condition of a VM; injected by tests only, like ``release``.
        release: resumes a VM.
    """

    def __init__(
        self,
        store: IntentStore,
        log: Log,
        *,
        clock: Callable[[], float] = time.monotonic,
        look: Callable[[ResumePlan, Mapping[int, Process] | None], Condition] = condition,
        release: Callable[[ResumePlan, Mapping[int, Process] | None], None] = resume_vm,
    ) -> None:
        self._store = store
        self._log = log
        self._clock = clock
        self._look = look
        self._release = release
        self._intent: Intent | None = None
        self._owner_died_at: float | None = None
        self._seen_running: dict[str, float] = {}
        self._seen_at_disarm: set[str] = set()
        """The VMs that are asked over a socket, of which somebody has said since the first disarm that they run."""
        self._unstored_since: float | None = None
        self._probes = SocketProbes(look, release, clock, log)
        self._calls = BoundedCalls()
        self._complaints: dict[tuple[str, str], str] = {}
        """The last log line of each VM, by event: one that hangs is looked at every few milliseconds."""

    @property
    def intent(self) -> Intent | None:
        """The operation that the guard holds."""
        return self._intent

    @property
    def state(self) -> State:
        """``ready`` for another operation, or the state of the present one."""
        if self._intent is None:
            return "ready"
        if self._intent.fired is None:
            return "armed"
        return "fired" if self._intent.fired.done and not self._probes.pending else "firing"

    @property
    def at_rest(self) -> bool:
        """Whether there is nothing to do before the next request: no operation, or one whose VMs nobody is left to pause."""
        return self._intent is None or (self.state == "fired" and not self._may_be_paused_late())

    def _may_be_paused_late(self) -> bool:
        """Whether the owner lives, or died so recently that a request of its may still take effect."""
        return self._owner_died_at is None or self._clock() < self._owner_died_at + _LATE_S

    def arm(self, intent: Intent) -> None:
        """Take an operation; durable when this returns.

        Raises:
            GuardRefusal: another one is not acknowledged yet, its deadline passed, or the disk refused.
        """
        if self._intent is not None:
            raise GuardRefusal(f"operation {self._intent.operation} is {self.state} and not acknowledged")
        if intent.deadline <= self._clock():
            raise GuardRefusal("the deadline has passed already")
        try:
            self._store.store(intent)
        except OSError as error:
            raise GuardRefusal(f"cannot write the intent: {error.strerror or error}") from error
        self._intent = intent
        self._owner_died_at = None
        self._unstored_since = None
        self._reset()

    def adopt(self, intent: Intent, why: str = "the guard started and found it armed") -> None:
        """Undo an intent found on disk at start: the updater that armed it cannot be trusted to undo it."""
        self._intent = intent
        self._owner_died_at = self._clock()
        self._reset()
        before = intent.fired
        if before is None:
            self.fire(why)
            return
        # What was recorded before our start is closer to the truth than what we find now; what is paused again since
        # is found by the looks that follow.
        self._seen_running = {
            vm: intervention.running_at
            for vm, intervention in before.vms.items()
            if intervention.running_at is not None
        }
        vms = {plan.vm: before.vms.get(plan.vm) or Intervention(was_frozen=False) for plan in intent.plans}
        self._begin(intent, GuardAction(before.why, before.at, vms))

    def _reset(self) -> None:
        self._seen_running = {}
        self._seen_at_disarm = set()
        self._probes = SocketProbes(self._look, self._release, self._clock, self._log)

    def owner_gone(self, *, dead: bool) -> None:
        """The updater's connection ended, or its process did (``dead``)."""
        if self._intent is None:
            return
        is_news = dead and self._owner_died_at is None
        if is_news:
            self._owner_died_at = self._clock()
        if self._intent.fired is None:
            self.fire("the host updater died" if dead else "the host updater closed its connection")
        elif is_news:
            self.look_again()  # its last act may have been a freeze

    def record(self) -> None:
        """Write the intent as it is now. Raises OSError."""
        if self._intent is not None:
            self._store.store(self._intent)

    def fire(self, why: str) -> None:
        """Resume everything of the operation, now."""
        intent = self._intent
        if intent is None or intent.fired is not None:
            return
        vms = {plan.vm: Intervention(was_frozen=False) for plan in intent.plans}
        self._begin(intent, GuardAction(why, self._clock(), vms))

    def _begin(self, intent: Intent, fired: GuardAction) -> None:
        intent.fired = fired
        self.look_again()
        self._log("guard.fired", operation=intent.operation, why=fired.why, state=self.state)
        if _is_rehearsal_that_did_not_leave(intent):
            self._forget()

    def _forget(self) -> None:
        """Nobody is left to acknowledge it, and nothing was paused: it must not keep the next operation out."""
        try:
            self._store.clear()
        except OSError as error:
            self._log("guard.not_cleared", why=str(error))
            return  # its owner, or the updater's next start, acknowledges it
        self._intent = None

    def look_again(self) -> None:
        """Something happened: if the guard fired, look at every VM once more, whatever was seen before.

        Process guests are resumed whatever state they are in: one whose stop signal is still pending is seen running.
        """
        intent = self._intent
        if intent is None or intent.fired is None:
            return
        self._probes.demand(plan.vm for plan in intent.plans if isinstance(plan, ASKING_PLANS))
        self._sweep(release_all=True)

    def drop(self, operation: str, vms: Collection[str]) -> None:
        """The operation has not paused these VMs, and will not: one that is paused is not ours to resume. Durable when this returns.

        Raises:
            GuardRefusal: it is not armed, or has fired; or the disk refused, then they count until a restart of the guard.
        """
        intent = self._intent
        if intent is None or intent.operation != operation:
            raise GuardRefusal(f"operation {operation} is not armed")
        if intent.fired is not None:
            raise GuardRefusal("it has fired already")
        intent.plans = tuple(plan for plan in intent.plans if plan.vm not in vms)
        self._log("guard.dropped", operation=operation, vms=list(vms))
        self._save()
        if self._unstored_since is not None:
            raise GuardRefusal("that is not recorded: a guard that is started again would resume them")

    def disarm(self, operation: str) -> dict[str, Any] | None:
        """The operation is over. Its intent is returned if the guard had to fire, else None.

        Raises:
            GuardRefusal: a VM of it is paused (the guard fires then), nobody says in time whether one is, or the disk refused.
        """
        intent = self._intent
        if intent is None or intent.operation != operation:
            return None
        wait_s = _LAST_ROUND_S
        if intent.fired is not None:
            wait_s = _LOOK_ROUND_S
            self.look_again()  # the owner may have frozen something since the last look
        elif self._any_held(intent):
            self.fire("disarmed while a VM was paused")
        elif unseen := _asked(intent) - self._seen_at_disarm:
            # A daemon that is slow, too, comes here: nothing is known yet that would be undone. Until all have answered the deadline holds.
            raise GuardRefusal(f"nobody has said yet whether it runs: {', '.join(sorted(unseen))}")
        until = time.monotonic() + wait_s
        for _ in range(2):  # a round that began earlier is awaited first; then follows the one that counts
            self.step()
            # A round that is still under way could resume a VM that the next operation has frozen.
            self._record_results(intent, self._probes.ended(max(until - time.monotonic(), 0)))
            if not self._probes.pending:
                break
        under_way = self._calls.under_way
        if _STORE in under_way:
            raise GuardRefusal("the record is still being written")
        stuck = set(self._probes.under_way | self._probes.pending | under_way)
        if intent.fired is not None:
            stuck |= {vm for vm, intervention in intent.fired.vms.items() if not intervention.end}
        if stuck:
            raise GuardRefusal(f"not running yet: {', '.join(sorted(stuck))}")
        try:
            self._store.clear()
        except OSError as error:
            raise GuardRefusal(f"cannot clear the intent: {error.strerror or error}") from error
        self._intent = None
        return None if intent.fired is None else intent.to_json()

    def step(self) -> float | None:
        """Do what is due; returns the seconds until more may be due, None if there is nothing to wait for."""
        intent = self._intent
        if intent is None:
            return None
        now = self._clock()
        if intent.fired is None:
            if now < intent.deadline:
                return intent.deadline - now
            self.fire("the deadline passed")
        fired = intent.fired
        assert fired is not None  # noqa: S101 - fire() sets it
        self._record_results(intent, self._probes.ended())
        if not self.at_rest:
            self._sweep()
        if self._unstored_since is not None and now - self._unstored_since > _STORE_RETRY_S:
            self._save()
        if self.state == "firing" or self._probes.under_way:
            return _RETRY_S
        if self._owner_died_at is None:
            return _ENFORCE_S if now - fired.at < 60 else _ENFORCE_IDLE_S
        if self._may_be_paused_late():
            return _ENFORCE_IDLE_S
        return _STORE_RETRY_S if self._unstored_since is not None else None

    def _sweep(self, *, release_all: bool = False) -> None:
        """Look at every VM once, resume what is paused, record what changed.

        ``release_all``: resume every process guest, including those that are seen running.

        Process guests at once, all with one process table; QEMU guests each in a round of its own, whose result
        is recorded when it has ended.
        """
        intent = self._intent
        if intent is None or intent.fired is None:
            return
        for plan in intent.plans:
            if isinstance(plan, ASKING_PLANS):
                ended = bool(intent.fired.vms[plan.vm].end)
                self._probes.begin(plan, pause_s=_ENFORCE_QEMU_S if ended else 0)
        plans = [plan for plan in intent.plans if not isinstance(plan, ASKING_PLANS)]
        self._calls.begin_sweep()
        table = self._table(intent)
        held = {plan.vm: self._held(plan, table) for plan in plans}
        for plan in plans:
            if held[plan.vm] or release_all:
                self._release_vm(plan, table)
        table = self._table(intent) if any(held.values()) else table
        changed = False
        for plan in plans:
            state = self._condition(plan, table)
            changed |= self._note(plan.vm, held[plan.vm], state, self._clock())
        if changed and intent.fired.done:
            self._save()

    def _record_results(self, intent: Intent, rounds: list[ProbeResult]) -> None:
        """Record what rounds of QEMU guests have found."""
        changed = False
        for each in rounds:
            if intent.fired is None or each.only_look:
                continue  # a look that a disarm has asked for decides nothing
            intervention = intent.fired.vms[each.vm]
            before = intervention.end
            changed |= intervention.owner != each.owner
            intervention.owner = each.owner
            changed |= self._note(each.vm, each.was_held, each.state, each.at)
            if each.why_not:
                intervention.end, intervention.running_at = (
                    "",
                    None,
                )  # not complete whatever it does: try again
                continue
            changed |= self._note_arrival(intent, each.vm, each.state, each.at)
            if intervention.end and not before:
                self._log("guard.vm_settled", vm=each.vm, end=intervention.end, owner=intervention.owner)
        if changed and intent.fired is not None and intent.fired.done:
            self._save()

    def _any_held(self, intent: Intent) -> bool:
        """Whether a VM of an operation that did not fire is paused, or nobody can say; not: nobody has said yet."""
        asked = _asked(intent)
        for plan in intent.plans:
            if plan.vm in asked - self._seen_at_disarm:
                self._probes.begin(plan, only_look=True)
        self._calls.begin_sweep()
        table = self._table(intent)
        if any(self._held(plan, table) for plan in intent.plans if plan.vm not in asked):
            return True
        looks = self._probes.ended(_LOOK_ROUND_S)
        self._seen_at_disarm |= {each.vm for each in looks}
        return any(each.was_held or each.why_not for each in looks)

    def _note_arrival(self, intent: Intent, vm: str, state: Condition, at: float) -> bool:
        """After a change of the kernel: a guest that could not be resumed at the arrival, and now is; whether it is new."""
        arrival = intent.kernel_change.arrival if intent.kernel_change is not None else None
        if arrival is None or state not in ("running", "gone"):
            return False
        before = arrival.vms.get(vm)
        if before is not None and before.end != "undecided":
            return False
        owner = claims.Owner("gone")
        fired = intent.fired.vms[vm] if intent.fired is not None else None
        if fired is not None and fired.owner:
            owner = claims.parse_owner(fired.owner)
        arrival.vms[vm] = VmArrival(
            "running" if state == "running" else "lost",
            time.time() - (self._clock() - at) if state == "running" else None,
            owner.pid,
            owner.start_ticks,
            "" if before is None else before.why,
        )
        return True

    def _note(self, vm: str, was_held: bool, state: Condition, at: float) -> bool:
        """Record what was found of one VM; whether it is new."""
        if self._intent is None or self._intent.fired is None:
            return False
        intervention = self._intent.fired.vms[vm]
        before = asdict(intervention)
        if was_held or state not in ("running", "gone"):
            if not intervention.was_frozen:
                intervention.frozen_after = self._seen_running.get(vm)
            intervention.was_frozen, intervention.end, intervention.running_at = True, "", None
        if state in ("running", "gone"):
            self._seen_running[vm] = at
            if not intervention.end or (intervention.end, state) == (
                "gone",
                "running",
            ):  # it was only believed to be gone
                intervention.end, intervention.running_at = state, at
        return asdict(intervention) != before

    def _held(self, plan: ResumePlan, table: Mapping[int, Process] | None) -> bool:
        return self._condition(plan, table) not in ("running", "gone")

    def _condition(self, plan: ResumePlan, table: Mapping[int, Process] | None) -> Condition:
        try:
            found = self._calls.call(plan.vm, lambda: self._look(plan, table))
        except OSError as error:
            self._complain("guard.look_failed", plan.vm, str(error))
            return "held"  # unknown: treat it as paused
        self._complaints.pop(("guard.look_failed", plan.vm), None)
        return found

    def _release_vm(self, plan: ResumePlan, table: Mapping[int, Process] | None) -> None:
        try:
            self._calls.call(plan.vm, lambda: self._release(plan, table))
        except OSError as error:
            self._complain("guard.resume_failed", plan.vm, str(error))
        else:
            self._complaints.pop(("guard.resume_failed", plan.vm), None)

    def _complain(self, event: str, vm: str, why: str) -> None:
        if self._complaints.get((event, vm)) != why:
            self._complaints[event, vm] = why
            self._log(event, vm=vm, why=why)

    def _table(self, intent: Intent) -> Mapping[int, Process] | None:
        if not any(isinstance(plan, SignalPlan) for plan in intent.plans):
            return None
        try:
            return process_table()
        except OSError:  # then each look and each release reads its own, or fails and is retried
            return None

    def _save(self) -> None:
        if self._intent is None:
            return
        record = copy.deepcopy(self._intent)  # a disk that hangs may read it long after we changed it
        try:
            self._calls.call(_STORE, lambda: self._store.store(record), _STORE_S)
        except OSError as error:
            if self._unstored_since is None:
                self._log("guard.record_failed", operation=self._intent.operation, why=str(error))
            self._unstored_since = self._clock()
        else:
            self._unstored_since = None


def _asked(intent: Intent) -> set[str]:
    return {plan.vm for plan in intent.plans if isinstance(plan, ASKING_PLANS)}


def _is_rehearsal_that_did_not_leave(intent: Intent) -> bool:
    """Of a kernel change without guests, which the command that armed it has ended before the kernel was left."""
    change = intent.kernel_change
    return change is not None and change.rehearsal and change.arrival is None and not intent.plans
