"""One VM as the driver sees it: the process that runs it, the open QMP connection, and what its events say.

Nothing here waits for a QEMU when its state is asked: the state follows the events.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from caesura.contract.messages import Method, VmState
from caesura_host_updater.detached import ExitWatch
from caesura_host_updater.drivers.qemu import commandline
from caesura_host_updater.drivers.qemu.checks import (
    Picture,
    counted,
    device_types,
    disk_files,
    pci_places,
    ram_blocks,
)
from caesura_host_updater.drivers.qemu.obstacles import obstacles
from caesura_host_updater.drivers.qemu.qmp import Event, Qmp, QmpFailed, listener_of
from caesura_host_updater.drivers.qemu.records import Run
from caesura_host_updater.drivers.qemu.vmm import NoVmm, foreign, marked_as, ram_error, read_vmm
from caesura_host_updater.guard.guest import OVER
from caesura_host_updater.guard.plans import QemuPlan, ReplacePlan, SwapPlan, Vmm
from caesura_host_updater.guard.procfs import STOPPED, alive, boot_id, read_process
from caesura_host_updater.hostfile import VmSpec

_GREETING_S = 2.0  # s: QEMU greets within milliseconds; another client's turn may take the guard a second
NO_REBOOT = "the qemu driver does not restart VMs for an update"

_log = structlog.get_logger("caesura.qemu")


class NotAttached(Exception):
    """The process that should run a VM cannot be talked to; the text says why."""


@dataclass
class Prepared:
    """What ``prepare`` made for one operation.

    ``qmp``: the connection to a swap's new process. ``begun``: the guest may be in another process, or in none.
    ``over``: it was to be released, and that could not be done yet.
    """

    operation: str
    method: Method
    plan: SwapPlan | ReplacePlan
    claims: Path
    qmp: Qmp | None = None
    watch: ExitWatch | None = None
    detail: str = ""
    begun: bool = False
    over: bool = False


@dataclass(eq=False)
class Guest:
    """See the module. ``why``: what is wrong with it, for the probe; ``changed`` is called when it ended."""

    spec: VmSpec
    changed: Callable[[], None]
    run: Run | None = None
    qmp: Qmp | None = None
    machine: str = ""
    missing: dict[Method, str] = field(default_factory=dict)
    prepared: Prepared | None = None
    why: str = ""
    _status: str = ""
    _exit: ExitWatch | None = None

    @property
    def vm(self) -> str:
        """Its name."""
        return self.spec.name

    # -- attaching ------------------------------------------------------------------------------------------

    async def attach(self, run: Run, qmp: Qmp | None = None) -> None:
        """From now on this process is the VM. ``qmp``: a connection that is open already.

        Raises:
            NotAttached: it is gone, is no QEMU, or does not answer.
        """
        await self.detach()
        self.run = run
        try:
            self._exit = ExitWatch(run.pid, self._ended)
        except ProcessLookupError:
            raise NotAttached("its process has ended") from None
        if not alive(run.pid, run.start_ticks):
            await self.detach()
            raise NotAttached("its process has ended")
        try:
            self.qmp = qmp if qmp is not None else await _connected(run)
            self.qmp.on_event = self._heard
            self.qmp.on_closed = self.changed
            self._status = await self.qmp.status()
            resolved = await self.qmp.execute("qom-get", path="/machine", property="type")
        except (NotAttached, QmpFailed) as error:
            await self._let_go()
            raise NotAttached(str(error)) from error
        self.machine = str(resolved).removesuffix("-machine")
        self.missing = self._obstacles(run)
        self.why = ""

    def _obstacles(self, run: Run) -> dict[Method, str]:
        missing: dict[Method, str] = {"reboot": NO_REBOOT}
        why = _guard_error(run)
        if why:
            return {**missing, "freeze": why, "swap": why, "replace": why}
        found = obstacles(run.argv, self.machine)
        both = [*found.both, *filter(None, [foreign(run.pid)])]
        memory = commandline.memory_of(run.argv)
        if isinstance(memory, commandline.Memory):
            both += filter(None, [ram_error(run.pid, memory.file, memory.size)])
        if both:
            missing |= {"swap": "; ".join(both), "replace": "; ".join(both)}
        elif found.beside:
            missing["swap"] = "; ".join(found.beside)
        return missing

    def expect_end(self) -> None:
        """It is about to be stopped: that is no news."""
        if self._exit is not None:
            self._exit.close()
            self._exit = None

    async def detach(self) -> None:
        """Let go of the process; it runs on."""
        self.expect_end()
        await self._let_go()
        self.run = None
        self._status = ""

    async def _let_go(self) -> None:
        if self.qmp is not None:
            qmp, self.qmp = self.qmp, None
            await qmp.close()

    def take(self, run: Run, qmp: Qmp) -> tuple[Qmp | None, ExitWatch | None]:
        """A swap's new process runs the guest: switch over at once. What is left of the old one."""
        left = self.qmp, self._exit
        if left[0] is not None:
            left[0].on_event = lambda _: None
            left[0].on_closed = lambda: None
        self.run, self.qmp, self._status = run, qmp, "running"
        qmp.on_event = self._heard
        qmp.on_closed = self.changed
        self._exit = ExitWatch(run.pid, self._ended)
        return left

    # -- what it does by itself -----------------------------------------------------------------------------

    def _ended(self) -> None:
        self._exit = None
        self.run = None
        self._status = ""
        if self.prepared is None:
            self.why = "its process has ended"
            _log.warning("vm.ended", vm=self.vm)
        self.changed()

    def _heard(self, event: Event) -> None:
        match event.name:
            case "RESUME":
                self._status = "running"
            case "STOP" if self._status not in OVER:
                self._status = "paused"
            case "GUEST_PANICKED" if event.data.get("action") != "run":
                self._status = "guest-panicked"
                self.changed()
            case "SHUTDOWN":
                self._status = "shutdown"
                self.changed()
            case "RESET":
                self._status = "running" if self._status == "shutdown" else self._status

    @property
    def state(self) -> VmState:
        """Now."""
        mute = not self._status or self.qmp is None or self.qmp.closed
        if self.run is None or (mute and not alive(self.run.pid, self.run.start_ticks)):
            # The guard may have been quicker, or there is only its memory now: `resume` finds out.
            return "paused" if self.prepared is not None and self.prepared.begun else "stopped"
        if mute:
            return "unknown"
        if self._status in OVER:
            return "stopped"
        if self._status in ("running", "suspended"):
            process = read_process(self.run.pid)
            return "paused" if process is not None and process.state == STOPPED else "running"
        return "paused"

    def complaint(self) -> str:
        """What is wrong with it, for the probe; empty: nothing."""
        if self.state == "stopped":
            return self.why or "its process has ended"
        return self.why or "it does not answer" if self.state == "unknown" else ""

    # -- asking ---------------------------------------------------------------------------------------------

    def vmm(self) -> Vmm | None:
        """The process for the guard; None: there is none, or none that the guard could talk to."""
        if self.run is None or not self.run.guard:
            return None
        return Vmm(self.run.pid, self.run.start_ticks, self.run.guard)

    def plan(self) -> QemuPlan | SwapPlan | ReplacePlan | None:
        """The way out of what was prepared, or of a plain stop."""
        if self.prepared is not None:
            return self.prepared.plan
        vmm = self.vmm()
        return QemuPlan(self.vm, vmm) if vmm is not None else None

    def describe(self) -> str:
        """For people."""
        if self.run is None:
            return ""
        version = self.qmp.version if self.qmp is not None else "?"
        return f"QEMU {version} (pid {self.run.pid})"


