"""A whole agent on a bus in memory, with real hooks and a real (simulated) guest clock; the host is played here."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
import msgspec
import pytest

from caesura.bus.local_broker import LocalBroker, free_port
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Bus, Delivery
from caesura.contract.codec import decode
from caesura.contract.envelope import Header, Message
from caesura.contract.messages import (
    SECONDS_MOST,
    AgentClockSynced,
    AgentPresence,
    ClockSyncAnswered,
    ClockSyncRequested,
    HookFinished,
    ScheduledEvent,
    SetDocument,
    VmReady,
    VmResumed,
)
from caesura_testing.patience import patient
from caesura_vm_agent.guest_clock import ClockError
from caesura_vm_agent.ntp import NS_PER_S
from caesura_vm_agent.service import VmAgent, filters
from caesura_vm_agent.settings import VmAgentSettings

M = TypeVar("M", bound=Message)


class Guest:
    """A guest clock of the test's making: off by ``error_ns``, steppable unless told otherwise."""

    simulated = True

    def __init__(self) -> None:
        self.error_ns = 0
        self.steppable = True
        self.steps: list[int] = []

    def now_ns(self) -> int:
        return time.time_ns() + self.error_ns

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def step(self, by_ns: int) -> None:
        if not self.steppable:
            raise ClockError("not permitted")
        self.steps.append(by_ns)
        self.error_ns += by_ns

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()


