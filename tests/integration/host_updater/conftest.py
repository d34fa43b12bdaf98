"""A host of its own for a test: real processes really frozen, a real Mosquitto, the installed commands."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from caesura.bus.messaging import MessageClient
from caesura.bus.mqtt import MqttBus
from caesura.bus.options import BrokerOptions
from caesura.bus.port import Delivery
from caesura.contract.codec import Received, decode
from caesura.contract.envelope import Message
from caesura.contract.messages import (
    AbortOperation,
    HostInventory,
    HostPresence,
    OperationReported,
    OperationTarget,
    StartOperation,
)
from caesura.runtime.identity import new_id
from caesura_testing.broker import mosquitto, mosquitto_installed
from caesura_testing.patience import patient
from caesura_vmcontrol.procfs import process_table
from caesura_vmcontrol.resume_plans import plan_from_json
from caesura_vmcontrol.vm_control import condition

PATIENCE_S = 20.0  # s: a loaded CI machine; a test that passes never waits this long
M = TypeVar("M", bound=Message)

WORKLOAD = """
import mmap, os, time
path = os.environ.get("CAESURA_VM_RAM")
if path:
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
        memory[:8] = b"caesura!"
while True:
    time.sleep(0.01)
"""


class Ear:
    """Everything that was said on the bus, decoded."""

    def __init__(self) -> None:
        self.heard: list[Received] = []
        self.ignored: set[bytes] = set()
        self._more = asyncio.Event()

    async def receive(self, delivery: Delivery) -> None:
        """Give this to the bus."""
        if delivery.payload and delivery.payload not in self.ignored:
            self.heard.append(decode(delivery.topic, delivery.payload))
            self._more.set()

    def all(self, kind: type[M], where: Callable[[M], bool] = lambda _: True) -> list[M]:
        """Messages of a type so far."""
        return [each.message for each in self.heard if isinstance(each.message, kind) and where(each.message)]

    async def one(
        self, kind: type[M], where: Callable[[M], bool] = lambda _: True, timeout_s: float = PATIENCE_S
    ) -> M:
        """The first message of a type for which ``where`` holds; waits for it."""
        try:
            async with asyncio.timeout(patient(timeout_s)):
                while not (found := self.all(kind, where)):
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"no such {kind.__name__}; heard {self.all(kind)[-5:]}") from None
        return found[0]


class Fleet:
    """A broker, an ear on it, and a mouth that speaks as the coordinator."""

    def __init__(self, broker: Any, bus: MqttBus, ear: Ear) -> None:
        self.broker = broker
        self.bus = bus
        self.ear = ear
        self.post = MessageClient(bus, "/caesura/test")

    async def say(self, message: Message, **parameters: str | int) -> None:
        """Publish as whoever writes it."""
        await self.post.send(message, event_id=None, timeout_s=10.0, **parameters)

    async def report(self, operation: str, *statuses: str, timeout_s: float = 40.0) -> OperationReported:
        """The first report of an operation with one of these statuses (default: an end)."""
        wanted = statuses or ("completed", "failed", "refused", "cancelled")
        return await self.ear.one(
            OperationReported, lambda m: m.operation == operation and m.status in wanted, timeout_s
        )

    def position(self, message: Message) -> int:
        """Where in the order of what was heard a message first stands."""
        return next(index for index, each in enumerate(self.ear.heard) if each.message == message)

    def last(self, kind: type[M]) -> M:
        """The last message of a type."""
        return self.ear.all(kind)[-1]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until what was heard makes ``holds`` true."""
        await until(holds, "something on the bus")

    async def deaf_publish(self, topic: str, payload: bytes) -> None:
        """Publish what the ear need not understand."""
        self.ear.ignored.add(payload)
        await self.bus.publish(topic, payload)

    def reports(self, operation: str) -> list[OperationReported]:
        """All reports of an operation so far."""
        return self.ear.all(OperationReported, lambda m: m.operation == operation)


