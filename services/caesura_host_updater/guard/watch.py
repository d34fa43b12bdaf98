"""What the guard does with an armed operation: wait, fire, keep enforcing. No sockets here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal, Protocol

from caesura_host_updater.guard.intent import Catch, Fired, Intent
from caesura_host_updater.guard.plans import Condition, Plan, SignalPlan, condition, thaw
from caesura_host_updater.guard.procfs import Process, process_table

_RETRY_S = 0.005  # s: between two looks at VMs that do not run yet
_ENFORCE_S = 0.02  # s: between two looks while a late freeze of a stopped updater may still come
_ENFORCE_IDLE_S = 0.1  # s: the same, after a minute of that: a process table costs milliseconds
_STORE_RETRY_S = 1.0  # s: between two tries to write down what was done on a full disk

State = Literal["ready", "armed", "firing", "fired"]
Log = Callable[..., None]


class GuardRefusal(Exception):
    """The guard will not do what it was asked; the text says why."""


class Store(Protocol):
    """Where the intent is kept; ``IntentFile`` is the real one."""

    def store(self, intent: Intent) -> None:
        """Make it durable. Raises OSError."""

    def clear(self) -> None:
        """Forget it. Raises OSError."""


class Watch:
    """One operation at a time: armed, then disarmed or fired.

    After it fired, it goes on holding "nothing of this operation stands still" until the operation is
    disarmed or its owner is dead: an updater that was stopped between its last check and its freeze call
    may freeze a VM long after the deadline.

    Args:
        store: where intents are kept.
        clock: seconds on CLOCK_MONOTONIC.
        look: the condition of a VM; injected by tests only, like ``release``.
        release: lets a VM run.
    """

    def __init__(
        self,
        store: Store,
        log: Log,
        *,
        clock: Callable[[], float] = time.monotonic,
        look: Callable[[Plan, Mapping[int, Process] | None], Condition] = condition,
        release: Callable[[Plan, Mapping[int, Process] | None], None] = thaw,
    ) -> None:
        self._store = store
        self._log = log
        self._clock = clock
        self._look = look
        self._release = release
        self._intent: Intent | None = None
        self._owner_gone = False
        self._seen_running: dict[str, float] = {}
        self._unstored_since: float | None = None

    @property
    def intent(self) -> Intent | None:
        """The operation in the guard's hands."""
        return self._intent

    @property
    def state(self) -> State:
        """``ready`` for another operation, or where the present one is."""
        if self._intent is None:
            return "ready"
        if self._intent.fired is None:
            return "armed"
        return "fired" if self._intent.fired.done else "firing"

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
        self._owner_gone = False
        self._seen_running = {}

    def adopt(self, intent: Intent) -> None:
        """Go on with an intent found on disk at start: whoever armed it cannot be trusted to undo it."""
        self._intent = intent
        self._owner_gone = True
        before, intent.fired = intent.fired, None
        self.fire(before.why if before else "the guard started and found it armed")
        if before is not None:
            # What was written down before our time is closer to the truth than what we found now.
            self._keep(before)

    def _keep(self, before: Fired) -> None:
        intent = self._intent
        if intent is None or intent.fired is None:
            return
        intent.fired.at = before.at
        intent.fired.vms.update({vm: catch for vm, catch in before.vms.items() if catch.end})
        self._save()

    def owner_gone(self, *, dead: bool) -> None:
        """The updater's connection ended, or its process did (``dead``)."""
        if self._intent is None:
            return
        if self._intent.fired is None:
            self.fire("the host updater died" if dead else "the host updater closed its connection")
        if dead and not self._owner_gone:
            self._owner_gone = True
            self._sweep()  # its last act may have been a freeze

    def fire(self, why: str) -> None:
        """Resume everything of the operation, now."""
        intent = self._intent
        if intent is None or intent.fired is not None:
            return
        intent.fired = Fired(why, self._clock(), {plan.vm: Catch(was_frozen=False) for plan in intent.plans})
        self._sweep()
        self._log("guard.fired", operation=intent.operation, why=why, state=self.state)

    def disarm(self, operation: str) -> dict[str, Any] | None:
        """The operation is over. Its intent is returned if the guard had to fire, else None.

        Raises:
            GuardRefusal: a VM of it stands still (the guard fires then), or the disk refused.
        """
        intent = self._intent
        if intent is None or intent.operation != operation:
            return None
        table = self._table(intent)
        if intent.fired is None and any(self._held(plan, table) for plan in intent.plans):
            self.fire("disarmed while a VM stood still")
        self.step()
        if intent.fired is not None and not intent.fired.done:
            stuck = [vm for vm, catch in intent.fired.vms.items() if not catch.end]
            raise GuardRefusal(f"not running yet: {', '.join(stuck)}")
        try:
            self._store.clear()
        except OSError as error:
            raise GuardRefusal(f"cannot clear the intent: {error.strerror or error}") from error
        self._intent = None
        return None if intent.fired is None else intent.to_json()

    def step(self) -> float | None:
        """Do what is due; seconds until there may be more to do, None for nothing to wait for."""
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
        if not fired.done or not self._owner_gone:
            self._sweep()
        if self._unstored_since is not None and now - self._unstored_since > _STORE_RETRY_S:
            self._save()
        if not fired.done:
            return _RETRY_S
        if not self._owner_gone:
            return _ENFORCE_S if now - fired.at < 60 else _ENFORCE_IDLE_S
        return _STORE_RETRY_S if self._unstored_since is not None else None

    def _sweep(self) -> None:
        """Look at every VM once, let go what stands still, write down what changed."""
        intent = self._intent
        if intent is None or intent.fired is None:
            return
        table = self._table(intent)
        held = {plan.vm: self._held(plan, table) for plan in intent.plans}
        for plan in intent.plans:
            if held[plan.vm]:
                self._let_go(plan, table)
        table = self._table(intent) if any(held.values()) else table
        changed = False
        for plan in intent.plans:
            changed |= self._note(plan, intent.fired.vms[plan.vm], held[plan.vm], table)
        if changed and intent.fired.done:
            self._save()

    def _note(self, plan: Plan, catch: Catch, was_held: bool, table: Mapping[int, Process] | None) -> bool:
        before = asdict(catch)
        now = self._clock()
        if was_held:
            if not catch.was_frozen:
                catch.frozen_after = self._seen_running.get(plan.vm)
            catch.was_frozen, catch.end, catch.running_at = True, "", None
        state = self._condition(plan, table)
        if state in ("running", "gone"):
            self._seen_running[plan.vm] = now
            if not catch.end:
                catch.end, catch.running_at = state, now
        return asdict(catch) != before

    def _held(self, plan: Plan, table: Mapping[int, Process] | None) -> bool:
        return self._condition(plan, table) not in ("running", "gone")

    def _condition(self, plan: Plan, table: Mapping[int, Process] | None) -> Condition:
        try:
            return self._look(plan, table)
        except OSError as error:
            self._log("guard.look_failed", vm=plan.vm, why=str(error))
            return "held"  # cannot tell: treat it as standing still

    def _let_go(self, plan: Plan, table: Mapping[int, Process] | None) -> None:
        try:
            self._release(plan, table)
        except OSError as error:
            self._log("guard.resume_failed", vm=plan.vm, why=str(error))

    def _table(self, intent: Intent) -> Mapping[int, Process] | None:
        return process_table() if any(isinstance(plan, SignalPlan) for plan in intent.plans) else None

    def _save(self) -> None:
        if self._intent is None:
            return
        try:
            self._store.store(self._intent)
        except OSError as error:
            if self._unstored_since is None:
                self._log("guard.record_failed", operation=self._intent.operation, why=str(error))
            self._unstored_since = self._clock()
        else:
            self._unstored_since = None