class Host:
    """Plays host updater and coordinator, and hears what the agent says."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.post = MessageClient(bus, "/caesura/host/host-1")
        self.heard: list[tuple[Header, Message]] = []
        self.answers: Callable[[ClockSyncRequested], Awaitable[None]] = self.answer
        self._news = asyncio.Event()

    async def receive(self, delivery: Delivery) -> None:
        t2_ns = time.time_ns()
        received = decode(delivery.topic, delivery.payload)
        if isinstance(received.message, ClockSyncRequested):
            self.t2_ns = t2_ns
            await self.answers(received.message)
        self.heard.append((received.header, received.message))
        self._news.set()

    async def answer(self, request: ClockSyncRequested) -> None:
        answer = ClockSyncAnswered(
            vm=request.vm,
            host="host-1",
            exchange=request.exchange,
            t1_ns=request.t1_ns,
            t2_ns=self.t2_ns,
            t3_ns=time.time_ns(),
        )
        await self.post.send(answer, host="host-1", vm=request.vm)

    async def silent(self, _: ClockSyncRequested) -> None:
        """Answer nothing."""

    def all(self, message: type[M], **wanted: object) -> list[M]:
        return [
            each
            for _, each in self.heard
            if isinstance(each, message) and all(getattr(each, k) == v for k, v in wanted.items())
        ]

    async def hears(self, message: type[M], *, count: int = 1, **wanted: object) -> M:
        async with asyncio.timeout(patient(15)):
            while len(found := self.all(message, **wanted)) < count:
                self._news.clear()
                await self._news.wait()
        return found[count - 1]

    async def announce(self, incarnation: int, *events: ScheduledEvent) -> None:
        await self.post.send(SetDocument(set="web", incarnation=incarnation, events=events), set="web")

    async def resumed(self, operation: str = "op1", event_id: str = "e1", pause_s: float = 9.0) -> None:
        message = VmResumed(
            vm="web-1",
            host="host-1",
            set="web",
            update_domain=2,
            operation=operation,
            event_id=event_id,
            method="freeze",
            pause_s=pause_s,
            budget_s=30,
            within_budget=True,
            resumed_by="updater",
            at=datetime.now(UTC),
        )
        await self.post.send(message, host="host-1", set="web", ud=2, vm="web-1")


def event(
    event_id: str = "e1", status: Literal["scheduled", "started"] = "scheduled", vm: str = "web-1"
) -> ScheduledEvent:
    return ScheduledEvent(
        event_id=event_id,
        event_type="Freeze",
        status=status,
        resources=(vm, "web-2"),
        not_before=datetime.now(UTC) + timedelta(seconds=60),
    )


@asynccontextmanager
async def running(*starts: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(start()) for start in starts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [each for each in ended if isinstance(each, Exception)]
        assert not failed, failed


class Scene:
    """One agent, its guest clock, the host and the broker."""

    def __init__(self, host: Host, broker: MemoryBroker, clock: Guest) -> None:
        self.host = host
        self.broker = broker
        self.clock = clock

    @asynccontextmanager
    async def agent(self, **settings: Any) -> AsyncIterator[VmAgent]:
        chosen = VmAgentSettings(
            **{
                "vm": "web-1",
                "set": "web",
                "update_domain": 2,
                "sync_answer_timeout_s": 0.2,
                "announce_interval_s": 0.1,
                "canary_bytes": 0,
                **settings,
            }
        )
        bus = MemoryBus(self.broker, client_id="agent", filters=filters(chosen), clean=False)
        agent = VmAgent(chosen, bus, self.clock, boot_id="boot-1")
        async with running(
            agent.run_bus,
            agent.run_hooks,
            agent.run_clock,
            agent.run_announcements,
            agent.run_canary,
            agent.run_presence,
            agent.run_publisher,
            self.clock.run,
        ):
            await self.host.hears(AgentPresence, online=True)
            yield agent
            await agent.drain()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    broker = MemoryBroker()
    host = Host(MemoryBus(broker, client_id="host", filters=("caesura/v1/vm/#",)))

    async def run() -> None:
        await host.bus.run(host.receive)

    async with running(run):
        assert await host.bus.wait_connected(patient(5))
        yield Scene(host, broker, Guest())
        await host.bus.close()


def script(tmp_path: Path, text: str) -> tuple[str, ...]:
    path = tmp_path / "hook.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return (str(path),)


# -- presence -------------------------------------------------------------------------------------------------


async def test_it_is_there_and_says_goodbye(scene: Scene) -> None:
    async with scene.agent():
        there = scene.host.all(AgentPresence)[0]
        assert (there.boot_id, there.clock) == ("boot-1", "simulated")
    await scene.host.hears(AgentPresence, online=False)
    assert scene.broker.retained.keys() >= {"caesura/v1/vm/web-1/presence"}


async def test_after_a_reconnect_presence_and_answers_are_said_again(scene: Scene) -> None:
    async with scene.agent(announce_interval_s=60):
        await scene.host.announce(1, event())
        await scene.host.hears(VmReady)
        scene.broker.kill("agent")
        await scene.host.hears(AgentPresence, count=2, online=True)
        await scene.host.hears(VmReady, count=2)


# -- readiness and hooks ------------------------------------------------------------------------------------------


async def test_without_a_hook_it_is_ready_and_repeats_itself_with_one_id(scene: Scene) -> None:
    async with scene.agent():
        await scene.host.announce(1, event())
        await scene.host.hears(VmReady, count=3, event_id="e1", ready=True)
        ids = {header.id for header, message in scene.host.heard if isinstance(message, VmReady)}
        assert len(ids) == 1
        assert not scene.host.all(HookFinished)


async def test_the_prepare_hook_runs_once_with_the_event_in_its_environment(
    scene: Scene, tmp_path: Path
) -> None:
    hook = script(
        tmp_path, f'echo "$CAESURA_EVENT_ID $CAESURA_VM $CAESURA_UPDATE_DOMAIN" | tee -a {tmp_path}/out'
    )
    async with scene.agent(prepare_hook=hook):
        for _ in range(3):
            await scene.host.announce(1, event())
        await scene.host.announce(2, event(), event("e2", vm="web-9"))
        finished = await scene.host.hears(HookFinished)
        assert (finished.hook, finished.outcome, finished.exit_code) == ("prepare", "succeeded", 0)
        assert finished.output_tail == "e1 web-1 2\n"
        await scene.host.hears(VmReady, event_id="e1", ready=True)
        await scene.host.announce(3, event(status="started"))
        await scene.host.announce(4, event(status="started"), event("e3"))
        assert (tmp_path / "out").read_text() == "e1 web-1 2\n", "one event at a time"
        await scene.host.announce(5, event("e3"))
        await scene.host.hears(VmReady, event_id="e3")
    assert (tmp_path / "out").read_text() == "e1 web-1 2\ne3 web-1 2\n"


async def test_a_failing_hook_means_not_ready_with_its_last_words(scene: Scene, tmp_path: Path) -> None:
    async with scene.agent(prepare_hook=script(tmp_path, "echo draining; echo no quorum >&2; exit 3")):
        await scene.host.announce(1, event())
        answer = await scene.host.hears(VmReady)
        assert not answer.ready
        assert answer.reason == "prepare hook ended with exit code 3: no quorum"
        assert (await scene.host.hears(HookFinished)).exit_code == 3


async def test_a_missing_hook_means_not_ready(scene: Scene) -> None:
    async with scene.agent(prepare_hook=("/nowhere/hook",)):
        await scene.host.announce(1, event())
        answer = await scene.host.hears(VmReady, ready=False)
        assert "/nowhere/hook" in answer.reason
        assert (await scene.host.hears(HookFinished)).outcome == "missing"


async def test_a_hook_that_hangs_is_killed_with_all_its_children(scene: Scene, tmp_path: Path) -> None:
    hook = script(tmp_path, f"trap '' TERM\nsleep 300 & echo $! > {tmp_path}/child\nwait; wait")
    async with scene.agent(prepare_hook=hook, prepare_timeout_s=0.5):
        await scene.host.announce(1, event())
        answer = await scene.host.hears(VmReady, ready=False)
        assert "within its time" in answer.reason
        assert (await scene.host.hears(HookFinished)).outcome == "timeout"
    child = int((tmp_path / "child").read_text())
    assert gone(child)


async def test_a_hook_that_leaves_a_daemon_holding_its_output_is_not_waited_for(
    scene: Scene, tmp_path: Path
) -> None:
    hook = script(tmp_path, f"sleep 300 & echo $! > {tmp_path}/child\necho done")
    async with scene.agent(prepare_hook=hook, prepare_timeout_s=10):
        began = time.monotonic()
        await scene.host.announce(1, event())
        finished = await scene.host.hears(HookFinished)
        assert (finished.outcome, finished.output_tail) == ("succeeded", "done\n")
        assert time.monotonic() - began < patient(5)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


async def test_the_output_kept_is_the_end_of_it(scene: Scene, tmp_path: Path) -> None:
    async with scene.agent(prepare_hook=script(tmp_path, "seq 1 200000; exit 1")):
        await scene.host.announce(1, event())
        finished = await scene.host.hears(HookFinished)
        assert finished.output_tail.endswith("\n199999\n200000\n")
        assert len(finished.output_tail) <= 2_000


async def test_a_cancelled_event_is_recovered_from(scene: Scene, tmp_path: Path) -> None:
    async with scene.agent(recover_hook=script(tmp_path, 'echo "$CAESURA_EVENT_ID/$CAESURA_OPERATION"')):
        await scene.host.announce(1, event())
        await scene.host.hears(VmReady)
        await scene.host.announce(2)
        finished = await scene.host.hears(HookFinished, hook="recover")
        assert finished.output_tail == "e1/\n"


async def test_draining_kills_a_running_hook(scene: Scene, tmp_path: Path) -> None:
    hook = script(
        tmp_path, f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 300"
    )
    async with scene.agent(prepare_hook=hook):
        await scene.host.announce(1, event())
        async with asyncio.timeout(patient(10)):
            while not (tmp_path / "pid").exists():  # noqa: ASYNC110 - a file has no event to wait for
                await asyncio.sleep(0.01)
    assert gone(int((tmp_path / "pid").read_text()))


def gone(pid: int) -> bool:
    """Whether a process ended; one that nobody reaped yet counts as ended."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


