"""The exporter as a command against a real broker, its output judged by Prometheus' own tool."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from caesura.bus.local_broker import LocalBroker, free_port
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Bus, Delivery
from caesura.contract import messages as m
from caesura_metrics_exporter.service import MetricsExporter, filters
from caesura_metrics_exporter.settings import MetricsExporterSettings
from caesura_testing.patience import patient
from caesura_testing.rollouts import announce, wave_state, whole_rollout

NOW = datetime.now(UTC)
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that can only be polled, as Prometheus does."""
    async with asyncio.timeout(patient(20)):
        while not await condition():  # noqa: ASYNC110 - a scrape has no event to wait for
            await asyncio.sleep(0.002)


async def play(post: MessageClient, *, online: bool = True) -> None:
    """A small rollout of one wave as the services would tell it, some of it twice."""
    vm = m.VmRecord(vm="web-1", set="web", update_domain=1, state="running", methods=("freeze",))
    where: dict[str, Any] = {"host": "host-1", "set": "web", "ud": 1, "vm": "web-1"}
    event_id, operation = "e1", "op1"
    await post.send(m.CoordinatorPresence(coordinator="c1", epoch=3, online=True))
    await post.send(m.HostPresence(host="host-1", online=online, instance="i1"), host="host-1")
    installed = (m.InstalledUpdate(update="qemu", version="7.2.22", at=NOW),)
    inventory = m.HostInventory(
        host="host-1", driver="process", epoch=3, vms=(vm,), guard="ready", installed=installed
    )
    await post.send(inventory, host="host-1")
    await post.send(m.AgentPresence(vm="web-1", online=True, boot_id="b1"), vm="web-1")
    await post.send(m.PublisherPresence(instance="m1", online=True), instance="m1")
    event = m.ScheduledEvent(
        event_id=event_id,
        event_type="Freeze",
        status="scheduled",
        resources=("web-1",),
        not_before=NOW + timedelta(seconds=900),
    )
    await post.send(m.SetDocument(set="web", incarnation=1, events=(event,)), set="web")
    waves = (
        wave_state(
            wave=0,
            status="started",
            domains={"web": 1},
            hosts=("host-1",),
            vms=("web-1",),
            started_at=NOW,
        ),
        wave_state(wave=1, status="pending", domains={"web": 2}, hosts=("host-2",), vms=("web-2",)),
    )
    rollout = whole_rollout(
        rollout="r1",
        update="kernel",
        status="running",
        policy=m.Policy(),
        sets=("web",),
        waves=waves,
        created_at=NOW,
    )
    await announce(post, rollout)
    before = wave_state(
        wave=0,
        status="completed",
        domains={"db": 0},
        hosts=("host-1",),
        vms=("db-1",),
        started_at=NOW - timedelta(seconds=60),
        ended_at=NOW - timedelta(seconds=50),
    )
    await announce(
        post,
        whole_rollout(
            rollout="r0",
            update="kernel",
            status="completed",
            policy=m.Policy(),
            sets=("db",),
            waves=(before,),
            created_at=NOW - timedelta(seconds=90),
            ended_at=NOW - timedelta(seconds=50),
        ),
    )
    await post.send(
        m.WaveChanged(rollout="r1", wave=0, status="started", domains={"web": 1}, at=NOW),
        rollout="r1",
        wave=0,
    )
    for status in ("scheduled", "started"):
        changed = m.EventChanged(
            event_id=event_id,
            set="web",
            event_type="Freeze",
            status=status,
            resources=("web-1",),
            incarnation=1,
            not_before=NOW,
            notice_s=900,
            approval_delay_s=12.0 if status == "started" else None,
            at=NOW,
        )
        await post.send(changed, set="web", status=status)
    await post.send(m.EventApproved(event_id=event_id, set="web", vm="web-1", at=NOW), instance="m1")
    await post.send(m.VmReady(vm="web-1", event_id=event_id, ready=True), vm="web-1")
    await post.send(m.HookFinished(vm="web-1", hook="prepare", outcome="succeeded", seconds=0.2), vm="web-1")
    command = m.StartOperation(
        operation=operation,
        epoch=3,
        coordinator="c1",
        host="host-1",
        rollout="r1",
        wave=0,
        method="freeze",
        targets=(m.OperationTarget(vm="web-1", set="web", update_domain=1),),
        update="kernel",
        budget_s=20,
        not_after=NOW,
    )
    frozen = m.VmFrozen(
        vm="web-1",
        host="host-1",
        set="web",
        update_domain=1,
        operation=operation,
        method="freeze",
        budget_s=20,
        at=NOW,
    )
    resumed = m.VmResumed(
        vm="web-1",
        host="host-1",
        set="web",
        update_domain=1,
        operation=operation,
        method="freeze",
        pause_s=3.25,
        budget_s=20,
        within_budget=True,
        resumed_by="guard",
        memory=m.MemoryProof(proof="digest", ok=True),
        at=NOW,
    )
    report = m.OperationReported(
        operation=operation,
        host="host-1",
        epoch=3,
        status="completed",
        update=m.UpdateOutcome(update="kernel", outcome="succeeded", seconds=3.0),
        overhead_s=0.25,
        at=NOW,
    )
    synced = m.VmClockSynced(
        vm="web-1",
        host="host-1",
        set="web",
        update_domain=1,
        operation=operation,
        synced=True,
        by="agent",
        error_before_s=-3.25,
        error_after_s=0.0002,
        at=NOW,
    )
    for _ in range(2):  # at least once: a repetition must not count
        await post.send(command, host="host-1")
        await post.send(frozen, **where)
        await post.send(resumed, **where)
        await post.send(report, host="host-1")
        await post.send(synced, **where)
    await post.send(
        m.AgentClockSynced(vm="web-1", boot_id="b1", trigger="resume", operation=operation, synced=True),
        vm="web-1",
    )
    await post.send(m.RequestAnswered(request="q1", accepted=True), client="cli")
    await post.bus.publish("caesura/v1/fleet/nonsense", b"{}")
    await post.bus.publish("caesura/v1/host/host-1/operation", b"{nonsense")


