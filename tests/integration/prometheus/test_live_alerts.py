"""What the alerts are for really happens: every service and the broker is killed, VMs stand still for too long.

Each alert fires and resolves on a real fleet's series. Only its times are shortened; what is left out is judged by
promtool alone: CaesuraGuestClock*, CaesuraForeignVms, CaesuraPauseGuardAbsent, CaesuraExporterDeaf, CaesuraConnectionUnsteady.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from caesura.contract import messages as m
from caesura.runtime.identity import new_id

BEYOND = "CaesuraPausedBeyondBudget"


async def test_each_alert_fires_and_resolves_when_it_really_happens(hurried_scene: Any) -> None:
    scene = hurried_scene
    scene.sandbox.watch.learn()
    await scene.prometheus.until_alerts(silent=await every_alert(scene.prometheus))
    await a_pause_that_nobody_ends(scene)
    await everybody_dies_with_an_event_announced(scene)
    await a_message_is_refused(scene)
    await what_dies_with_the_broker_leaves_no_will(scene)
    # The end of one thing is the end of its alerts.
    await scene.prometheus.until_alerts(silent=await every_alert(scene.prometheus))


async def every_alert(prometheus: Any) -> set[str]:
    return {rule.name for rule in await prometheus.rules() if rule.kind == "alerting"}


async def a_pause_that_nobody_ends(scene: Any) -> None:
    """Updater and guard of the host are stopped in a pause, and the exporter is killed meanwhile."""
    prometheus, sandbox = scene.prometheus, scene.sandbox
    rollout = await scene.begin("brief", budget_s=5.0)
    hosts = scene.session.fleet_view.hosts

    # Not before the bus knows, or nobody would ever say so.
    def told() -> bool:
        return "web-1" in scene.session.fleet_view.frozen and hosts["host-1"].vms[0].state == "paused"

    await sandbox.until(told, 20, "web-1 is frozen")
    guard = sandbox.guard_pid("host-1")
    os.kill(guard, signal.SIGSTOP)
    sandbox.signal("host-1", signal.SIGSTOP)
    try:
        await prometheus.until_alerts(BEYOND, "CaesuraEventWithoutEnd")
        (paused,) = await prometheus.until(f'ALERTS{{alertname="{BEYOND}", alertstate="firing"}}')
        assert (paused.labels["host"], paused.labels["method"]) == ("host-1", "freeze")
        await sandbox.kill("exporter")
        await prometheus.until_alerts("CaesuraExporterDown", silent={BEYOND})
        await sandbox.start("exporter")
        # The freeze is not told again. That it stands still is.
        await prometheus.until_alerts(BEYOND, silent={"CaesuraExporterDown"})
        assert sandbox.watch.frozen() == {"web-1"}
    finally:
        # The guard first: the pause is then its to end.
        os.kill(guard, signal.SIGCONT)
        await sandbox.until(lambda: not sandbox.watch.standing(), 10, "the guard resumes web-1")
        sandbox.signal("host-1", signal.SIGCONT)
    await prometheus.until_alerts("CaesuraPauseOverran", "CaesuraPauseGuardActed", silent={BEYOND})
    await prometheus.until_alerts("CaesuraRolloutHalted", silent={"CaesuraEventWithoutEnd"})
    await scene.give_up(rollout)
    await prometheus.until_alerts(
        silent={"CaesuraRolloutHalted", "CaesuraPauseOverran", "CaesuraPauseGuardActed"}
    )


async def everybody_dies_with_an_event_announced(scene: Any) -> None:
    """The coordinator's last will was made before it had an epoch, and must count all the same."""
    prometheus, sandbox = scene.prometheus, scene.sandbox
    guard = sandbox.guard_pid("host-2")
    rollout = await scene.begin("patch", notice_s=3.0, budget_s=10.0)
    documents = scene.session.fleet_view.documents
    await sandbox.until(lambda: bool(documents["web"].events), 10, "a scheduled event of web")
    await sandbox.kill("coordinator")
    gone = {
        "CaesuraCoordinatorOffline",
        "CaesuraHostUpdaterOffline",
        "CaesuraMetadataPublisherOffline",
        "CaesuraAgentSilent",
        "CaesuraTargetDown",
    }
    async with the_agent_killed(scene, "web-1"):
        await sandbox.kill("host-2")
        os.kill(guard, signal.SIGKILL)
        await sandbox.kill("metadata")
        await prometheus.until_alerts(*gone, "CaesuraEventNotStarted")
        await prometheus.until("caesura_coordinator_heard_seconds < 23")  # it was its will
    await sandbox.start("coordinator", "host-2", "metadata")
    await prometheus.until_alerts(silent=gone)
    await scene.give_up(rollout)
    await prometheus.until_alerts(silent={"CaesuraEventNotStarted"})


