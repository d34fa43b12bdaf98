"""One VM as the driver sees it: the process that runs it, the open QMP connection, and what its events say.

Nothing here waits for a QEMU when its state is asked: the state follows the events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from caesura.contract.messages import Method, VmState
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.qemu import commandline, successor
from caesura_host_updater.drivers.qemu.async_qmp import AsyncQmp, QmpEvent, QmpFailed, listener_of
from caesura_host_updater.drivers.qemu.definition import QemuVm
from caesura_host_updater.drivers.qemu.kexec_obstacles import OFF, kexec_obstacles
from caesura_host_updater.drivers.qemu.observer import read_machine
from caesura_host_updater.drivers.qemu.obstacles import Obstacles, obstacles, paths_of
from caesura_host_updater.drivers.qemu.process_records import TRIAL, VmProcessRecord
from caesura_host_updater.drivers.qemu.snapshot import VmSnapshot
from caesura_host_updater.drivers.qemu.vmm import NoVmm, foreign, marked_as, ram_error, read_vmm
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_host_updater.spawn import ExitWatch
from caesura_vmcontrol.procfs import STOPPED, alive, boot_id, ending, read_process
from caesura_vmcontrol.qemu_plans import QemuPlan, ReplacePlan, SwapPlan, Vmm
from caesura_vmcontrol.qemu_replace import STUCK
from caesura_vmcontrol.qmp_commands import AWAY, NOT_OURS, OVER, RUNNING

_GREETING_S = 2.0  # s: QEMU greets within milliseconds; another client's turn may take the guard a second
_LOOK_S = 10.0  # s: for the kernel's word on a process; seconds on a busy emulated host, and a QEMU that is stuck in the kernel may hold us up
_STATUS_S = 0.1  # s: QEMU answers within a millisecond
PAUSED_BEFORE = "it was paused by somebody else before anything was done: resume it with `cont`"
PAUSED_AFTER = "it ran again and was paused by somebody else since: resume it with `cont`"
NO_REBOOT = "it was not started by Caesura, so it could not be started again: restart it by what starts it"

_log = get_logger("caesura.qemu")


class NotAttached(Exception):
    """The process that should run a VM cannot be talked to; the text says why."""


@dataclass
class Prepared:
    """What ``prepare`` made for one operation.

    ``seen``: the machine as it was when it was compared with the next process's, and ``moved_bytes``, what a hand-over
    may copy at the most. ``qmp``: the connection to a swap's new process. ``begun``: the guest may be in another process, or in none.
    ``folder``: its record.
    ``over``: it was to be released, and that could not be done yet.
    """

    operation: str
    method: Method
    plan: SwapPlan | ReplacePlan
    folder: Path
    seen: VmSnapshot | None = None
    moved_bytes: int = 0
    qmp: AsyncQmp | None = None
    watch: ExitWatch | None = None
    detail: str = ""
    begun: bool = False
    over: bool = False


@dataclass(eq=False)
class Guest:
    """See the module. ``last_error``: what is wrong with it, for the probe; ``changed`` is called when it ended."""

    spec: QemuVm
    changed: Callable[[], None]
    kernel: KernelOptions = field(default_factory=KernelOptions)
    run: VmProcessRecord | None = None
    qmp: AsyncQmp | None = None
    machine: str = ""
    unguarded: str = ""
    """Why the pause guard could not resume it, so that nothing may pause it; empty: it could."""
    stated: Obstacles = field(default_factory=Obstacles)
    """What its command line says against another process."""
    compared: Obstacles = field(default_factory=Obstacles)
    """What its host and its machine as it is now say against another process; see ``assessor``."""
    across: tuple[str, ...] = (OFF,)
    """What its host and its RAM say against another kernel under it."""
    prepared: Prepared | None = None
    last_error: str = ""
    left: str = ""
    """Why it is not resumed although it is paused: somebody else has it, or paused it. Empty: nobody."""
    stopped_by_us: bool = False
    """Whether our own ``stop`` paused it, in this run."""
    _status: str = ""
    _exit: ExitWatch | None = None

    @property
    def vm(self) -> str:
        """Its name."""
        return self.spec.name

    # -- attaching ------------------------------------------------------------------------------------------

    async def attach(self, run: VmProcessRecord, qmp: AsyncQmp | None = None) -> None:
        """From now on this process is the VM. ``qmp``: a connection that is open already.

        Raises:
            NotAttached: it is gone, is not a QEMU, or does not answer.
        """
        await self.detach()
        self.run = run
        try:
            self._exit = ExitWatch(run.pid, self._ended)
        except ProcessLookupError:
            await self.detach()
            raise NotAttached("its process has ended") from None
        if not alive(run.pid, run.start_ticks):
            await self.detach()
            raise NotAttached("its process has ended")
        try:
            self.qmp = qmp if qmp is not None else await _connected(run)
            self.qmp.on_event = self._on_event
            self.qmp.on_closed = self.changed
            await self._ask(self.qmp)
        except (NotAttached, QmpFailed) as error:
            await self._disconnect()
            raise NotAttached(str(error)) from error
        self.unguarded = _guard_error(run)
        self.stated = obstacles(run.argv, self.machine)
        self.compared = Obstacles(tuple(await _host_obstacles(run)))
        self.across = await _kexec_obstacles(run, self.kernel)
        self.last_error = ""
        if self.unguarded:
            # Nothing can be done with it: another client that wants its only QMP socket shall get it.
            await self._disconnect()

    async def poll(self) -> None:
        """Look at a VM whose QMP socket is not held, for a moment. Raises NotAttached."""
        run = self.run
        if run is None or self.qmp is not None:
            return
        if not _guard_error(run):
            await self.attach(run)
            return
        qmp = await _connected(run)
        try:
            await self._ask(qmp)
        except QmpFailed as error:
            raise NotAttached(str(error)) from error
        finally:
            await qmp.close()

    async def refresh(self) -> None:
        """Ask why a guest is paused that we did not pause: the event says that it is, and not why."""
        if self.qmp is None or self.qmp.closed:
            return
        with suppress(QmpFailed):
            status = await self.qmp.status()
            if self.state == "paused":
                self._status = status

    async def look_across(self) -> None:
        """Look again whether another kernel can be started under it: what was in the way may be gone, or did not answer in time."""
        run = self.run
        if run is None or not self.across or self.across == (OFF,):
            return
        found = await _kexec_obstacles(run, self.kernel)
        if self.run is run and found != self.across:
            self.across = found
            self.changed()

    async def _ask(self, qmp: AsyncQmp) -> None:
        self._status = await qmp.status()
        self.machine = await read_machine(qmp)

    @property
    def missing(self) -> dict[Method, str]:
        """What cannot be done with it, and every reason."""
        missing: dict[Method, str] = {} if self.spec.qemu is not None else {"reboot": NO_REBOOT}
        both = [*filter(None, [self.unguarded]), *self.stated.both, *self.compared.both]
        beside = [*both, *self.stated.beside, *self.compared.beside]
        if self.unguarded:
            missing["freeze"] = self.unguarded
        if both:
            missing["replace"] = "; ".join(dict.fromkeys(both))
        if both or self.across:
            why = self.across if self.across == (OFF,) else (*both, *self.across)
            missing["kexec"] = "; ".join(dict.fromkeys(why))
        if beside:
            missing["swap"] = "; ".join(dict.fromkeys(beside))
        return missing

    def expect_end(self) -> None:
        """It is about to be stopped: that is expected."""
        if self._exit is not None:
            self._exit.close()
            self._exit = None

    async def detach(self) -> None:
        """Release the process; it runs on."""
        self.expect_end()
        await self._disconnect()
        self.run = None
        self._status = self.left = ""

    async def _disconnect(self) -> None:
        if self.qmp is not None:
            qmp, self.qmp = self.qmp, None
            await qmp.close()

    def switch_to(self, run: VmProcessRecord, qmp: AsyncQmp) -> tuple[AsyncQmp | None, ExitWatch | None]:
        """A swap's new process runs the guest: switch over at once. What is left of the old one."""
        left = self.qmp, self._exit
        if left[0] is not None:
            left[0].on_event = lambda _: None
            left[0].on_closed = lambda: None
        self.run, self.qmp, self._status = run, qmp, "running"
        qmp.on_event = self._on_event
        qmp.on_closed = self.changed
        self._exit = ExitWatch(run.pid, self._ended)
        return left

    # -- what it does by itself -----------------------------------------------------------------------------

    def _ended(self) -> None:
        self._exit = None
        self.run = None
        self._status = ""
        if self.prepared is None:
            self.last_error = "its process has ended"
            _log.warning("vm.ended", vm=self.vm)
        self.changed()

    def _on_event(self, event: QmpEvent) -> None:
        match event.name:
            case "RESUME":
                self._status, self.left, self.stopped_by_us = "running", "", False
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
    def mute(self) -> bool:
        """Whether it tells us nothing now: its QMP connection is gone, or never answered."""
        held = self.qmp is not None and not self.qmp.closed
        return not self._status or not (held or self.unguarded)

    @property
    def state(self) -> VmState:
        """Now."""
        mute = self.mute
        if self.run is None or (mute and ending(self.run.pid, self.run.start_ticks)):
            # The guard may have been quicker, or there is only its memory now: `resume` finds out.
            return "paused" if self.prepared is not None and self.prepared.begun else "stopped"
        if self._status in OVER:
            return "stopped"  # also between the end of its connection and that of its process
        if mute:
            return "unknown"
        if self._status in AWAY and (self.left or not (self.prepared is not None and self.prepared.begun)):
            return "stopped"
        if self._status in ("running", "suspended"):
            process = read_process(self.run.pid)
            return "paused" if process is not None and process.state == STOPPED else "running"
        return "paused"

    @property
    def shut_down(self) -> bool:
        """Whether its guest has powered itself down, though its process may stay (``-no-shutdown``)."""
        return self._status == "shutdown"

    def health_error(self) -> str:
        """What is wrong with it, for the probe; empty: nothing."""
        if self.left:
            return self.left
        if self.state == "paused" and self.last_error.startswith(STUCK):
            return self.last_error
        if self._status in NOT_OURS and not (self.prepared is not None and self.prepared.begun):
            return NOT_OURS[self._status]
        if self.state == "stopped":
            return self.last_error or "its process has ended"
        return self.last_error or "it does not answer" if self.state == "unknown" else ""

    def leave(self, status: str, why: str) -> None:
        """It is not ours to resume: somebody else has it, or paused it; ``status`` is QEMU's word for that."""
        self._status, self.left = status, why
        _log.error("vm.left_as_it_is", vm=self.vm, status=status, why=why)
        self.changed()

    async def leave_as_found(self) -> None:
        """It is paused or away, and nothing that we did brought it there."""
        status = "paused"
        if self.qmp is not None and not self.qmp.closed:
            with suppress(QmpFailed):
                status = await self.qmp.status(_STATUS_S)
        if status in RUNNING or status in OVER:
            self._status = status
            return
        begun = self.prepared is not None and self.prepared.begun
        self.leave(status, NOT_OURS.get(status, PAUSED_AFTER if begun else PAUSED_BEFORE))

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