# -- the clock ------------------------------------------------------------------------------------------------


async def test_at_start_the_clock_is_put_right(scene: Scene) -> None:
    scene.clock.error_ns = 3 * NS_PER_S
    async with scene.agent():
        synced = await scene.host.hears(AgentClockSynced)
    assert synced.trigger == "start"
    assert synced.synced
    assert synced.simulated
    assert synced.boot_id == "boot-1"
    assert synced.error_before_s == pytest.approx(3, abs=0.05)
    assert synced.error_after_s == pytest.approx(0, abs=0.05)
    assert abs(scene.clock.error_ns) < 50_000_000
    assert synced.exchanges == 16


async def test_after_a_resume_first_the_clock_then_the_recover_hook(scene: Scene, tmp_path: Path) -> None:
    hook = script(tmp_path, 'echo "$CAESURA_EVENT_ID $CAESURA_OPERATION $CAESURA_PAUSE_S"')
    async with scene.agent(recover_hook=hook):
        await scene.host.hears(AgentClockSynced, trigger="start")
        scene.clock.error_ns = -9 * NS_PER_S
        await scene.host.resumed()
        synced = await scene.host.hears(AgentClockSynced, trigger="resume")
        assert (synced.operation, synced.synced) == ("op1", True)
        assert synced.error_before_s == pytest.approx(-9, abs=0.05)
        assert synced.uncertainty_s is not None
        assert 0 <= synced.uncertainty_s < 0.05
        finished = await scene.host.hears(HookFinished, hook="recover")
        assert finished.output_tail == "e1 op1 9.000000\n"
        assert kinds(scene.host, AgentClockSynced, HookFinished)[-2:] == [AgentClockSynced, HookFinished]