class Host:
    """One host updater as a process, with its VMs."""

    def __init__(self, folder: Path, fleet: Fleet, name: str = "host-1", freezer: str = "auto") -> None:
        self.name = name
        self.folder = folder
        self.fleet = fleet
        self.freezer = freezer
        self.state_dir = folder / "state"
        self.updates_dir = folder / "updates.d"
        self.updates_dir.mkdir(parents=True)
        self.vms: list[dict[str, Any]] = []
        self.settings: dict[str, str] = {}
        self.process: asyncio.subprocess.Process | None = None
        self.stderr: int | None = None
        """Where the updater's log goes in place of a file."""

    def add_vm(
        self,
        name: str,
        set_name: str = "web",
        ud: int = 0,
        *,
        agent: bool = False,
        ram: int = 0,
        code: str = WORKLOAD,
    ) -> str:
        """A VM whose workload is Python code."""
        self.vms.append({"name": name, "set": set_name, "ud": ud, "agent": agent, "ram": ram, "code": code})
        return name

    def add_update(self, name: str, code: str, **changes: Any) -> str:
        """An update that runs Python code."""
        facts: dict[str, Any] = {"impact": "pause", "scope": "host", "expected_s": 0.1, "timeout_s": 20.0}
        facts |= changes
        lines = [f"name = {json.dumps(name)}", f"argv = {json.dumps([sys.executable, '-c', code])}"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in facts.items()]
        (self.updates_dir / f"{name}.toml").write_text("\n".join(lines))
        return name

    def _write_host_file(self) -> Path:
        lines = [f'host = "{self.name}"', "[process]", f'freezer = "{self.freezer}"']
        for vm in self.vms:
            lines += ["[[vm]]", f'name = "{vm["name"]}"', f"agent = {json.dumps(vm['agent'])}"]
            lines += [f'set = "{vm["set"]}"', f"update_domain = {vm['ud']}"] if vm["set"] else []
            lines += [f"ram_bytes = {vm['ram']}", "[[vm.process]]"]
            lines += [f"argv = {json.dumps([sys.executable, '-S', '-c', vm['code']])}"]
        path = self.folder / "host.toml"
        path.write_text("\n".join(lines))
        return path

    def environ(self) -> dict[str, str]:
        """The settings as variables."""
        prefix = "CAESURA_HOST_UPDATER_"
        given = {
            "HOST_FILE": str(self._write_host_file()),
            "STATE_DIR": str(self.state_dir),
            "UPDATES_DIR": str(self.updates_dir),
            "BROKER_URL": self.fleet.broker.url,
            "HEALTH_LISTEN": "",
            "LOG_FORMAT": "json",
            "CLOCK_TIMEOUT_S": "3",
            **self.settings,
        }
        return {**os.environ, **{prefix + name: value for name, value in given.items()}}

    async def start(self) -> None:
        """Start and wait until this life is on the bus: a presence with a new instance, and an inventory."""
        ear = self.fleet.ear
        before = len(ear.heard)
        lives = {message.instance for message in ear.all(HostPresence)}
        await self.launch()
        await ear.one(HostPresence, lambda m: m.host == self.name and m.online and m.instance not in lives)
        await ear.one(
            HostInventory,
            lambda m: (
                m.host == self.name
                and m.guard == "ready"
                and any(each.message is m for each in ear.heard[before:])
            ),
        )

    async def launch(self) -> None:
        """Start it, and wait for nothing."""
        with (self.folder / "updater.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "caesura_host_updater",
                env=self.environ(),
                stderr=log if self.stderr is None else self.stderr,
                stdout=log,
            )

    @property
    def pid(self) -> int:
        """The updater's pid."""
        assert self.process is not None
        return self.process.pid

    def guard_pid(self) -> int:
        """The guard's pid, from the process table."""
        for pid in process_table():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"caesura_pause_guard" in words and str(self.state_dir).encode() in words:
                    return pid
        raise AssertionError("no guard runs")

    def run_of(self, vm: str) -> dict[str, Any]:
        """The run file that the VM's first process wrote."""
        found: dict[str, Any] = json.loads((self.state_dir / "vms" / f"{vm}.run.json").read_text())
        return found

    def members(self, vm: str) -> list[int]:
        """Pids of the VM's processes (signals only)."""
        return [member.pid for member in self.plan(vm).members(process_table())]

    def plan(self, vm: str) -> Any:
        """The VM as the kernel knows it."""
        run = self.run_of(vm)
        if run["kind"] == "sigstop":
            return plan_from_json(
                {
                    "kind": "signal",
                    "vm": vm,
                    "leader": run["pid"],
                    "start_ticks": run["start_ticks"],
                    "others": [],
                }
            )
        return plan_from_json({"kind": run["kind"], "vm": vm, "control": run["control"]})

    def kernel(self, vm: str) -> str:
        """running, held, frozen or gone: as the kernel says, not as anybody tells."""
        return condition(self.plan(vm))

    async def until(self, vm: str, *states: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the kernel says so of the VM."""
        await until(lambda: self.kernel(vm) in states, f"{vm} {states}", timeout_s)

    def command(self, *vms: str, **changes: Any) -> StartOperation:
        """A command to start an operation; by default for all VMs, holding for a second."""
        known = {vm["name"]: vm for vm in self.vms}
        facts: dict[str, Any] = {
            "operation": new_id(),
            "epoch": 1,
            "coordinator": "coordinator-1",
            "method": "freeze",
            "hold_s": 0.0 if "update" in changes else 1.0,
            "budget_s": 10.0,
            "not_after": datetime.now(UTC) + timedelta(seconds=30),
            "targets": tuple(
                OperationTarget(
                    vm=name,
                    set=known[name]["set"] or f"_{name}",
                    update_domain=known[name]["ud"] if known[name]["set"] else 0,
                )
                for name in (vms or known)
            ),
        }
        return StartOperation(host=self.name, rollout="r-1", wave=0, **(facts | changes))

    async def freeze(self, *vms: str, **changes: Any) -> StartOperation:
        """Send a command, see ``command``."""
        command = self.command(*vms, **changes)
        await self.fleet.say(command, host=self.name)
        return command

    async def abort(self, operation: str, **changes: Any) -> None:
        """Send an abort command."""
        facts: dict[str, Any] = {
            "epoch": 1,
            "coordinator": "coordinator-1",
            "reason": "the test says so",
        } | changes
        await self.fleet.say(AbortOperation(operation=operation, host=self.name, **facts), host=self.name)

    async def kill_with_guard(self) -> None:
        """Kill both; neither may act on the other's death."""
        guard = self.guard_pid()
        os.kill(guard, signal.SIGSTOP)
        os.kill(self.pid, signal.SIGKILL)
        os.kill(guard, signal.SIGKILL)
        assert self.process is not None
        await self.process.wait()

    async def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal the updater and wait for its end."""
        assert self.process is not None
        os.kill(self.process.pid, number)
        async with asyncio.timeout(patient(PATIENCE_S + 40)):
            await self.process.wait()

    async def stop(self) -> None:
        """The end of the test: stop everything, whatever state it is in, and look that nothing is left."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGCONT)
                os.kill(self.process.pid, signal.SIGKILL)
            await self.process.wait()
        for path in (self.state_dir / "vms").glob("*.run.json"):
            vm = path.name.removesuffix(".run.json")
            end_vm(self.plan(vm), self.run_of(vm))
            await until(lambda vm=vm: self.kernel(vm) == "gone", f"end of {vm}")  # type: ignore[misc]
            control = self.run_of(vm)["control"]
            if control:
                await until(lambda c=control: remove_cgroup(Path(c).parent), f"cgroup of {vm}")  # type: ignore[misc]
        with suppress(AssertionError):
            os.kill(self.guard_pid(), signal.SIGKILL)

    def log(self) -> list[dict[str, Any]]:
        """What the updater logged."""
        lines = (self.folder / "updater.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def end_vm(plan: Any, run: dict[str, Any]) -> None:
    """Thaw and kill a VM from outside."""
    from caesura_vmcontrol.resume_plans import SignalPlan  # noqa: PLC0415
    from caesura_vmcontrol.vm_control import resume_vm  # noqa: PLC0415

    if isinstance(plan, SignalPlan):
        pids = [member.pid for member in plan.members(process_table())]
    else:
        procs = Path(plan.control).parent / "cgroup.procs"
        pids = [int(pid) for pid in procs.read_text().split()] if procs.exists() else []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    resume_vm(plan)


def remove_cgroup(folder: Path) -> bool:
    """Remove a VM's cgroup and its base; whether it is gone."""
    for each in (folder, folder.parent):
        with suppress(OSError):
            each.rmdir()
    return not folder.exists()


async def until(condition_holds: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait for something that announces itself to nobody, such as the state of a process."""
    try:
        async with asyncio.timeout(patient(timeout_s)):
            while not condition_holds():  # noqa: ASYNC110 - the kernel does not call us
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


@pytest.fixture(scope="session", autouse=True)
def no_stray_loop() -> None:
    """On Python 3.11 pytest-asyncio asks for the current loop, which makes one that nobody closes.

    Saying that there is none keeps `asyncio.get_event_loop` from making it up.
    """
    asyncio.set_event_loop(None)


@pytest.fixture
def wait_for() -> Any:
    """``until``, for tests: fixtures are how a conftest is shared."""
    return until


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """A Mosquitto and an ear that hears everything."""
    if not mosquitto_installed():
        pytest.skip("no Mosquitto on this machine")
    data = tmp_path / "broker"
    data.mkdir()
    ear = Ear()
    async with mosquitto(data) as broker:
        options = BrokerOptions(url=broker.url, client_id="ear", reconnect_max_s=0.5)
        bus = MqttBus(options, filters=["caesura/v1/#"])
        task = asyncio.create_task(bus.run(ear.receive))
        assert await bus.wait_connected(patient(10))
        yield Fleet(broker, bus, ear)
        await bus.close()
        await task


@pytest.fixture
async def hosts(tmp_path: Path, fleet: Fleet) -> AsyncIterator[Callable[..., Host]]:
    """Makes hosts; stops them after the test and looks that nothing stays behind."""
    made: list[Host] = []

    def make(name: str = "host-1", freezer: str = "auto") -> Host:
        host = Host(tmp_path / name, fleet, name, freezer)
        made.append(host)
        return host

    yield make
    for host in made:
        await host.stop()
