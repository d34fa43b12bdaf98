"""A small fleet of the installed commands as real processes, for end-to-end tests: start, kill, stop, watch the kernel.

Everything a sandbox starts carries a mark in its environment; ``close`` kills whatever still does, frozen or not.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from weakref import WeakSet

import msgspec
import tomli_w

from caesura.bus.local_broker import LocalBroker
from caesura.runtime.identity import new_id
from caesura.runtime.processes import freezers, is_stopped, kill_marked, marked_processes, reads_frozen
from caesura_testing.evidence import ends_of_logs
from caesura_testing.patience import patient
from caesura_testing.qemu_witness import QemuWitness

_GUARDS = {b"caesura_pause_guard", b"caesura_host_updater.guard"}
"""The guard's module in this version, and in those before the guard had a package of its own."""
_POLL_S = 0.02
_WATCH_S = 0.01


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """One VM of the sandbox: ``sleep`` as its workload, and an agent unless it says otherwise."""

    name: str
    set: str = ""
    update_domain: int = 0
    agent: bool = True
    """Whether the host file says that an agent answers in it."""
    run_agent: bool = True
    """Whether one really runs."""
    ram_bytes: int = 65536
    agent_settings: Mapping[str, str] = {}
    argv: tuple[str, ...] = ("sleep", "1000000")


class Pause(msgspec.Struct):
    """One pause as the kernel showed it, on this machine's monotonic clock."""

    vm: str
    begun: float
    ended: float | None = None


def _is_agent(pid: int) -> bool:
    with suppress(OSError):
        return b"caesura_vm_agent" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


