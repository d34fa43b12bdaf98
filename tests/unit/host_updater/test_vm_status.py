"""What is retained about a VM is what is so, whatever comes in which order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.contract import messages as m
from caesura_host_updater.vm_status import VmStatuses
from caesura_testing.collector import eventually

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def record(state: m.VmState = "running", **changes: Any) -> m.VmRecord:
    return m.VmRecord(**{"vm": "a", "set": "web", "update_domain": 1, "state": state, **changes})


def frozen(seconds: float, operation: str = "o1") -> m.VmFrozen:
    return m.VmFrozen(
        vm="a",
        host="h",
        set="web",
        update_domain=1,
        operation=operation,
        method="freeze",
        budget_s=10.0,
        at=at(seconds),
    )


def resumed(seconds: float, pause_s: float = 2.0, operation: str = "o1") -> m.VmResumed:
    return m.VmResumed(
        vm="a",
        host="h",
        set="web",
        update_domain=1,
        operation=operation,
        method="freeze",
        pause_s=pause_s,
        budget_s=10.0,
        within_budget=True,
        resumed_by="updater",
        at=at(seconds),
    )


class Scene:
    """A host's statuses, and what a broker retains of them."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.statuses = VmStatuses("h", ["a"], MessageClient(self.bus, "/caesura/host/h"), now=lambda: T0)
        self.seen: dict[str, m.VmStatus] = {}
        self.count = 0
        self.ear = MemoryBus(self.broker, filters=["caesura/v1/host/+/vm/+/status"])
        self.post = MessageClient(self.ear, "/caesura/test")
        self.post.subscribe(m.VmStatus, self._on)
        self.post.on_tombstone(m.VmStatus, self._gone)

    async def _on(self, message: m.VmStatus, _: Any) -> None:
        self.seen[message.vm] = message
        self.count += 1

    async def _gone(self, parameters: Any) -> None:
        self.seen.pop(parameters["vm"], None)

    async def until(self, **wanted: Any) -> m.VmStatus:
        def there() -> bool:
            status = self.seen.get("a")
            return status is not None and all(
                getattr(status, name) == value for name, value in wanted.items()
            )

        await eventually(there)
        return self.seen["a"]


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    tasks = [
        asyncio.create_task(made.bus.run(MessageClient(made.bus, "/x").deliver)),
        asyncio.create_task(made.ear.run(made.post.deliver)),
    ]
    assert await made.ear.wait_connected(10)
    tasks.append(asyncio.create_task(made.statuses.run()))
    yield made
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_pause_from_its_beginning_to_its_end(scene: Scene) -> None:
    scene.statuses.observe([record()])
    assert (await scene.until(state="running")).last_pause is None
    scene.statuses.frozen(frozen(1.0))
    status = await scene.until(state="paused")
    assert (status.paused_since, status.operation) == (at(1.0), "o1")
    scene.statuses.observe([record("running")], {"a"})  # an inventory that is a moment older
    scene.statuses.resumed(resumed(3.0))
    status = await scene.until(state="running")
    assert (status.paused_since, status.operation) == (None, "")
    assert status.last_pause is not None
    assert (status.last_pause.pause_s, status.last_pause.at) == (2.0, at(3.0))
    assert scene.count == 3, "what did not change is not said again"
    assert await scene.statuses.drained(10)


async def test_a_vm_that_ended_in_its_pause_is_not_paused_for_good(scene: Scene) -> None:
    scene.statuses.frozen(frozen(1.0))
    await scene.until(state="paused")
    scene.statuses.observe([record("stopped")])
    status = await scene.until(state="stopped")
    assert (status.paused_since, status.operation) == (None, "")


async def test_a_pause_by_somebody_else_is_not_called_ours(scene: Scene) -> None:
    scene.statuses.observe([record("paused", state_detail="resume it with `cont`")])
    status = await scene.until(state="paused")
    assert (status.paused_since, status.operation, status.state_detail) == (None, "", "resume it with `cont`")


async def test_an_old_fact_changes_nothing(scene: Scene) -> None:
    scene.statuses.resumed(resumed(3.0))
    scene.statuses.frozen(frozen(5.0, "o2"))
    await scene.until(state="paused")
    scene.statuses.resumed(resumed(3.0))
    assert await scene.statuses.drained(10)
    assert scene.seen["a"].operation == "o2"
    scene.statuses.resumed(resumed(6.0, 1.0, "o2"))
    scene.statuses.resumed(resumed(3.0))
    status = await scene.until(state="running")
    assert status.last_pause is not None
    assert status.last_pause.operation == "o2"


async def test_what_a_previous_run_published_is_taken_up_or_removed(scene: Scene) -> None:
    last = m.LastPause(
        operation="o0", method="swap", pause_s=0.01, within_budget=True, resumed_by="updater", at=at(-9)
    )
    was = m.VmStatus(vm="a", host="h", set="web", update_domain=1, state="paused", last_pause=last, at=at(-9))
    gone = m.VmStatus(vm="b", host="h", set="web", update_domain=1, state="running", at=at(-9))
    post = MessageClient(scene.ear, "/caesura/test")
    await post.send(was, host="h", vm="a")
    await post.send(gone, host="h", vm="b")
    await eventually(lambda: set(scene.seen) == {"a", "b"})
    scene.statuses.observe([record()])
    scene.statuses.published_earlier(was)
    scene.statuses.published_earlier(gone)
    status = await scene.until(state="running", last_pause=last)
    assert status.paused_since is None
    await eventually(lambda: set(scene.seen) == {"a"})


async def test_a_broker_that_lost_everything_has_it_again(scene: Scene) -> None:
    scene.statuses.observe([record()])
    await scene.until(state="running")
    scene.seen.clear()
    scene.statuses.connected()
    await scene.until(state="running")