def kinds(host: Host, *wanted: type[Message]) -> list[type[Message]]:
    return [type(message) for _, message in host.heard if isinstance(message, wanted)]


async def test_a_repeated_resume_gets_the_same_result_and_nothing_is_done_again(
    scene: Scene, tmp_path: Path
) -> None:
    async with scene.agent(recover_hook=script(tmp_path, "echo once")):
        await scene.host.hears(AgentClockSynced, trigger="start")
        await scene.host.resumed()
        await scene.host.hears(HookFinished, hook="recover")
        asked = len(scene.host.all(ClockSyncRequested))
        await scene.host.resumed()
        again = await scene.host.hears(AgentClockSynced, count=2, operation="op1")
        assert again == scene.host.all(AgentClockSynced, operation="op1")[0]
        ids = {
            header.id
            for header, message in scene.host.heard
            if isinstance(message, AgentClockSynced) and message.operation == "op1"
        }
        assert len(ids) == 1
        assert len(scene.host.all(ClockSyncRequested)) == asked
        assert len(scene.host.all(HookFinished)) == 1


async def test_lost_answers_are_normal(scene: Scene) -> None:
    requests = 0

    async def most_are_lost(request: ClockSyncRequested) -> None:
        nonlocal requests
        requests += 1
        if requests % 3 == 0:
            await scene.host.answer(request)

    scene.host.answers = most_are_lost
    scene.clock.error_ns = NS_PER_S
    async with scene.agent(sync_answer_timeout_s=0.05):
        synced = await scene.host.hears(AgentClockSynced)
    assert synced.synced
    assert synced.exchanges == 5  # of twice eight


async def test_when_nobody_answers_it_does_not_try_all_its_exchanges(scene: Scene) -> None:
    scene.host.answers = scene.host.silent
    async with scene.agent(sync_answer_timeout_s=0.02, sync_exchanges=64, sync_interval_s=60):
        assert not (await scene.host.hears(AgentClockSynced)).synced
        assert len(scene.host.all(ClockSyncRequested)) == 4


async def test_an_answer_that_comes_late_does_not_count_for_another_exchange(scene: Scene) -> None:
    kept: list[ClockSyncRequested] = []

    async def one_behind(request: ClockSyncRequested) -> None:
        # Every exchange gets the answer to the one before it: far in the past by then.
        if kept:
            await scene.host.answer(kept.pop())
        kept.append(request)

    scene.host.answers = one_behind
    async with scene.agent(sync_answer_timeout_s=0.05, sync_exchanges=3):
        synced = await scene.host.hears(AgentClockSynced)
    assert (synced.synced, synced.exchanges) == (False, 0)
    assert "no answer" in synced.reason


async def test_answers_of_another_host_do_not_count(scene: Scene) -> None:
    async with scene.agent(host="host-2", sync_answer_timeout_s=0.05, sync_exchanges=2):
        synced = await scene.host.hears(AgentClockSynced)
    assert (synced.synced, synced.exchanges) == (False, 0)


async def test_a_clock_that_may_not_be_set_is_said_to_be_unsynced(scene: Scene) -> None:
    scene.clock.error_ns = 2 * NS_PER_S
    scene.clock.steppable = False
    async with scene.agent():
        synced = await scene.host.hears(AgentClockSynced)
    assert (synced.synced, synced.reason) == (False, "not permitted")
    assert synced.error_after_s == pytest.approx(2, abs=0.05)


async def test_a_periodic_sync_leaves_small_errors_alone(scene: Scene) -> None:
    async with scene.agent(sync_interval_s=0.05):
        await scene.host.hears(AgentClockSynced, trigger="start")
        steps = len(scene.clock.steps)
        scene.clock.error_ns = 20_000_000
        seen = len(scene.host.all(AgentClockSynced, trigger="periodic"))
        quiet = await scene.host.hears(AgentClockSynced, count=seen + 2, trigger="periodic")
        assert quiet.error_after_s == pytest.approx(0.02, abs=0.01)
        assert len(scene.clock.steps) == steps
        scene.clock.error_ns = 80_000_000
        seen = len(scene.host.all(AgentClockSynced, trigger="periodic"))
        mended = await scene.host.hears(AgentClockSynced, count=seen + 2, trigger="periodic")
        assert mended.error_after_s == pytest.approx(0, abs=0.01)


