"""What commands may do to a host: once, in time, from the coordinator it obeys, and only what the host itself defines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from caesura.contract.codec import MAX_PAYLOAD_BYTES
from caesura.contract.messages import (
    AgentClockSynced,
    AgentPresence,
    ClockSyncAnswered,
    ClockSyncRequested,
    CoordinatorPresence,
    HostInventory,
    HostPresence,
    OperationReported,
    OperationTarget,
    VmClockSynced,
    VmFrozen,
    VmResumed,
)
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura_testing.patience import patient
from caesura_vmcontrol.procfs import alive


async def refused(host: Any, fleet: Any, *vms: str, **changes: Any) -> str:
    """Send a command that must be refused; the reason."""
    command = await host.freeze(*vms, **changes)
    report = await fleet.report(command.operation)
    assert report.status == "refused", report
    assert report.vms == ()
    reason: str = report.reason
    return reason


async def test_commands_that_are_refused_touch_nothing(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    host.add_vm("a")
    host.add_vm("b", "db", 1)
    host.add_vm("single", "")
    host.add_update("patch", "pass")
    host.add_update("long", "pass", expected_s=9.0)
    host.add_update("restart", "pass", impact="reboot")
    host.add_update("rotate", "pass", impact="none")
    (host.updates_dir / "broken.toml").write_text('name = "broken"\nimpact = "pause"\nscope = "galaxy"\n')
    await host.start()
    obeyed: dict[str, Any] = {"epoch": 5, "coordinator": "coordinator-5"}
    await fleet.say(CoordinatorPresence(online=True, commands=COMMANDS, **obeyed))
    inventory = await fleet.ear.one(
        HostInventory, lambda m: m.epoch == 5 and m.coordinator == "coordinator-5"
    )
    assert {(vm.vm, vm.set, vm.update_domain) for vm in inventory.vms} == {
        ("a", "web", 0),
        ("b", "db", 1),
        ("single", "_single", 0),
    }
    (broken,) = inventory.refused_updates
    assert (broken.file, broken.line) == ("broken.toml", 3)
    assert {each.update for each in inventory.updates} == {"patch", "long", "restart", "rotate"}

    # Nobody who does not lead gets an answer; the refusals below come after, in order.
    unanswered = [
        await host.freeze(**who)
        for who in ({"epoch": 4, "coordinator": "coordinator-5"}, {"epoch": 5, "coordinator": "impostor"})
    ]
    past = datetime.now(UTC) - timedelta(seconds=5)
    assert "after its not_after" in await refused(host, fleet, not_after=past, **obeyed)
    unknown = (OperationTarget(vm="ghost", set="web", update_domain=0),)
    assert "ghost is not on this host" in await refused(host, fleet, targets=unknown, **obeyed)
    moved = (OperationTarget(vm="a", set="web", update_domain=2),)
    assert "plan again" in await refused(host, fleet, targets=moved, **obeyed)
    twice = (OperationTarget(vm="a", set="web", update_domain=0),) * 2
    assert "named 2 times" in await refused(host, fleet, targets=twice, **obeyed)
    assert "leaves out b, single" in await refused(host, fleet, "a", update="patch", **obeyed)
    assert "not known here" in await refused(host, fleet, update="absent", **obeyed)
    assert "galaxy" in await refused(host, fleet, update="broken", **obeyed)
    assert "impact reboot" in await refused(host, fleet, update="restart", **obeyed)
    assert "no second VMM" in await refused(host, fleet, update="patch", method="swap", **obeyed)
    assert "by method freeze, not by live" in await refused(
        host, fleet, update="patch", method="live", **obeyed
    )
    assert "takes 9.5 s" in await refused(host, fleet, hold_s=9.5, budget_s=10.0, **obeyed)
    assert "update long takes 9 s" in await refused(host, fleet, update="long", budget_s=10.0, **obeyed)
    assert "too short" in await refused(host, fleet, hold_s=0.0, budget_s=0.3, **obeyed)
    assert fleet.ear.all(VmFrozen) == []
    assert [fleet.reports(each.operation) for each in unanswered] == [[], []]
    ignored = [line["why"] for line in host.log() if line["event"] == "command.ignored"]
    assert len(ignored) == 2
    assert "epoch 4 is old" in ignored[0]
    assert "belongs to coordinator coordinator-5" in ignored[1]
    assert host.kernel("a") == "running"
    # A corrected file is taken up at SIGHUP.
    host.add_update("broken", "pass")
    os.kill(host.pid, signal.SIGHUP)
    mended = await fleet.ear.one(HostInventory, lambda m: m.refused_updates == ())
    assert "broken" in {each.update for each in mended.updates}


async def test_bad_messages_change_nothing(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    topic = f"caesura/v1/fleet/host/{host.name}/operation/start"
    envelope = {
        "specversion": "1.0",
        "id": "1",
        "source": "/x",
        "type": "caesura.operation.start.v1",
        "time": "2026-01-01T00:00:00Z",
    }
    for payload in (
        b"{",
        b"\xff\xfe",
        b"[" * 5000,
        b"x" * (MAX_PAYLOAD_BYTES + 1),  # the broker takes a little more than the contract
        json.dumps({**envelope, "data": {"operation": 7}}).encode(),
        json.dumps({**envelope, "type": "caesura.other.v1", "data": {}}).encode(),
    ):
        # The ear decodes everything it hears, so it must not hear these.
        await fleet.deaf_publish(topic, payload)
    over = msgspec.json.decode(msgspec.json.encode(host.command(budget_s=10.0)))
    over["budget_s"] = 31.0  # above the promise: no such message exists
    await fleet.deaf_publish(topic, json.dumps({**envelope, "data": over}).encode())
    command = await host.freeze(hold_s=0.1)
    assert (await fleet.report(command.operation)).status == "completed"
    assert len({each.operation for each in fleet.ear.all(OperationReported)}) == 1
    refusals = [line for line in host.log() if line["event"] == "bus.message_refused"]
    assert len(refusals) == 7


async def test_same_command_twice_and_late(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    command = await host.freeze(hold_s=0.5)
    await fleet.say(command, host=host.name)
    await host.until("a", "frozen")
    await fleet.say(command, host=host.name)
    busy = await host.freeze(hold_s=0.5)
    assert f"busy with operation {command.operation}" in (await fleet.report(busy.operation)).reason
    done = await fleet.report(command.operation)
    assert done.status == "completed"
    # Late, after a restart: the same report again, and nothing is done.
    await host.kill()
    await host.start()
    before = len(fleet.reports(command.operation))
    await fleet.say(command, host=host.name)
    await fleet.until(lambda: len(fleet.reports(command.operation)) > before)
    assert fleet.reports(command.operation)[-1] == done
    assert len(fleet.ear.all(VmFrozen)) == 1


async def test_abort_in_each_state(hosts: Callable[..., Any], fleet: Any, tmp_path: Path) -> None:
    host = hosts()
    host.add_vm("a")
    host.add_update("slow", "import time; time.sleep(30)", timeout_s=30.0)
    await host.start()
    # Before it came: it never starts.
    never = host.command(hold_s=0.2)
    await host.abort(never.operation)
    assert (await fleet.report(never.operation)).status == "cancelled"
    await fleet.say(never, host=host.name)
    await fleet.until(lambda: len(fleet.reports(never.operation)) >= 2)
    assert {each.status for each in fleet.reports(never.operation)} == {"cancelled"}
    # An old coordinator cannot abort.
    held = await host.freeze(hold_s=6.0, epoch=7)
    await host.until("a", "frozen")
    await host.abort(held.operation, epoch=6)
    # While frozen: running again at once.
    began = time.monotonic()
    await host.abort(held.operation, epoch=7)
    await host.until("a", "running")
    assert time.monotonic() - began < patient(2)
    report = await fleet.report(held.operation)
    assert (report.status, report.reason) == ("failed", "aborted: the test says so")
    # While the update runs: it is ended first.
    updating = await host.freeze(update="slow", budget_s=20.0, epoch=7)
    await host.until("a", "frozen")
    await host.abort(updating.operation, epoch=7)
    report = await fleet.report(updating.operation)
    assert report.status == "failed"
    assert report.update is not None
    assert report.update.outcome in ("interrupted", "not_run")
    assert host.kernel("a") == "running"
    # After its end: the same report again.
    before = len(fleet.reports(updating.operation))
    await host.abort(updating.operation, epoch=7)
    await fleet.until(lambda: len(fleet.reports(updating.operation)) > before)
    assert fleet.reports(updating.operation)[-1] == report


async def test_live_and_vm_scope_updates(hosts: Callable[..., Any], fleet: Any, tmp_path: Path) -> None:
    host = hosts()
    host.add_vm("a")
    host.add_vm("b")
    code = (
        "import os, pathlib; names = ('CAESURA_OPERATION', 'CAESURA_UPDATE', 'CAESURA_HOST', 'CAESURA_VM', 'OWN');"
        f"path = pathlib.Path({str(tmp_path)!r}) / os.environ['CAESURA_UPDATE'] / os.environ.get('CAESURA_VM', 'host');"
        "path.parent.mkdir(exist_ok=True);"
        "path.write_text(' '.join(os.environ.get(name, '-') for name in names) + ' ' + os.getcwd())"
    )
    host.add_update("rotate", code, impact="none", working_directory="/usr")
    host.add_update("firmware", code, scope="vm")
    await host.start()
    live = await host.freeze(update="rotate", method="live")
    report = await fleet.report(live.operation)
    assert report.status == "completed"
    assert [vm.frozen for vm in report.vms] == [False, False]
    written = (tmp_path / "rotate" / "host").read_text()
    assert written == f"{live.operation} rotate host-1 - - /usr"
    # Scope vm: once a target, and the other VM of the host is left alone.
    one = await host.freeze("b", update="firmware")
    report = await fleet.report(one.operation)
    assert report.status == "completed"
    assert [vm.vm for vm in report.vms] == ["b"]
    assert [path.name for path in (tmp_path / "firmware").iterdir()] == ["b"]
    assert {fact.vm for fact in fleet.ear.all(VmFrozen)} == {"b"}


async def test_vms_outlive_the_updater(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    run = host.run_of("a")
    assert await fleet.ear.one(HostPresence, lambda m: m.online)
    await host.kill()
    await host.start()
    assert host.run_of("a") == run
    await host.kill(signal.SIGTERM)
    assert await fleet.ear.one(HostPresence, lambda m: not m.online)
    assert host.kernel("a") == "running"
    assert host.process.returncode == 0
    await fleet.ear.one(HostInventory)
    host.settings["STOP_VMS_ON_EXIT"] = "true"
    await host.start()
    assert host.run_of("a") == run
    await host.kill(signal.SIGTERM)
    assert not alive(run["pid"], run["start_ticks"])
    assert not exists(run["control"])
    # A VM that ends is told at once, and started again with the next host updater.
    await host.start()
    os.kill(host.run_of("a")["pid"], signal.SIGKILL)
    await fleet.ear.one(HostInventory, lambda m: m.vms[0].state == "stopped")
    command = await host.freeze()
    assert "VM a is stopped" in (await fleet.report(command.operation)).reason


async def test_second_updater_on_the_same_state_folder_is_refused(
    hosts: Callable[..., Any], fleet: Any
) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    first = host.process
    host.process = None
    second = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "caesura_host_updater", env=host.environ(), stderr=asyncio.subprocess.PIPE
    )
    _, said = await second.communicate()
    host.process = first
    assert second.returncode == 1
    assert b"another host updater runs on" in said


def exists(path: str) -> bool:
    """Whether a cgroup's control file is still there."""
    return Path(path).exists()