def series_of(text: str) -> Series:
    """Without the label of the fleet, which every series of a scrape has."""
    return {
        (sample.name, frozenset({*sample.labels.items()} - {("fleet", "default")})): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset(labels.items())]


PAUSE = {"set": "web", "update_domain": "1", "method": "freeze"}
_ON_HOST = frozenset({*PAUSE.items(), ("host", "host-1")})
# Series of what is halted, of a pause that is open, and of a host that overran: `play` has none of them.
ONLY_SOMETIMES = {
    "caesura_rollout_halted",
    "caesura_host_pause_open_seconds",
    "caesura_host_pause_budget_seconds",
    "caesura_host_pause_overrun_age_seconds",
}
# What `play` sends last; counted from the first, with 0.
LAST = ("caesura_bus_decode_errors_total", frozenset({("kind", "malformed")}))


def check_numbers(series: Series) -> None:
    assert value(series, "caesura_pause_seconds_count", **PAUSE) == 1
    assert value(series, "caesura_pause_seconds_sum", **PAUSE) == 3.25
    assert value(series, "caesura_pause_seconds_bucket", le="5", **PAUSE) == 1
    assert value(series, "caesura_pause_seconds_bucket", le="3", **PAUSE) == 0
    assert value(series, "caesura_pause_budget_seconds", **PAUSE) == 20
    assert value(series, "caesura_pause_overruns_total", **PAUSE) == 0
    assert value(series, "caesura_pauses_resumed_by_guard_total", **PAUSE) == 1
    assert value(series, "caesura_host_guard_resume_age_seconds", host="host-1", **PAUSE) >= 0
    assert value(series, "caesura_updates_total", host="host-1", update="kernel", outcome="succeeded") == 1
    assert value(series, "caesura_events_total", set="web", type="Freeze", status="started") == 1
    assert value(series, "caesura_event_notice_seconds_sum", type="Freeze") == 900
    assert value(series, "caesura_event_approval_delay_seconds_sum", type="Freeze") == 12
    assert value(series, "caesura_rollout_waves", set="web") == 2
    assert value(series, "caesura_domain_wave_status", set="web", update_domain="1", status="started") == 3
    assert value(series, "caesura_messages_total", type="caesura.vm.resumed.v1") == 2
    assert value(series, "caesura_messages_repeated_total", type="caesura.vm.resumed.v1") == 1
    assert value(series, "caesura_bus_decode_errors_total", kind="unknown_topic") == 1
    # Known before the first of them: else it would be no increase of anything.
    assert value(series, "caesura_bus_decode_errors_total", kind="oversized") == 0
    assert value(series, "caesura_bus_connected") == 1
    assert value(series, "caesura_exporter_last_message_timestamp_seconds") > 1.7e9
    assert value(series, "caesura_exporter_handler_seconds_count") > 20


