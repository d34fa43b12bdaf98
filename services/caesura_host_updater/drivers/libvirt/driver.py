"""The ``libvirt`` driver: the port's verbs over domains.

Domains are found, and noticed by libvirt's events when they come, go or change their labels. A pause and its end go over short
connections of the RPC that the pause guard uses, too; everything else over the binding's connection.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from caesura.contract.messages import Method, VmState
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread, in_thread_to_its_end
from caesura_host_updater.drivers.clock_setting import set_clock
from caesura_host_updater.drivers.guest_agent import read_boot_id
from caesura_host_updater.drivers.libvirt.agent import libvirt_agent
from caesura_host_updater.drivers.libvirt.connection import LibvirtConnection, existing_socket
from caesura_host_updater.drivers.libvirt.definition import FoundDomain, LibvirtOptions, LibvirtVm, vms_of
from caesura_host_updater.drivers.libvirt.resume_paths import plan_of_domain
from caesura_host_updater.drivers.port import (
    Capabilities,
    ClockSet,
    DriverError,
    FreezeFailed,
    NotPossible,
    NotRunningYet,
    ShutdownFailed,
)
from caesura_host_updater.drivers.remote_pauses import LatePauses, ResumeTries
from caesura_host_updater.drivers.shutdown_requests import ShutdownRequests
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.libvirt_control import (
    DomainNotPaused,
    DomainPausedBefore,
    conditions,
    suspend_domain,
    why_not_ours,
)
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan, LibvirtSilent
from caesura_vmcontrol.procfs import alive
from caesura_vmcontrol.vm_control import condition, resume_vm

_LOOK_S = 5.0  # s: between two looks without an event
_ASK_S = 5.0  # s: for a list of the domains; it takes milliseconds
_SETTLE_S = 0.02  # s: events of one change come together
_STEP_S = 0.005  # s: between two looks at a domain that is to be paused or to run
_POLL_S = 0.1  # s: between two looks at a domain that shuts down
_STATES: dict[Condition, VmState] = {
    "running": "running",
    "held": "paused",
    "frozen": "paused",
    "gone": "stopped",
}
_MISSING: Mapping[str, str] = {
    "swap": "its QEMU process belongs to libvirt, which would lose the guest if another one took it over",
    "replace": "its QEMU process belongs to libvirt: it cannot be ended and started again under its guest",
    "kexec": "its QEMU process belongs to libvirt: it cannot be started again by the next kernel",
}
_NOTHING_BUT_THE_DAEMON = (
    "only libvirt's daemon can resume it: while that hangs or is away the VM stays paused, beyond its budget if need be. Run host"
    " updater and pause guard as root, or give the domain a QMP socket of its own"
)
_NOT_PAST_A_HANG = (
    "a daemon of libvirt's that hangs (not: one that is dead) keeps it paused, beyond its budget if need be: a QMP socket of the"
    " domain's own helps"
)
_PAUSED_BEFORE = "it was paused by somebody else before anything was done: resume it with `virsh resume`"

_log = get_logger("caesura.driver")


class LibvirtDriver:
    """See the module.

    Args:
        options: the host file's table ``[libvirt]``.
        sockets: where the daemon may listen; the first that exists is used.
        state_dir: where shutdown requests are noted.
    """

    name = "libvirt"

    def __init__(self, options: LibvirtOptions, sockets: tuple[str, ...], state_dir: Path) -> None:
        self._options = options
        self._sockets = sockets
        self._folder = state_dir / "vms"
        self._requests = ShutdownRequests(self._folder)
        self._connection: LibvirtConnection | None = None
        self._socket = ""
        self._vms: dict[str, LibvirtVm] = {}
        self._plans: dict[str, LibvirtPlan] = {}
        """Domains that run, paused or not."""
        self._found: dict[str, FoundDomain] = {}
        self._passed: dict[str, str] = {}
        self._held: set[str] = set()
        """VMs of an operation: they stay members until it is over, wherever their domain is."""
        self._left: dict[str, str] = {}
        self._late = LatePauses(self._plan, "libvirt")
        self._down: set[str] = set()
        """VMs that were asked to shut down and do not run again yet."""
        self._tries = ResumeTries()
        self._version = ""
        self._error = "libvirt was not asked yet"
        self._asking: asyncio.Future[None] | None = None
        self._event = asyncio.Event()
        self._change = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    # -- life ---------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find the domains. A daemon that is away is asked again; a binding that is missing is an error.

        Raises:
            NoBinding: there is no binding that this Python can load.
        """
        await in_thread("state folder", lambda: self._folder.mkdir(parents=True, exist_ok=True, mode=0o700))
        loop = asyncio.get_running_loop()
        self._socket = await in_thread("socket", partial(existing_socket, self._sockets))

        def changed() -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(self._event.set)

        self._connection = LibvirtConnection(self._options.uri, self._socket, self._options.binding, changed)
        await self._ask()
        for vm in self._vms:
            if await in_thread("shutdown request", partial(self._requests.left_s, vm)):
                self._down.add(vm)
        await self._start_ended()
        self._change.clear()  # what is found at the start has not changed
        self._looking = asyncio.create_task(self._look(), name="look at domains")

    async def changed(self) -> None:
        """Wait until a domain came, went, ended, was started, or got another label."""
        await self._change.wait()
        self._change.clear()

    async def close(self, *, stop_vms: bool) -> None:  # noqa: ARG002 - the domains are their owner's: they are never stopped with us
        """Stop watching."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        if self._connection is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await in_thread("close libvirt", self._connection.close)

    async def _look(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._event.wait()
            await asyncio.sleep(_SETTLE_S)
            self._event.clear()
            await self._ask()
            await self._start_ended()
            await self._late.undo()

    async def _ask(self) -> None:
        """Ask for the domains; one question at a time, however long the daemon takes."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask_once())
        await asyncio.wait([self._asking], timeout=_ASK_S)
        if not self._asking.done():
            self._failed(f"libvirt at {self._socket} does not answer within {_ASK_S:g} s")

    async def _ask_once(self) -> None:
        connection = self._connected()

        def ask() -> tuple[
            str, list[FoundDomain], dict[str, LibvirtPlan], tuple[LibvirtVm, ...], dict[str, str]
        ]:
            version = self._version or connection.version()
            domains = connection.domains()
            vms, passed = vms_of(domains, self._options.domains)
            numbers = {domain.uuid: domain.number for domain in domains if domain.number > 0}
            plans = {vm.name: self._known_plan(vm, numbers[vm.uuid]) for vm in vms if vm.uuid in numbers}
            return version, domains, plans, vms, passed

        try:
            version, domains, plans, vms, passed = await in_thread("domains", ask)
        except OSError as error:
            self._version = ""
            self._failed(str(error))
        else:
            self._version = version
            self._take(domains, plans, vms, passed)

    def _known_plan(self, vm: LibvirtVm, number: int) -> LibvirtPlan:
        """In a thread. One that has its process is made once; paths and rights may change with a restart of the domain only."""
        known = self._plans.get(vm.name)
        if known is not None and (known.uuid, known.number) == (vm.uuid, number) and known.pid:
            return known
        return plan_of_domain(vm, number, self._socket, self._options.uri)

    def _failed(self, why: str) -> None:
        if why != self._error:
            _log.warning("libvirt.away", why=why)
            self._error = why
            self._change.set()

    def _take(
        self,
        domains: list[FoundDomain],
        plans: dict[str, LibvirtPlan],
        vms: tuple[LibvirtVm, ...],
        passed: dict[str, str],
    ) -> None:
        members = {vm.name: vm for vm in vms}
        held = {name: vm for name, vm in self._vms.items() if name in self._held and name not in members}
        members |= held
        if self._error or (members, plans, passed) != (self._vms, self._plans, self._passed):
            self._change.set()
        for name in members.keys() - self._vms.keys():
            _log.info("vm.found", vm=name, domain=members[name].domain_name)
        for name in self._vms.keys() - members.keys():
            _log.warning(
                "vm.left",
                vm=name,
                domain=self._vms[name].domain_name,
                hint="it was undefined, or migrated away",
            )
        for domain, why in passed.items():
            if self._passed.get(domain) != why:
                _log.warning("discovery.passed_over", place=domain, why=why)
        self._left = {vm: why for vm, why in self._left.items() if vm in plans}
        self._vms, self._plans, self._passed, self._error = members, plans, passed, ""
        self._found = {domain.uuid: domain for domain in domains}

    def members(self) -> tuple[LibvirtVm, ...]:
        """The VMs that there are now."""
        return tuple(self._vms.values())

    def _connected(self) -> LibvirtConnection:
        if self._connection is None:
            raise RuntimeError("the driver is not open")
        return self._connection

    # -- what there is ------------------------------------------------------------------------------------

    def detail(self) -> str:
        """The daemon, and the domains that cannot be VMs."""
        text = f"libvirt {self._version}, {self._options.uri}" if self._version else "no answer of libvirt"
        passed = "; ".join(f"{domain}: {why}" for domain, why in sorted(self._passed.items()))
        return f"{text}; not a VM: {passed}" if passed else text

    def ping(self) -> str:
        """Names domains that do not run or cannot be VMs, and a daemon that does not answer."""
        down = [
            f"{vm} ({self.health_error(vm)})"
            for vm in self._vms
            if vm not in self._plans and vm not in self._down
        ]
        passed = [f"{domain} cannot be a VM: {why}" for domain, why in sorted(self._passed.items())]
        parts = [f"not running: {', '.join(down)}" if down else "", *passed, self._error]
        return "; ".join(filter(None, parts))

    def health_error(self, vm: str) -> str:
        """Why a domain does not run or cannot be paused, or who has paused it."""
        spec = self._vms.get(vm)
        if spec is None:
            return "there is no such domain any more"
        if spec.label_error:
            return spec.label_error
        return self._left.get(vm, "") or ("" if vm in self._plans else "its domain does not run")

    def capabilities(self, vm: str) -> Capabilities:
        """Freeze and reboot, while the daemon answers and the domain's label can be read."""
        spec = self._vms.get(vm)
        found = self._found.get(spec.uuid) if spec is not None else None
        missing = dict(_MISSING)
        wrong = self._error or (spec.label_error if spec is not None else self.health_error(vm))
        methods: list[Method] = ["live"]
        if wrong:
            missing |= {"freeze": wrong, "reboot": wrong}
        else:
            methods.append("freeze")
            if found is not None and found.persistent:
                methods.append("reboot")
            else:
                missing["reboot"] = "its domain is transient: nothing defines it once it has shut down"
        plan = self._plans.get(vm)
        return Capabilities(
            methods=tuple(methods),
            missing=missing,
            clock="system" if found is not None and found.agent_connected else "none",
            no_digest="its memory is libvirt's, and is not read from outside",
            pause_risk="" if plan is None else _risk(plan),
        )

    def process_of(self, vm: str) -> str:
        """``domain web.1 of libvirt (pid 4711)``."""
        plan, spec = self._plans.get(vm), self._vms.get(vm)
        if plan is None or spec is None:
            return ""
        return f"domain {spec.domain_name} of libvirt{f' (pid {plan.pid})' if plan.pid else ''}"

    async def read_states(self) -> Mapping[str, VmState]:
        """From libvirt, and from QEMU where that does not answer; in a thread."""
        plans = dict(self._plans)
        found = await in_thread("states", lambda: conditions(list(plans.values())))
        states: dict[str, VmState] = dict.fromkeys(self._vms, "stopped")
        for vm, state in found.items():
            if vm in states:
                states[vm] = "unknown" if state is None else _STATES[state]
                if states[vm] == "running":
                    self._left.pop(vm, None)
        return states

    # -- freezing -----------------------------------------------------------------------------------------

    async def prepare(self, vm: str, operation: str, method: Method, binary: str) -> None:  # noqa: ARG002 - the port's
        """Nothing to get ready for a freeze; the VM stays a member from now on."""
        if method in _MISSING:
            raise NotPossible(vm, _MISSING[method])
        if vm in self._vms:
            self._held.add(vm)

    async def release(self, vm: str) -> None:
        """Nothing was prepared."""
        if vm in self._held:
            self._held.discard(vm)
            self._event.set()

    def _plan(self, vm: str) -> LibvirtPlan | None:
        return self._plans.get(vm)

    def resume_plan(self, vm: str) -> LibvirtPlan:
        """Through libvirt, and past it where there is a way."""
        plan = self._plans.get(vm)
        if plan is None:
            raise DriverError(vm, self.health_error(vm) or "its domain does not run")
        return plan

    async def freeze(self, vm: str, by: float) -> None:
        """Have libvirt suspend it, then look until it says that it is paused."""
        plan, spec = self._plans.get(vm), self._vms.get(vm)
        if plan is None or spec is None:
            raise FreezeFailed(vm, "is not running")
        if spec.label_error:
            raise FreezeFailed(vm, spec.label_error)
        self._left.pop(vm, None)
        self._held.add(vm)
        await in_thread_to_its_end(f"freeze {vm}", lambda stop: self._freeze(plan, by, stop))

    def _freeze(self, plan: LibvirtPlan, by: float, stop: threading.Event) -> None:
        vm = plan.vm
        self._late.forget(vm)
        if stop.is_set() or time.monotonic() >= by:
            raise FreezeFailed(vm, "it was too late to freeze it")
        try:
            suspend_domain(plan, by)
        except DomainPausedBefore as error:
            self._left[vm] = f"{_PAUSED_BEFORE}; {error}"
            raise FreezeFailed(vm, self._left[vm]) from error
        except LibvirtSilent as error:
            self._late.expect(vm)
            raise FreezeFailed(vm, f"{error}; if it is paused later it is resumed at once") from error
        except (DomainNotPaused, OSError) as error:
            raise FreezeFailed(vm, str(error)) from error
        while (state := self._state(plan)) != "frozen":
            if state == "gone":
                raise FreezeFailed(vm, "ended while it was being frozen, or was paused by something else")
            if stop.is_set() or time.monotonic() >= by:
                raise FreezeFailed(vm, f"is not paused in time: libvirt says {state}")
            time.sleep(_STEP_S)

    @staticmethod
    def _state(plan: LibvirtPlan) -> Condition:
        try:
            return condition(plan)
        except OSError as error:
            raise FreezeFailed(plan.vm, str(error)) from error

    def why_left(self, vm: str) -> str:
        """Who has paused it."""
        return self._left.get(vm, "")

    async def resume(self, vm: str, timeout_s: float) -> Literal["running", "gone", "left"]:
        """Through libvirt, or past it where there is a way; then it must be seen to run."""
        if vm in self._left:
            return "left"
        result = await self._tries.resume(
            vm, timeout_s, lambda: self._resume(vm, timeout_s), "libvirt has not resumed it"
        )
        return "left" if vm in self._left else result

    def _resume(self, vm: str, timeout_s: float) -> Literal["running", "gone"]:
        plan = self._plans.get(vm)
        if plan is None:
            return "gone"
        until = time.monotonic() + timeout_s
        why = ""
        while True:
            try:
                state = condition(plan)
                if state in ("running", "gone"):
                    break
                resume_vm(plan)
            except OSError as error:
                state, why = "held", str(error)
            if time.monotonic() >= until:
                raise NotRunningYet(vm, why or f"libvirt says {state} after {timeout_s:.2f} s")
            time.sleep(_STEP_S)
        if state == "running":
            return "running"
        with suppress(OSError):
            if theirs := why_not_ours(plan):
                self._left[vm] = theirs
        return "gone"

    # -- shutting down ------------------------------------------------------------------------------------

    async def shut_down(self, vm: str, by: float) -> str:
        """By libvirt, which asks the guest's agent or ACPI; nothing is killed."""
        plan, spec = self._plans.get(vm), self._vms.get(vm)
        if spec is None:
            raise ShutdownFailed(vm, "there is no such domain any more")
        self._down.add(vm)
        if plan is None:
            return "itself"
        try:
            await in_thread("shutdown request", partial(self._requests.note, vm))
            async with asyncio.timeout(max(by - time.monotonic(), 0.01)):
                await in_thread(f"shut down {vm}", partial(self._connected().shut_down, spec.uuid))
        except (OSError, TimeoutError) as error:
            if not await _ended(plan):
                raise ShutdownFailed(
                    vm, f"it could not be asked: {error or 'libvirt does not answer'}"
                ) from error
        while not await _ended(plan):
            if time.monotonic() >= by:
                raise ShutdownFailed(
                    vm, "its guest was asked by libvirt and runs on; it was not killed", asked=True
                )
            await asyncio.sleep(_POLL_S)
        self._plans.pop(vm, None)
        return "libvirt"

    async def start(self, vm: str, down_by: float) -> bool:
        """Start the domain when it has ended; it is up when libvirt says that it runs."""
        was_down = vm in self._down
        plan = self._plans.get(vm)
        if was_down and plan is not None:
            while not await _ended(plan) and time.monotonic() < down_by:  # noqa: ASYNC110 - a process of somebody else's
                await asyncio.sleep(_POLL_S)
        if plan is not None and not await _ended(plan):
            return False  # it is started when it ends: see `_start_ended`
        await self._start(vm)
        return was_down

    async def _start(self, vm: str) -> None:
        spec = self._vms.get(vm)
        if spec is None:
            raise DriverError(vm, "there is no such domain any more")
        try:
            await in_thread(f"start {vm}", partial(self._connected().start, spec.uuid))
        except OSError as error:
            raise DriverError(vm, f"it cannot be started: {error}") from error
        await self._ask()
        if vm not in self._plans:
            raise DriverError(vm, "it was started, and does not run")
        self._down.discard(vm)
        await in_thread("shutdown request", partial(self._requests.forget, vm))
        self._change.set()

    async def _start_ended(self) -> None:
        """VMs that were asked to shut down, did not in time, and have ended since."""
        for vm in list(self._down - self._held):
            if vm in self._vms and vm not in self._plans:
                with suppress(DriverError):
                    await self._start(vm)

    # -- clock --------------------------------------------------------------------------------------------

    async def sync_clock(self, vm: str) -> ClockSet:
        """By the guest agent."""
        return await set_clock(vm, partial(libvirt_agent, vm, self._uuid(vm), self._connected()))

    async def guest_boot_id(self, vm: str) -> str:
        """By the guest agent."""
        return await read_boot_id(vm, partial(libvirt_agent, vm, self._uuid(vm), self._connected()))

    def _uuid(self, vm: str) -> str:
        spec = self._vms.get(vm)
        found = self._found.get(spec.uuid) if spec is not None else None
        if spec is None or found is None or not found.agent_connected:
            raise NotPossible(vm, "no guest agent has opened its port in the guest (org.qemu.guest_agent.0)")
        return spec.uuid


def _risk(plan: LibvirtPlan) -> str:
    if not plan.qmp:
        return _NOTHING_BUT_THE_DAEMON
    return _NOT_PAST_A_HANG if all(path.endswith("/monitor.sock") for path in plan.qmp) else ""


async def _ended(plan: LibvirtPlan) -> bool:
    if plan.pid:
        return not alive(plan.pid, plan.start_ticks)
    try:
        return await in_thread(f"look at {plan.vm}", partial(condition, plan)) == "gone"
    except OSError:
        return False