class FakeAgent:
    """What the VM's agent would say."""

    def __init__(self, fleet: Any, vm: str, boot_id: str = "boot-1") -> None:
        self.fleet = fleet
        self.vm = vm
        self.boot_id = boot_id

    async def hello(self) -> None:
        """On the bus."""
        presence = AgentPresence(vm=self.vm, online=True, boot_id=self.boot_id, clock="simulated")
        await self.fleet.say(presence, vm=self.vm)

    async def exchange(self) -> None:
        """Ask the host for the time, as clock-sync does."""
        sent_ns = time.time_ns()
        await self.fleet.say(ClockSyncRequested(vm=self.vm, exchange="x-1", t1_ns=sent_ns), vm=self.vm)
        answer = await self.fleet.ear.one(ClockSyncAnswered)
        assert answer.t1_ns == sent_ns <= answer.t2_ns <= answer.t3_ns <= time.time_ns()

    async def synced(self, operation: str, **facts: Any) -> None:
        """Tell what was measured."""
        await self.fleet.ear.one(VmResumed, lambda m: m.operation == operation)
        told: dict[str, Any] = {
            "synced": True,
            "error_before_s": -0.4,
            "error_after_s": 0.001,
            "uncertainty_s": 0.0005,
            "exchanges": 8,
            "simulated": True,
        }
        told |= facts
        message = AgentClockSynced(
            vm=self.vm, boot_id=self.boot_id, trigger="resume", operation=operation, **told
        )
        await self.fleet.say(message, vm=self.vm)