async def promtool(text: str) -> str:
    """What `promtool check metrics` has to say; empty when all is well."""
    process = await asyncio.create_subprocess_exec(
        "promtool",
        "check",
        "metrics",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate(text.encode())
    return out.decode() if process.returncode else ""


class Scene:
    """An exporter on a bus in memory."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.now_s = 0.0
        self.exporter_bus = MemoryBus(self.broker, client_id="exporter", filters=filters(), clean=False)
        self.exporter = MetricsExporter(
            MetricsExporterSettings(), self.exporter_bus, monotonic=lambda: self.now_s
        )
        self.registry = CollectorRegistry()
        self.registry.register(self.exporter.collector())
        self.post = MessageClient(MemoryBus(self.broker), "/caesura/test")

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    async def until(self, key: tuple[str, frozenset[tuple[str, str]]], least: float = 0) -> Series:
        async def there() -> bool:
            return series_of(self.text()).get(key, -1) >= least

        await eventually(there)
        return series_of(self.text())


async def silent(_: Delivery) -> None:
    """The player hears nothing."""


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    player: Bus = scene.post.bus
    async with asyncio.TaskGroup() as group:
        group.create_task(scene.exporter.run_bus())
        group.create_task(player.run(silent))
        assert await scene.exporter_bus.wait_connected(patient(5))
        assert await player.wait_connected(patient(5))
        yield scene
        await scene.exporter.drain()
        await player.close()


async def test_a_rollout_is_told_in_numbers_each_fact_once(scene: Scene) -> None:
    await play(scene.post)
    check_numbers(await scene.until(LAST, 1))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
@pytest.mark.parametrize("when", ["empty", "after a rollout"])
async def test_promtool_finds_nothing_to_complain_about(scene: Scene, when: str) -> None:
    if when == "after a rollout":
        await play(scene.post)
        await scene.until(LAST, 1)
    assert await promtool(scene.text()) == ""


async def test_every_metric_of_ours_is_named_and_explained(scene: Scene) -> None:
    await play(scene.post)
    await scene.until(LAST, 1)
    families = list(text_string_to_metric_families(scene.text()))
    assert len(families) > 40
    # So that an alert can name a rollout or a host; none as long as all goes well.
    families = [each for each in families if each.name not in ONLY_SOMETIMES]
    for family in families:
        assert family.name.startswith("caesura_")
        assert family.documentation.endswith(".")
        # After this rollout every family has something to say: a name that never gets a sample is a mistake.
        assert family.samples, family.name
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    assert not labels & {"vm", "event", "event_id", "rollout", "operation"}


async def test_nothing_is_forgotten_in_an_outage_however_long(scene: Scene) -> None:
    await play(scene.post)
    before = await scene.until(LAST, 1)
    heard = ("caesura_host_heard_seconds", frozenset({("host", "host-1")}))
    scene.now_s = 1e6
    after = series_of(scene.text())
    # A host that needed its guard is named for half an hour only.
    assert set(before) - set(after) == {("caesura_host_guard_resume_age_seconds", _ON_HOST)}
    assert set(after) <= set(before)
    assert value(after, "caesura_pause_seconds_count", **PAUSE) == value(
        before, "caesura_pause_seconds_count", **PAUSE
    )
    assert (before[heard], after[heard]) == (0.0, 1e6)
    # What the broker still has of it is no word of the host's.
    scene.broker.kill("exporter")
    told = value(after, "caesura_messages_total", type="caesura.host.inventory.v1")

    async def told_again() -> bool:
        return (
            value(series_of(scene.text()), "caesura_messages_total", type="caesura.host.inventory.v1") > told
        )

    await eventually(told_again)
    assert series_of(scene.text())[heard] == 1e6


async def test_a_cleared_inventory_drops_the_host_at_once(scene: Scene) -> None:
    await play(scene.post)
    await scene.until(LAST, 1)
    await scene.post.bus.publish("caesura/v1/host/host-1/inventory", b"", retain=True)

    async def dropped() -> bool:
        return 'host="host-1"' not in scene.text()

    await eventually(dropped)


async def test_short_lived_vms_in_no_set_leave_no_series_behind(scene: Scene) -> None:
    """Each is a set of its own."""

    async def host(*vms: str) -> None:
        records = tuple(
            m.VmRecord(vm=vm, set=f"_{vm}", update_domain=0, state="running", methods=("freeze",))
            for vm in vms
        )
        report = m.HostInventory(host="h1", driver="process", epoch=1, vms=records, guard="ready")
        await scene.post.send(report, host="h1")

    async def count() -> int:
        return sum(
            not key[0].startswith(("caesura_messages", "caesura_exporter", "caesura_bus"))
            for key in series_of(scene.text())
        )

    await host()
    await scene.until(("caesura_host_online", frozenset({("host", "h1")})))
    before = await count()
    for number in range(20):
        await host(f"vm-{number}")
    await scene.until(
        ("caesura_vms", frozenset({("set", "_vm-19"), ("update_domain", "0"), ("state", "running")}))
    )
    assert await count() > before + 20
    await host()

    async def empty() -> bool:
        return "_vm-19" not in {
            dict(key[1]).get("set") for key in series_of(scene.text()) if key[0] == "caesura_vms"
        }

    await eventually(empty)
    scene.now_s += 1000.0
    await host()

    async def as_before() -> bool:
        return await count() == before

    await eventually(as_before)


async def test_facts_sent_while_it_was_away_are_counted(scene: Scene) -> None:
    await play(scene.post)
    before = value(await scene.until(LAST, 1), "caesura_pause_seconds_count", **PAUSE)
    scene.broker.kill("exporter")
    resumed = m.VmResumed(
        vm="web-1",
        host="host-1",
        set="web",
        update_domain=1,
        operation="op2",
        method="freeze",
        pause_s=1.0,
        budget_s=20,
        within_budget=False,
        resumed_by="updater",
        at=NOW,
    )
    await scene.post.send(resumed, host="host-1", set="web", ud=1, vm="web-1")

    async def counted() -> bool:
        return value(series_of(scene.text()), "caesura_pause_seconds_count", **PAUSE) == before + 1

    await eventually(counted)
    series = series_of(scene.text())
    assert value(series, "caesura_pause_overruns_total", **PAUSE) == 1
    assert value(series, "caesura_bus_reconnects_total") == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
async def test_the_command_with_a_real_broker(broker_kind: Literal["mosquitto", "embedded"]) -> None:
    listen = f"127.0.0.1:{free_port()}"
    async with LocalBroker(kind=broker_kind) as broker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "caesura_metrics_exporter",
            env={
                **os.environ,
                "CAESURA_METRICS_EXPORTER_BROKER_URL": broker.url,
                "CAESURA_METRICS_EXPORTER_LISTEN": listen,
            },
        )
        player = MqttBus(BrokerOptions(url=broker.url))
        post = MessageClient(player, "/caesura/test")
        try:
            async with asyncio.TaskGroup() as group, aiohttp.ClientSession(f"http://{listen}") as session:
                group.create_task(player.run(silent))
                await ready(session)
                await play(post)

                async def scrape() -> str:
                    return await (await session.get("/metrics")).text()

                async def all_told() -> bool:
                    return series_of(await scrape()).get(LAST, 0) > 0

                await eventually(all_told)
                text = await scrape()
                samples = [line for line in text.splitlines() if not line.startswith("#")]
                assert all('fleet="default"' in line for line in samples)
                check_numbers(series_of(text))
                assert await promtool(text) == ""
                assert (await session.get("/live")).status == 200
                await broker.kill()

                async def not_ready() -> bool:
                    return (await session.get("/ready")).status == 503

                await eventually(not_ready)
                wrong = (await (await session.get("/ready")).json())["wrong"]
                assert "not connected" in wrong["broker"]
                process.terminate()
                assert await asyncio.wait_for(process.wait(), patient(10)) == 0
                await player.close()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def ready(session: aiohttp.ClientSession) -> None:
    async def answers() -> bool:
        try:
            return (await session.get("/ready")).status == 200
        except aiohttp.ClientConnectionError:
            return False  # not listening yet

    await eventually(answers)