async def _kexec_obstacles(run: VmProcessRecord, kernel: KernelOptions) -> tuple[str, ...]:
    try:
        async with asyncio.timeout(_LOOK_S):
            return await in_thread("look at a QEMU", lambda: kexec_obstacles(run, kernel))
    except TimeoutError:
        return (f"its files cannot be looked at within {_LOOK_S:g} s",)
    except OSError as error:
        return (f"its files cannot be looked at: {error.strerror or error}",)


async def _host_obstacles(run: VmProcessRecord) -> list[str]:
    """What the host says against another process; asked in a thread, for the kernel may make us wait."""
    try:
        async with asyncio.timeout(_LOOK_S):
            return await in_thread("look at a QEMU", lambda: host_obstacles(run))
    except TimeoutError:
        return [f"process {run.pid} cannot be looked at within {_LOOK_S:g} s"]


def host_obstacles(run: VmProcessRecord) -> list[str]:
    """What the host says against another process that shall take this one's guest over. Blocking."""
    found = foreign(run.pid, paths_of(run.argv))
    memory = commandline.memory_of(run.argv)
    if isinstance(memory, commandline.GuestRam):
        found += filter(None, [ram_error(run.pid, memory.file, memory.size)])
    return found


async def _connected(run: VmProcessRecord) -> AsyncQmp:
    qmp = await AsyncQmp.connect(run.qmp, _GREETING_S)
    if qmp.listener != run.pid:
        await qmp.close()
        raise NotAttached(f"{run.qmp} belongs to process {qmp.listener}, not to {run.pid}")
    return qmp