async def a_message_is_refused(scene: Any) -> None:
    """The first one that the coordinator ever refused: it had a counter of such before."""
    await scene.session.bus.publish("caesura/v1/vm/web-1/ready", b"{}")
    await scene.prometheus.until(
        'ALERTS{alertname="CaesuraMessagesRefused", alertstate="firing", job="caesura-coordinator"}'
    )


async def what_dies_with_the_broker_leaves_no_will(scene: Any) -> None:
    prometheus, sandbox = scene.prometheus, scene.sandbox
    await sandbox.broker.kill()
    await sandbox.kill("coordinator")
    await sandbox.kill("host-2")
    await prometheus.until_alerts("CaesuraBrokerLost")
    await sandbox.broker.start()
    await prometheus.until(
        'ALERTS{alertname="CaesuraHostUpdaterOffline", alertstate="firing", host="host-2"}'
    )
    # Nobody said otherwise. Awaited: a scrape that a busy machine was too slow for leaves no series for a moment.
    await prometheus.until('caesura_host_online{host="host-2"} == 1')
    await sandbox.start("host-2")
    await prometheus.until_alerts(silent={"CaesuraHostUpdaterOffline", "CaesuraBrokerLost"})
    # The coordinator spoke every 20 s: until its silence tells, there is time for more.
    await two_domains_are_frozen_at_once(scene)
    await prometheus.until_alerts("CaesuraCoordinatorOffline", timeout_s=30)
    await prometheus.until("caesura_coordinator_online == 1")
    await sandbox.start("coordinator")
    await prometheus.until_alerts(silent={"CaesuraCoordinatorOffline"})


async def two_domains_are_frozen_at_once(scene: Any) -> None:
    """So two messages say."""
    prometheus, session = scene.prometheus, scene.session
    for number in (1, 2):
        frozen = m.VmFrozen(
            vm=f"web-{number}",
            host=f"host-{number}",
            set="web",
            update_domain=number - 1,
            operation=new_id(),
            method="freeze",
            budget_s=10,
            at=datetime.now(UTC),
        )
        await session.post.send(frozen, host=frozen.host, set="web", ud=frozen.update_domain, vm=frozen.vm)
    await prometheus.until_alerts("CaesuraTwoDomainsPaused")
    # The hosts know better, and say so within a second.
    await prometheus.until_alerts(silent={"CaesuraTwoDomainsPaused"})


@asynccontextmanager
async def the_agent_killed(scene: Any, vm: str) -> AsyncIterator[None]:
    """No agent in the VM while the block runs, and one as before after it."""
    (pid,) = [pid for pid in scene.sandbox.vm_pids(vm) if b"caesura_vm_agent" in cmdline(pid)]
    environ = environment(pid)
    os.kill(pid, signal.SIGKILL)
    yield
    with (scene.sandbox.folder / "agent.log").open("ab") as log:
        scene.sandbox.running["agent"] = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "caesura_vm_agent", env=environ, stdout=log, stderr=log
        )


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def environment(pid: int) -> dict[str, str]:
    items = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(item.decode().split("=", 1) for item in items if item)