async def test_clocks_are_answered_and_judged(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    host.add_vm("a", agent=True)
    host.settings["CLOCK_TIMEOUT_S"] = "3"
    await host.start()
    agent = FakeAgent(fleet, "a")
    await agent.hello()
    await agent.exchange()

    async def verdict(**facts: Any) -> VmClockSynced:
        command = await host.freeze(hold_s=0.1, clock_bound_s=0.05)
        if facts.pop("answer", True):
            await agent.synced(command.operation, **facts)
        found: VmClockSynced = await fleet.ear.one(VmClockSynced, lambda m: m.operation == command.operation)
        assert fleet.position(found) > fleet.position(await fleet.report(command.operation))
        return found

    good = await verdict()
    assert (good.synced, good.by, good.error_before_s, good.simulated) == (True, "agent", -0.4, True)
    assert good.memory is not None
    assert (good.memory.proof, good.memory.ok) == ("heartbeat", True)
    off = await verdict(error_after_s=0.04, uncertainty_s=0.02)
    assert not off.synced
    assert "bound" in off.reason
    silent = await verdict(answer=False)
    assert (silent.synced, silent.by) == (False, "nobody")
    # It was told again while it was silent, under the same id.
    told = [each for each in fleet.ear.heard if each.message == fleet.last(VmResumed)]
    assert len(told) >= 2
    assert len({each.header.id for each in told}) == 1
    agent.boot_id = "boot-2"
    reborn = await verdict()
    assert reborn.memory is not None
    assert not reborn.memory.ok


async def test_stopping_waits_for_the_verdict_on_the_clocks(hosts: Callable[..., Any], fleet: Any) -> None:
    """Else the rollout would halt when it goes on: nobody would ever have judged them."""
    host = hosts()
    host.add_vm("a", agent=True)
    host.settings["CLOCK_TIMEOUT_S"] = "30"
    await host.start()
    agent = FakeAgent(fleet, "a")
    await agent.hello()
    command = await host.freeze(hold_s=15.0, budget_s=20.0)
    await host.until("a", "frozen")
    stopped = asyncio.create_task(host.kill(signal.SIGTERM))
    await fleet.report(command.operation)
    await agent.synced(command.operation)
    verdict = await fleet.ear.one(VmClockSynced, lambda m: m.operation == command.operation)
    assert verdict.synced
    goodbye = await fleet.ear.one(HostPresence, lambda m: not m.online)
    assert fleet.position(verdict) < fleet.position(goodbye)
    await stopped


async def test_stopping_does_not_wait_for_a_silent_agent_for_long(
    hosts: Callable[..., Any], fleet: Any
) -> None:
    host = hosts()
    host.add_vm("a", agent=True)
    host.settings["CLOCK_TIMEOUT_S"] = "300"
    await host.start()
    command = await host.freeze(hold_s=15.0, budget_s=20.0)
    await host.until("a", "frozen")
    began = time.monotonic()
    await host.kill(signal.SIGTERM)
    assert time.monotonic() - began < patient(15.0)
    assert host.process.returncode == 0
    assert not fleet.ear.all(VmClockSynced, lambda m: m.operation == command.operation)