async def test_a_check_that_fell_due_in_a_pause_does_not_hide_what_the_pause_did(scene: Scene) -> None:
    async with scene.agent(sync_interval_s=0.3):
        await scene.host.hears(AgentClockSynced, trigger="start")
        seen = len(scene.host.all(AgentClockSynced, trigger="periodic"))
        scene.clock.error_ns = -2 * NS_PER_S
        steps = len(scene.clock.steps)
        await scene.host.hears(AgentClockSynced, count=seen + 2, trigger="periodic")
        assert len(scene.clock.steps) > steps, "mended before the agent is told of the pause"
        await scene.host.resumed(pause_s=9.0)
        synced = await scene.host.hears(AgentClockSynced, trigger="resume")
    assert synced.error_before_s == pytest.approx(-2, abs=0.05)
    assert synced.error_after_s == pytest.approx(0, abs=0.01)


async def test_a_pause_of_no_length_that_can_be_is_no_end_of_the_agent(scene: Scene) -> None:
    async with scene.agent() as agent:
        await scene.host.resumed(pause_s=1e300)
        await scene.host.resumed(operation="op-2", pause_s=SECONDS_MOST)
        assert (await scene.host.hears(AgentClockSynced, trigger="resume")).synced
        assert agent.decode_errors["malformed"] == 1, "beyond what the contract allows"


async def test_a_host_that_comes_late_is_found_soon(scene: Scene) -> None:
    scene.host.answers = scene.host.silent
    async with scene.agent(sync_answer_timeout_s=0.02, sync_exchanges=2, sync_interval_s=0.1):
        assert not (await scene.host.hears(AgentClockSynced)).synced
        scene.host.answers = scene.host.answer
        synced = await scene.host.hears(AgentClockSynced, synced=True)
        assert synced.trigger == "start"


async def test_a_slow_prepare_hook_does_not_hold_up_the_clock(scene: Scene, tmp_path: Path) -> None:
    async with scene.agent(prepare_hook=script(tmp_path, "exec sleep 300")):
        await scene.host.announce(1, event())
        await scene.host.resumed()
        assert (await scene.host.hears(AgentClockSynced, trigger="resume")).synced
        assert not scene.host.all(VmReady)


async def test_garbage_on_its_topics_changes_nothing(scene: Scene) -> None:
    async with scene.agent() as agent:
        for topic in ("caesura/v1/fleet/set/web/document", "caesura/v1/host/host-1/clock-sync/web-1"):
            await scene.host.bus.publish(topic, b"{nonsense")
        await scene.host.announce(1, event())
        await scene.host.hears(VmReady, event_id="e1")
        assert agent.decode_errors["malformed"] == 2


async def test_an_agent_without_health_does_not_load_a_web_server() -> None:
    code = "import sys, caesura_vm_agent.__main__; print(sorted({'aiohttp', 'prometheus_client'} & set(sys.modules)))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out.decode().strip() == "[]"


# -- the canary ---------------------------------------------------------------------------------------------


async def test_its_presence_says_when_the_canary_is_there_and_a_resume_is_answered_with_it(
    scene: Scene,
) -> None:
    async with scene.agent(canary_bytes=64 * 4096) as agent:
        there = await scene.host.hears(AgentPresence, online=True, canary_bytes=64 * 4096)
        assert there.canary_writes >= 64
        await scene.host.resumed()
        clock = await scene.host.hears(AgentClockSynced, trigger="resume")
        assert clock.canary is None, "no verdict on a clock waits for pages to be compared"
        answer = await scene.host.hears(AgentClockSynced, count=2, trigger="resume")
        assert answer.canary is not None
        assert msgspec.structs.replace(answer, canary=None) == clock
        assert (answer.canary.pages, answer.canary.bad_pages, answer.canary.detail) == (64, 0, "")
        assert answer.canary.writes >= there.canary_writes
        assert all(each.canary is None for each in scene.host.all(AgentClockSynced, trigger="start"))
        assert agent.canary.bad_pages == 0