async def _connected(run: Run) -> Qmp:
    qmp = await Qmp.connect(run.qmp, _GREETING_S)
    if qmp.listener != run.pid:
        await qmp.close()
        raise NotAttached(f"{run.qmp} belongs to process {qmp.listener}, not to {run.pid}")
    return qmp


async def picture(qmp: Qmp) -> Picture:
    """What a QEMU says of itself. Raises QmpFailed."""
    peripheral = device_types(await qmp.execute("qom-list", path="/machine/peripheral"))
    unnamed = device_types(await qmp.execute("qom-list", path="/machine/peripheral-anon"))
    return Picture(
        version=qmp.version,
        machine=str(await qmp.execute("qom-get", path="/machine", property="type")).removesuffix("-machine"),
        vcpus=len(await qmp.execute("query-cpus-fast")),
        devices={**peripheral, **counted(unnamed)},
        places=pci_places(await qmp.execute("query-pci")),
        blocks=ram_blocks(await qmp.execute("human-monitor-command", command_line="info ramblock")),
        disks=disk_files(await qmp.execute("query-block")),
    )


async def adopted(qmp_path: str, guard: str, agent: str) -> tuple[Run, Qmp]:
    """Find out which process listens on a QMP socket, and whether it is a QEMU.

    Raises:
        NotAttached: nobody, somebody who is no QEMU, or a QEMU that somebody else commands.
    """
    try:
        listener = listener_of(qmp_path)
        process = read_vmm(listener)
        qmp = await Qmp.connect(qmp_path, _GREETING_S)
    except OSError as error:
        raise NotAttached(f"{qmp_path}: {error.strerror or error}") from error
    except NoVmm as error:
        raise NotAttached(f"{qmp_path} is served by somebody else: {error}") from error
    except QmpFailed as error:
        raise NotAttached(str(error)) from error
    argv = commandline.settled(process.argv)
    memory = commandline.memory_of(argv)
    run = Run(
        pid=process.pid,
        start_ticks=process.start_ticks,
        boot_id=boot_id(),
        argv=argv,
        qmp=qmp_path,
        guard=guard,
        agent=agent,
        ours=False,
        ram_file=memory.file if isinstance(memory, commandline.Memory) else "",
    )
    return run, qmp


def found_by_sockets(pid: int, mark: str) -> tuple[str, Run] | None:
    """The VM that a process of ours is, though no run file says so: it listens under the settled names.

    A process that was to follow and never came to it listens in a folder of its own, and is nobody's VM.
    """
    try:
        argv = commandline.settled(read_vmm(pid).argv)
        vm = marked_as(pid, mark).partition("/")[0]
        sockets = {Path(path).name: path for path in commandline.sockets_of(argv)}
        process = read_process(pid)
    except (OSError, NoVmm):
        return None
    if not vm or process is None or not any(_listens(pid, path) for path in sockets.values()):
        return None
    memory = commandline.memory_of(argv)
    run = Run(
        pid=pid,
        start_ticks=process.start_ticks,
        boot_id=boot_id(),
        argv=argv,
        qmp=sockets.get("qmp", ""),
        guard=sockets.get("guard", ""),
        agent=sockets.get("ga", ""),
        ours=True,
        ram_file=memory.file if isinstance(memory, commandline.Memory) else "",
    )
    return vm, run


def _listens(pid: int, path: str) -> bool:
    with suppress(OSError):
        return listener_of(path) == pid
    return False


def _guard_error(run: Run) -> str:
    if not run.guard:
        return "it has no second QMP socket for the pause guard (guard_qmp)"
    try:
        listener = listener_of(run.guard)
    except OSError as error:
        return f"its QMP socket for the pause guard, {run.guard}: {error.strerror or error}"
    if listener != run.pid:
        return f"its QMP socket for the pause guard, {run.guard}, belongs to process {listener}"
    return ""