async def adopted(qmp_path: str, guard: str, agent: str) -> tuple[VmProcessRecord, AsyncQmp]:
    """Find out which process listens on a QMP socket, and whether it is a QEMU.

    Raises:
        NotAttached: nobody, somebody who is not a QEMU, or a QEMU that somebody else commands.
    """
    try:
        listener = listener_of(qmp_path)
        async with asyncio.timeout(_LOOK_S):
            process = await in_thread("look at a QEMU", lambda: read_vmm(listener))
        qmp = await AsyncQmp.connect(qmp_path, _GREETING_S)
    except TimeoutError as error:
        raise NotAttached(f"{qmp_path}: its process cannot be looked at within {_LOOK_S:g} s") from error
    except OSError as error:
        raise NotAttached(f"{qmp_path}: {error.strerror or error}") from error
    except NoVmm as error:
        raise NotAttached(f"{qmp_path} is served by somebody else: {error}") from error
    except QmpFailed as error:
        raise NotAttached(str(error)) from error
    argv = successor.settled(process.argv)
    memory = commandline.memory_of(argv)
    run = VmProcessRecord(
        pid=process.pid,
        start_ticks=process.start_ticks,
        boot_id=boot_id(),
        argv=argv,
        qmp=qmp_path,
        guard=guard,
        agent=agent,
        ours=False,
        ram_file=memory.file if isinstance(memory, commandline.GuestRam) else "",
    )
    return run, qmp


