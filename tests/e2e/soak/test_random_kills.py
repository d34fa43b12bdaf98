"""Random kills and hangs of everything during rollouts, for a minute: what the kernel saw keeps the rules.

The seed is printed with a failure and can be given: ``CAESURA_SOAK_SEED=7 CAESURA_SOAK_S=300 pytest tests/e2e/soak``.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from caesura.bus.local_broker import LocalBroker
from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura_coordinator.records import Rollout
from caesura_coordinator.store import CoordinatorStore
from caesura_ctl.errors import NoBroker, NoCoordinatorAnswer
from caesura_ctl.session import new_request_id
from caesura_testing.sandbox import Vm

_SECONDS = float(os.environ.get("CAESURA_SOAK_S", "60"))
_SEED = int(os.environ.get("CAESURA_SOAK_SEED", "0")) or random.randrange(1, 1_000_000)
REPEAT_WITH = {"CAESURA_SOAK_S": f"{_SECONDS:g}", "CAESURA_SOAK_SEED": str(_SEED)}
_BUDGET_S = 8.0
_SLACK_S = 0.3  # s: the watch looks a hundred times a second, on a machine that may be busy
_HOSTS = ("host-1", "host-2", "host-3")


class Chaos:
    """One harm at a time, each undone by the end of its own call."""

    def __init__(self, stage: Any, broker: LocalBroker, dice: random.Random) -> None:
        self.stage = stage
        self.sandbox = stage.sandbox
        self.broker = broker
        self.dice = dice
        self.done: list[str] = []

    async def strike(self) -> None:
        """Do one harm, chosen at random."""
        host = self.dice.choice(_HOSTS)
        harms: list[tuple[str, Callable[[str], Awaitable[None]]]] = [
            ("kill coordinator", self._kill_coordinator),
            ("kill updater", self._kill_updater),
            ("kill guard", self._kill_guard),
            ("kill updater and guard", self._kill_both),
            ("kill broker", self._kill_broker),
            ("stop updater", self._stop_updater),
            ("stop coordinator", self._stop_coordinator),
            ("kill coordinator and updater", self._kill_coordinator_and_updater),
            ("abort", self._abort),
        ]
        name, harm = self.dice.choice(harms)
        self.done.append(f"{time.monotonic():.2f} {name} {host}")
        await harm(host)

    async def _kill_coordinator(self, _: str) -> None:
        await self.sandbox.kill("coordinator")
        await asyncio.sleep(self.dice.choice([0.0, 0.0, 2.0]))
        await self.sandbox.start("coordinator")

    async def _kill_updater(self, host: str) -> None:
        await self.sandbox.kill(host)
        await asyncio.sleep(self.dice.choice([0.0, 0.0, 2.0]))
        await self.sandbox.start(host)

    async def _kill_guard(self, host: str) -> None:
        try:
            os.kill(self.sandbox.guard_pid(host), signal.SIGKILL)
        except (LookupError, ProcessLookupError):
            self.done.append("(there was none)")

    async def _kill_both(self, host: str) -> None:
        self.sandbox.signal(host, signal.SIGSTOP)  # so that it starts no other guard in between
        await self._kill_guard(host)
        await self.sandbox.kill(host)
        await self.sandbox.start(host)  # as a service manager does

    async def _kill_broker(self, _: str) -> None:
        await self.broker.kill()
        await asyncio.sleep(self.dice.choice([0.0, 3.0]))
        await self.broker.start()

    async def _stop_updater(self, host: str) -> None:
        await self._stopped(host, self.dice.choice([0.5, 3.0, 9.0]))

    async def _stop_coordinator(self, _: str) -> None:
        await self._stopped("coordinator", self.dice.choice([0.5, 5.0]))

    async def _stopped(self, name: str, seconds: float) -> None:
        self.sandbox.signal(name, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            self.sandbox.signal(name, signal.SIGCONT)

    async def _kill_coordinator_and_updater(self, host: str) -> None:
        await asyncio.gather(self._kill_coordinator(host), self._kill_updater(host))

    async def _abort(self, _: str) -> None:
        await asked(self.stage, lambda: m.AbortRequested(request=new_request_id()), tries=1)


async def asked(stage: Any, make: Callable[[], Any], tries: int = 6) -> m.RequestAnswered | None:
    """Ask until there is an answer; the same request each time, so that it has one effect."""
    request = make()
    for _ in range(tries):
        try:
            return await stage.session.ask(request)  # type: ignore[no-any-return]
        except (NoCoordinatorAnswer, NoBroker):
            continue
    return None


@pytest.mark.timeout(_SECONDS + 240)
async def test_no_rule_is_broken_whatever_dies(stages: Callable[..., Any], broker: LocalBroker) -> None:
    dice = random.Random(_SEED)
    stage = await stages(
        host_1=[Vm(name="web-1", set="web"), Vm(name="db-1", set="db", update_domain=1)],
        host_2=[Vm(name="web-2", set="web", update_domain=1), Vm(name="db-2", set="db")],
        host_3=[Vm(name="web-3", set="web", update_domain=2), Vm(name="lone")],
    )
    seen: dict[str, list[int]] = defaultdict(list)

    async def note(received: Received) -> None:
        if isinstance(received.message, m.SetDocument):
            seen[received.message.set].append(received.message.incarnation)

    stage.session.post.listeners.append(note)
    chaos = Chaos(stage, broker, dice)
    ends: list[str] = []
    try:
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end:
            ends.append(await _one_rollout(stage, chaos, dice))
            _assert_kernel(stage)
        await _all_over(stage)
        _assert_kernel(stage)
        _assert_record(stage, seen)
    except BaseException:
        print(f"seed {_SEED}; rollouts {ends}; harms:", *chaos.done, sep="\n  ")  # noqa: T201 - a failure without its seed is no use
        raise
    print(  # noqa: T201 - what was tried
        f"seed {_SEED}: {len(ends)} rollouts {ends}, {len(chaos.done)} harms, {len(stage.sandbox.watch.pauses)} pauses"
    )


async def _one_rollout(stage: Any, chaos: Chaos, dice: random.Random) -> str:
    """Start a rollout, do harm in it, and bring it to an end; what end that was."""
    policy = stage.policy(budget_s=_BUDGET_S, notice_s=0.5, verify_timeout_s=12.0, on_not_ready="proceed")
    answer = await asked(
        stage,
        lambda: m.RolloutRequested(
            request=new_request_id(), update="patch", policy=policy, limits=m.Limits(again=True)
        ),
    )
    if answer is None or not answer.accepted:
        # A host is still coming back, or the rollout before holds the sets: that is what a refusal is for.
        await asked(stage, lambda: m.AbortRequested(request=new_request_id()), tries=1)
        await asyncio.sleep(0.5)
        return f"refused: {answer.reason if answer else 'no answer'}"
    rollout = answer.rollout
    for _ in range(dice.choice([1, 1, 2, 3])):
        await asyncio.sleep(dice.uniform(0.0, 4.0))
        await chaos.strike()
    status = await _end_of(stage, rollout)
    if status == "halted" and dice.random() < 0.6:
        await asked(stage, lambda: m.ResumeRequested(request=new_request_id(), rollout=rollout))
        await asyncio.sleep(dice.uniform(0.5, 3.0))
        status = await _end_of(stage, rollout)
    if status == "halted":
        await asked(stage, lambda: m.AbortRequested(request=new_request_id(), rollout=rollout))
    return status


async def _end_of(stage: Any, rollout: str) -> str:
    def over() -> bool:
        state = stage.rollout(rollout)
        return state is not None and state.status in {"completed", "halted", "aborted"}

    # Longest: a host that never reports is waited for 30 s window + budget + 30 s grace.
    await stage.sandbox.until(over, 110, f"the end of rollout {rollout}")
    return str(stage.rollout(rollout).status)


def _assert_kernel(stage: Any) -> None:
    """I1 and I2, as the kernel showed them."""
    stage.assert_order()
    late = [
        f"{each.vm} {each.ended - each.begun:.2f} s"
        for each in stage.sandbox.watch.pauses
        if each.ended is not None and each.ended - each.begun > _BUDGET_S + _SLACK_S
    ]
    assert not late, f"over the budget of {_BUDGET_S} s: {late}"


async def _all_over(stage: Any) -> None:
    """Everything is well again, nothing runs, nothing stands still."""
    for rollout, state in list(stage.fleet_view.rollouts.items()):
        if state.status not in {"completed", "aborted"}:
            await asked(stage, lambda name=rollout: m.AbortRequested(request=new_request_id(), rollout=name))  # type: ignore[misc]
    await stage.none_frozen()
    await stage.ready(*_HOSTS)
    await stage.sandbox.until(
        lambda: (
            all(state.status in {"completed", "aborted"} for state in stage.fleet_view.rollouts.values())
            and not any(document.events for document in stage.fleet_view.documents.values())
        ),
        100,
        "all rollouts and events at their end",
    )


def _assert_record(stage: Any, seen: dict[str, list[int]]) -> None:
    """I6 and I7: what was published, and what the coordinator keeps."""
    for name, incarnations in seen.items():
        assert incarnations == sorted(incarnations), f"the document of {name} went back: {incarnations}"
    for event_id, facts in stage.fleet_view.events.items():
        ends = {each.status for each in facts} & {"completed", "cancelled", "failed"}
        assert len(ends) <= 1, f"event {event_id} ended {ends}"
    store = CoordinatorStore(f"{stage.sandbox.folder}/coordinator/coordinator.sqlite")
    rollouts: list[Rollout] = store.rollouts()
    store.database.close()
    open_events = [
        event.event_id
        for rollout in rollouts
        for wave in rollout.waves
        for event in wave.events
        if event.status in {"scheduled", "started"}
    ]
    assert rollouts
    assert not open_events