async def test_pages_that_changed_in_a_pause_are_told_with_that_pause_and_not_with_the_next(
    scene: Scene,
) -> None:
    async with scene.agent(canary_bytes=64 * 4096) as agent:
        await scene.host.hears(AgentPresence, online=True, canary_bytes=64 * 4096)
        memory = agent.canary._memory
        memory[5 * 4096 : 6 * 4096] = bytes(4096)
        memory[9 * 4096 + 100] ^= 1
        await scene.host.resumed("op1")
        first = await scene.host.hears(AgentClockSynced, count=2, trigger="resume", operation="op1")
        assert first.canary is not None
        assert first.canary.bad_pages == 2
        assert "page 5 is zeroed" in first.canary.detail
        assert "page 9 is damaged" in first.canary.detail
        await scene.host.resumed("op1")  # repeated: the same answer, not "nothing is wrong any more"
        again = await scene.host.hears(AgentClockSynced, count=3, trigger="resume", operation="op1")
        assert again.canary == first.canary
        await scene.host.resumed("op2", event_id="e2")
        second = await scene.host.hears(AgentClockSynced, count=2, trigger="resume", operation="op2")
        assert second.canary is not None
        assert second.canary.bad_pages == 0
        assert agent.canary.bad_pages == 2


async def test_a_large_canary_holds_up_no_clock_sync(scene: Scene) -> None:
    """It is compared in slices: between them messages are received, so the answers of an exchange do not wait."""
    async with scene.agent(canary_bytes=4096 * 4096) as agent:
        await scene.host.hears(AgentPresence, online=True, canary_bytes=4096 * 4096)
        passes = 0

        async def count_passes() -> None:
            nonlocal passes
            while True:
                await asyncio.sleep(0)
                passes += 1

        counting = asyncio.create_task(count_passes())
        report = await agent.canary.report()
        counting.cancel()
        assert report is not None
        assert report.bad_pages == 0
        assert passes >= 5, "the event loop was held for the whole comparison"


# -- the real thing -------------------------------------------------------------------------------------------


async def test_a_frozen_agent_process_finds_its_clock_behind_by_the_pause_and_mends_it(
    broker_kind: Literal["mosquitto", "embedded"], tmp_path: Path
) -> None:
    async with LocalBroker(kind=broker_kind, data_dir=tmp_path) as broker:
        host = Host(MqttBus(BrokerOptions(url=broker.url), filters=("caesura/v1/vm/#",)))

        async def run() -> None:
            await host.bus.run(host.receive)

        health = f"127.0.0.1:{free_port()}"
        agent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "caesura_vm_agent",
            env={
                **os.environ,
                "CAESURA_VM_AGENT_VM": "web-1",
                "CAESURA_VM_AGENT_SET": "web",
                "CAESURA_VM_AGENT_BROKER_URL": broker.url,
                "CAESURA_VM_AGENT_CLOCK": "simulated",
                "CAESURA_VM_AGENT_HEALTH_LISTEN": health,
                "CAESURA_VM_AGENT_RECOVER_HOOK": json.dumps(["/bin/sh", "-c", "echo $CAESURA_PAUSE_S"]),
            },
        )
        try:
            async with running(run):
                start = await host.hears(AgentClockSynced, trigger="start", synced=True)
                assert start.error_after_s == pytest.approx(0, abs=0.05)
                for pause_s, operation in ((0.4, "short"), (2.0, "long")):
                    agent.send_signal(signal.SIGSTOP)
                    began = time.monotonic()
                    await asyncio.sleep(pause_s)
                    agent.send_signal(signal.SIGCONT)
                    paused_s = time.monotonic() - began
                    await host.resumed(operation, event_id="", pause_s=paused_s)
                    synced = await host.hears(AgentClockSynced, operation=operation)
                    assert synced.error_before_s is not None
                    # Known to one tick of the simulated clock, plus what a loaded machine needs to stop and wake.
                    assert -synced.error_before_s == pytest.approx(paused_s, abs=0.15)
                    assert synced.synced
                    assert abs(synced.error_after_s or 0) < 0.05
                    assert (synced.simulated, synced.boot_id) == (True, start.boot_id)
                    recovered = 1 if operation == "short" else 2
                    await host.hears(HookFinished, count=recovered, hook="recover", outcome="succeeded")
                async with aiohttp.ClientSession(f"http://{health}") as session:
                    assert (await session.get("/ready")).status == 200
                    metrics = await (await session.get("/metrics")).text()
                assert (
                    'caesura_agent_hooks_total{fleet="default",hook="recover",outcome="succeeded"} 2.0'
                    in metrics
                )
                assert 'caesura_bus_connected{fleet="default"} 1.0' in metrics
                agent.terminate()
                assert await agent.wait() == 0
                await host.hears(AgentPresence, online=False)
                await host.bus.close()
        finally:
            if agent.returncode is None:
                agent.kill()
                await agent.wait()