def found_by_sockets(pid: int, mark: str) -> tuple[str, VmProcessRecord] | None:
    """The VM that one of our processes is, though no run file says so: it listens under the settled names.

    A process that was to follow and never came to it listens in a folder of its own, and is nobody's VM.
    """
    try:
        argv = successor.settled(read_vmm(pid).argv)
        vm, _, operation = marked_as(pid, mark).partition("/")
        sockets = {Path(path).name: path for path in successor.sockets_of(argv)}
        process = read_process(pid)
    except (OSError, NoVmm):
        return None
    if operation == TRIAL:
        return None
    if not vm or process is None or not any(_listens(pid, path) for path in sockets.values()):
        return None
    memory = commandline.memory_of(argv)
    run = VmProcessRecord(
        pid=pid,
        start_ticks=process.start_ticks,
        boot_id=boot_id(),
        argv=argv,
        qmp=sockets.get("qmp", ""),
        guard=sockets.get("guard", ""),
        agent=sockets.get("ga", ""),
        ours=True,
        ram_file=memory.file if isinstance(memory, commandline.GuestRam) else "",
    )
    return vm, run


def _listens(pid: int, path: str) -> bool:
    with suppress(OSError):
        return listener_of(path) == pid
    return False


def _guard_error(run: VmProcessRecord) -> str:
    if not run.guard:
        return "it has no second QMP socket for the pause guard (guard_qmp)"
    try:
        listener = listener_of(run.guard)
    except OSError as error:
        return f"its QMP socket for the pause guard, {run.guard}: {error.strerror or error}"
    if listener != run.pid:
        return f"its QMP socket for the pause guard, {run.guard}, belongs to process {listener}"
    return ""