class KernelWatch:
    """Asks the kernel a hundred times a second which VMs are paused. Knows nothing of messages."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._pids: dict[str, int] = {}
        self._files: dict[int, list[Path]] = {}
        self.pauses: list[Pause] = []
        self._open: dict[str, Pause] = {}
        self._changed = asyncio.Event()

    def learn(self) -> dict[str, list[int]]:
        """Find the processes of every VM again; call when VMs were started."""
        found: dict[str, list[int]] = {}
        for pid in marked_processes(self._mark):
            with suppress(OSError):
                for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if item.startswith(b"CAESURA_VM="):
                        found.setdefault(item.partition(b"=")[2].decode(), []).append(pid)
        # Not the agent: a test may stop it alone, which does not pause the VM.
        self._pids = {
            vm: max([pid for pid in pids if not _is_agent(pid)] or pids) for vm, pids in found.items()
        }
        self._files = {pid: list(freezers(pid)) for pid in self._pids.values()}
        return found

    def frozen(self) -> set[str]:
        """VMs that are paused now."""
        return {
            vm
            for vm, pid in self._pids.items()
            if is_stopped(pid) or any(reads_frozen(path) for path in self._files[pid])
        }

    def standing(self) -> set[str]:
        """VMs whose pause is on record and has not ended."""
        return set(self._open)

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            frozen = self.frozen()
            for vm in frozen - self._open.keys():
                self._open[vm] = Pause(vm, now)
                self.pauses.append(self._open[vm])
            for vm in self._open.keys() - frozen:
                self._open.pop(vm).ended = now
            await asyncio.sleep(_WATCH_S)

    def of(self, vm: str) -> list[Pause]:
        """The pauses of one VM."""
        return [each for each in self.pauses if each.vm == vm]

    def longest_s(self) -> float:
        """The longest pause so far, one that has not ended counted up to now."""
        now = asyncio.get_running_loop().time()
        return max(((each.ended or now) - each.begun for each in self.pauses), default=0.0)

    def clashes(self, places: Mapping[str, tuple[str, int]]) -> list[str]:
        """Pairs of VMs of one set in different domains that were paused at once; ``places``: VM to (set, domain)."""
        now = asyncio.get_running_loop().time()
        found = []
        for index, one in enumerate(self.pauses):
            for two in self.pauses[index + 1 :]:
                (set_one, domain_one), (set_two, domain_two) = places[one.vm], places[two.vm]
                together = one.begun < (two.ended or now) and two.begun < (one.ended or now)
                if together and set_one == set_two and domain_one != domain_two:
                    found.append(f"{one.vm} and {two.vm}")
        return found


class Sandbox:
    """A folder, a broker, and named processes.

    Args:
        broker: the broker that all services use; it lives longer than the sandbox.
        freezer: how VMs are frozen, as in the host file.
    """

    open_ones: ClassVar[WeakSet[Sandbox]] = WeakSet()
    """Those that are not closed, for the report of a failure."""

    def __init__(self, broker: LocalBroker, *, freezer: str = "auto") -> None:
        self.open_ones.add(self)
        self.broker = broker
        self.freezer = freezer
        self.mark = f"CAESURA_TEST_RUN={new_id()}"
        # Unix sockets allow some 100 characters: pytest's own folders are too deep.
        self.folder = Path(tempfile.mkdtemp(prefix="caesura-e2e-", dir="/tmp"))
        self.running: dict[str, asyncio.subprocess.Process] = {}
        self.environments: dict[str, tuple[str, dict[str, str]]] = {}
        self.arguments: dict[str, tuple[str, ...]] = {}
        """Words for the command line of a service, where it has any."""
        self.versions: dict[str, Path] = {}
        """The folder of another version's sources, for a service that runs it; its guard and the VMs that it starts do, too."""
        self.outputs: dict[str, Path] = {}
        """Where a service writes its output instead of to its log: a named pipe that the test holds open."""
        self.places: dict[str, tuple[str, int]] = {}
        self.hosts: dict[str, str] = {}
        """VM to its host."""
        self.watch = KernelWatch(self.mark)
        self.qemu_witness = QemuWitness(self.mark, self.folder)
        self._watching: asyncio.Task[None] | None = None
        self._ram: Path | None = None
        (self.folder / "updates.d").mkdir()

    async def __aenter__(self) -> Self:
        self._watching = asyncio.create_task(self.watch.run(), name="kernel-watch")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Kill everything that this sandbox started, and remove its folder."""
        self.open_ones.discard(self)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for process in self.running.values():
            with suppress(ProcessLookupError):
                process.kill()
        await kill_marked(self.mark)
        for process in self.running.values():
            await process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._ram is not None:
            shutil.rmtree(self._ram, ignore_errors=True)

    # -- describing --

    def update(self, name: str, argv: list[str], **values: Any) -> None:
        """Write an update into the hosts' common updates.d."""
        table = {
            "name": name,
            "version": "1",
            "impact": "pause",
            "scope": "host",
            "expected_s": 1.0,
            "timeout_s": 20.0,
            "argv": argv,
            **values,
        }
        (self.folder / "updates.d" / f"{name}.toml").write_text(tomli_w.dumps(table))

    def host(self, name: str, *vms: Vm, **settings: str) -> None:
        """Describe a host updater; ``settings`` are its variables without prefix, in lower case."""
        table = {
            "host": name,
            "driver": "process",
            "process": {"freezer": self.freezer},
            "vm": [self._vm_table(vm) for vm in vms],
        }
        self._host(name, table, vms, settings)

    def qemu_host(self, name: str, *vms: Vm, **settings: str) -> None:
        """Describe a host updater whose VMs are QEMU processes with firmware alone: no agent, up in no time.

        Besides its usual sockets each has ``witness``, a QMP socket for the test. ``ram_bytes`` counts.
        """
        table = {
            "host": name,
            "driver": "qemu",
            "qemu": {
                "accel": "tcg",
                "run_dir": f"{self.folder}/{name}.run",
                "ram_dir": str(self._ram_folder()),
            },
            "vm": [self._qemu_table(name, vm) for vm in vms],
        }
        self._host(name, table, vms, settings)

    def libvirt_host(
        self, name: str, socket: str, uri: str, domains: Mapping[str, tuple[str, int]], **settings: str
    ) -> None:
        """Describe a host updater whose VMs are domains that are defined and labelled already.

        Args:
            socket: the daemon's.
            domains: VM to its set and its update domain.
        """
        table = {"host": name, "driver": "libvirt", "libvirt": {"uri": uri, "socket": socket}}
        vms = [Vm(name=vm, set=group, update_domain=domain) for vm, (group, domain) in domains.items()]
        self._host(name, table, vms, settings)

    def proxmox_host(
        self,
        name: str,
        config_dir: Path,
        run_dir: Path,
        found: Mapping[str, tuple[str, int]],
        **settings: str,
    ) -> None:
        """Describe a host updater on a Proxmox node whose VMs are configured and tagged already.

        Args:
            found: VM to its set and its update domain.
        """
        table = {
            "host": name,
            "driver": "proxmox",
            "proxmox": {"config_dir": str(config_dir), "run_dir": str(run_dir)},
        }
        vms = [Vm(name=vm, set=group, update_domain=domain) for vm, (group, domain) in found.items()]
        self._host(name, table, vms, settings)

    def container_host(
        self, name: str, socket: str, containers: Mapping[str, tuple[str, str, int]], **settings: str
    ) -> None:
        """Describe a host updater whose VMs are containers that run already.

        Args:
            socket: the engine's.
            containers: VM to the container's name, its set and its update domain.
        """
        table = {
            "host": name,
            "driver": "container",
            "container": {"socket": socket},
            "vm": [
                {
                    "name": vm,
                    "set": group,
                    "update_domain": domain,
                    "container": {"name": container},
                }
                for vm, (container, group, domain) in containers.items()
            ],
        }
        vms = [Vm(name=vm, set=group, update_domain=domain) for vm, (_, group, domain) in containers.items()]
        self._host(name, table, vms, settings)

    def _ram_folder(self) -> Path:
        if self._ram is None:
            self._ram = Path(tempfile.mkdtemp(prefix="caesura-e2e-", dir="/dev/shm"))
        return self._ram

    def _qemu_table(self, host: str, vm: Vm) -> dict[str, Any]:
        witness = f"{self.folder}/{host}.run/{vm.name}/witness"
        table: dict[str, Any] = {
            "name": vm.name,
            "agent": vm.agent,
            "qemu": {
                "memory_mib": max(16, vm.ram_bytes >> 20),
                "machine": "pc-q35-7.2",
                "extra": [
                    "-chardev",
                    f"socket,id=witness,path={witness},server=on,wait=off",
                    "-mon",
                    "chardev=witness,mode=control",
                ],
            },
        }
        if vm.set:
            table |= {"set": vm.set, "update_domain": vm.update_domain}
        return table

    def _host(
        self, name: str, table: Mapping[str, Any], vms: Sequence[Vm], settings: Mapping[str, str]
    ) -> None:
        (self.folder / f"{name}.toml").write_text(tomli_w.dumps(table))
        for vm in vms:
            self.places[vm.name] = (vm.set or f"_{vm.name}", vm.update_domain)
            self.hosts[vm.name] = name
        self.service(
            name,
            "caesura_host_updater",
            {
                "HOST_FILE": f"{self.folder}/{name}.toml",
                "STATE_DIR": f"{self.folder}/{name}",
                "UPDATES_DIR": f"{self.folder}/updates.d",
                **{key.upper(): value for key, value in settings.items()},
            },
        )

    def coordinator(self, name: str = "coordinator", **settings: str) -> None:
        """Describe a coordinator with a store of its own."""
        self.service(
            name,
            "caesura_coordinator",
            {
                "STATE_DIR": f"{self.folder}/{name}",
                "INSTANCE": name,
                "SETTLE_S": "0.5",
                **{key.upper(): value for key, value in settings.items()},
            },
        )

    def publisher(self, listeners: Mapping[str, str]) -> None:
        """Describe a metadata publisher; ``listeners``: VM to address."""
        path = self.folder / "listeners.toml"
        path.write_text(
            tomli_w.dumps({"listener": [{"vm": vm, "listen": listen} for vm, listen in listeners.items()]})
        )
        self.service("metadata", "caesura_metadata_publisher", {"LISTENERS_FILE": str(path)})

    def service(self, name: str, module: str, settings: Mapping[str, str]) -> None:
        """Describe any service: its module and its variables without prefix."""
        prefix = f"{module.upper()}_"
        environment = {
            "BROKER_URL": self.broker.url,
            "HEALTH_LISTEN": f"unix:{self.folder}/{name}.health",
            "LOG_FORMAT": "json",
            **settings,
        }
        self.environments[name] = (module, {prefix + key: value for key, value in environment.items()})

    def _vm_table(self, vm: Vm) -> dict[str, Any]:
        processes: list[dict[str, Any]] = [{"argv": list(vm.argv)}]
        if vm.run_agent:
            agent = {
                "CAESURA_VM_AGENT_VM": vm.name,
                "CAESURA_VM_AGENT_SET": vm.set,
                "CAESURA_VM_AGENT_BROKER_URL": self.broker.url,
                "CAESURA_VM_AGENT_CLOCK": "simulated",
                **{f"CAESURA_VM_AGENT_{key.upper()}": value for key, value in vm.agent_settings.items()},
            }
            processes.append({"argv": [sys.executable, "-m", "caesura_vm_agent"], "environ": agent})
        table: dict[str, Any] = {
            "name": vm.name,
            "agent": vm.agent,
            "ram_bytes": vm.ram_bytes,
            "process": processes,
        }
        if vm.set:
            table |= {"set": vm.set, "update_domain": vm.update_domain}
        return table

    # -- processes --

    async def start(self, *names: str) -> None:
        """Start described services; each writes its log to the folder."""
        for name in names:
            module, environment = self.environments[name]
            inherited = {key: value for key, value in os.environ.items() if not key.startswith("CAESURA_")}
            if (sources := self.versions.get(name)) is not None:
                inherited["PYTHONPATH"] = f"{sources}/services:{sources}/shared"
            mark, value = self.mark.split("=", 1)
            with self.outputs.get(name, self.folder / f"{name}.log").open("ab", buffering=0) as log:
                self.running[name] = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    module,
                    *self.arguments.get(name, ()),
                    env={**inherited, **environment, mark: value},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a service."""
        self.running[name].send_signal(number)

    async def kill(self, name: str) -> None:
        """Kill -9 a service and wait until it is gone."""
        self.running[name].kill()
        await self.running[name].wait()

    async def stop(self, name: str, timeout_s: float = 15.0) -> int:
        """Terminate a service and wait for its drain; its exit code."""
        self.running[name].terminate()
        async with asyncio.timeout(patient(timeout_s)):
            return await self.running[name].wait()

    async def until_exit(self, name: str, timeout_s: float) -> int:
        """Wait until a service ends by itself; its exit code. Raises TimeoutError."""
        async with asyncio.timeout(patient(timeout_s)):
            return await self.running[name].wait()

    def guard_pid(self, host: str) -> int:
        """The pause guard of a host.

        Raises:
            LookupError: it does not run.
        """
        wanted = f"{self.folder}/{host}".encode()
        for pid in marked_processes(self.mark):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if _GUARDS & set(words) and any(word.startswith(wanted) for word in words):
                    return pid
        raise LookupError(f"no pause guard of {host}")

    def vm_pids(self, vm: str) -> list[int]:
        """All processes of a VM."""
        return self.watch.learn().get(vm, [])

    def agent_pid(self, vm: str) -> int:
        """The agent in a VM.

        Raises:
            LookupError: none runs.
        """
        for pid in self.vm_pids(vm):
            if _is_agent(pid):
                return pid
        raise LookupError(f"no agent in {vm}")

    @contextmanager
    def silent_agent(self, vm: str) -> Iterator[None]:
        """The VM's agent says nothing in this block; where the VM is paused now, from its resume on.

        A VM that is resumed by SIGCONT (freezer ``sigstop``) wakes its agent: then this holds nothing back.

        Raises:
            LookupError: no agent runs.
        """
        agent = self.agent_pid(vm)
        os.kill(agent, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(agent, signal.SIGCONT)

    # -- waiting --

    async def until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for a condition.

        Raises:
            AssertionError: it did not come true in time; with the ends of all logs.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + patient(timeout_s)
        while not condition():
            if loop.time() > end:
                raise AssertionError(f"not within {timeout_s:g} s: {what}\n{self.logs()}")
            await asyncio.sleep(_POLL_S)

    def logs(self) -> str:
        """The ends of all logs, for failure reports."""
        return ends_of_logs(self.folder)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log of a service as decoded JSON lines."""
        found = []
        for line in (self.folder / f"{name}.log").read_text(errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found
