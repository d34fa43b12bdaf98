"""The ``libvirt`` driver: the port's verbs over domains.

Domains are found, and noticed by libvirt's events when they come, go or change their labels. A pause and its end go over
connections of the RPC as the pause guard has them, opened ahead; everything else over the binding's connection.
"""

from __future__ import annotations

import asyncio
import shlex
import threading
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from caesura.contract.messages import Method, ProofCode, VmState
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread, in_thread_to_its_end
from caesura_host_updater.drivers.clock_setting import set_clock
from caesura_host_updater.drivers.found_vms import SingleLook, VmsOfOperation, log_members, log_passed
from caesura_host_updater.drivers.guest_agent import read_boot_id
from caesura_host_updater.drivers.libvirt.agent import libvirt_agent
from caesura_host_updater.drivers.libvirt.binding import NoBinding
from caesura_host_updater.drivers.libvirt.connection import LibvirtConnection, existing_socket
from caesura_host_updater.drivers.libvirt.definition import LibvirtOptions, LibvirtVm
from caesura_host_updater.drivers.libvirt.domain_view import DomainView, keep_held, look_at_domains
from caesura_host_updater.drivers.libvirt.guest_memory import (
    UNLISTED,
    GuestMemory,
    memory_digest_of,
    sampled_memory_of,
)
from caesura_host_updater.drivers.libvirt.pausing import (
    End,
    ResumeResult,
    SuspendedBefore,
    SuspendUnanswered,
    pause_domain,
    resume_until,
)
from caesura_host_updater.drivers.libvirt.restarting import DomainRestarter
from caesura_host_updater.drivers.libvirt.resume_paths import is_same_life
from caesura_host_updater.drivers.port import (
    Capabilities,
    ClockSet,
    DriverError,
    FreezeFailed,
    NotPossible,
)
from caesura_host_updater.drivers.remote_pauses import LatePauses, ResumeTries
from caesura_vmcontrol.freezer_control import Condition
from caesura_vmcontrol.libvirt_control import (
    MIGRATES,
    DomainLook,
    is_settled,
    look_at,
)
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.procfs import alive
from caesura_vmcontrol.resume_plans import ResumePlan

_LOOK_S = 5.0  # s: between two looks without an event
_ASK_S = 5.0  # s: for a list of the domains; it takes milliseconds
_SETTLE_S = 0.02  # s: events of one change come together
_ENDING_S = 3.0  # s: from the end of a process until libvirt tells why; some milliseconds are usual, it cleans up first
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
    "only libvirt's daemon can resume it: while that hangs or is away the VM stays paused, beyond its budget if need be. Give"
    " host updater and pause guard the drop-ins `*-root.conf` of deploy/systemd/libvirt, or the domain a QMP socket of its own that"
    " both may use: docs/drivers/libvirt.md"
)
_NOT_PAST_A_HANG = (
    "a daemon of libvirt's that hangs (not: one that is dead) keeps it paused, beyond its budget if need be: a QMP socket of the"
    " domain's own helps (docs/drivers/libvirt.md)"
)
_STARTED_AGAIN = "it was started again in its pause: what its memory held is lost"
_MIGRATED = "it was migrated to another host in its pause, and is paused there as it was here: there, `virsh -c {} resume {}`"
_MIGRATING = f"{MIGRATES}, where it is paused as it was here: there, `virsh -c {{}} resume {{}}`; if the migration fails, it is resumed here"

_log = get_logger("caesura.driver")


class LibvirtDriver:
    """See the module.

    Args:
        options: the host file's table ``[libvirt]``.
        sockets: where the daemon may listen; the first that exists is used, and looked for again while none answers.
        state_dir: where shutdown requests are noted.
        max_digest_bytes: memory above this is not digested whole.
    """

    name = "libvirt"

    def __init__(
        self, options: LibvirtOptions, sockets: tuple[str, ...], state_dir: Path, max_digest_bytes: int = 0
    ) -> None:
        self._options = options
        self._sockets = sockets
        self._max_digest_bytes = max_digest_bytes
        self._folder = state_dir / "vms"
        self._connection: LibvirtConnection | None = None
        self._socket = ""
        self.vms: dict[str, LibvirtVm] = {}
        self.plans: dict[str, LibvirtPlan] = {}
        """Domains that run, paused or not."""
        self._seen = DomainView()
        self._held: VmsOfOperation[LibvirtPlan] = VmsOfOperation(is_same_life)
        self._left: dict[str, str] = {}
        self._untouched: set[str] = set()
        """VMs that were to be paused, and to which nothing was done: if one is paused now, somebody else paused it."""
        self._late = LatePauses(self._plan_now, "libvirt", self._folder, is_same_life, is_settled)
        self._tries: ResumeTries[ResumeResult] = ResumeTries()
        self._error = "libvirt was not asked yet"
        self._domains = SingleLook(self._ask, _ASK_S, self._silent)
        self._event = asyncio.Event()
        self._change = asyncio.Event()
        self._restarter = DomainRestarter(
            self, self._connected, self._domains.take, self._folder, self._change.set
        )
        self._looking: asyncio.Task[None] | None = None

    # -- life ---------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find the domains. A daemon that is away is asked again; a binding that is missing is an error.

        Raises:
            NoBinding: there is no binding that this Python can load.
        """
        await in_thread("state folder", lambda: self._folder.mkdir(parents=True, exist_ok=True, mode=0o700))
        await self._choose_socket()
        await in_thread("binding", self._connected().load)
        await self._late.open(LibvirtPlan)
        await self._domains.take()
        await self._restarter.open()
        self._change.clear()  # what is found at the start has not changed
        self._looking = asyncio.create_task(self._look(), name="look at domains")

    async def changed(self) -> None:
        """Wait until a domain came, went, ended, was started, was paused or resumed, or got another label."""
        await self._change.wait()
        self._change.clear()

    async def close(self, *, stop_vms: bool) -> None:  # noqa: ARG002 - the domains are their owner's: they are never stopped with us
        """Stop watching."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._restarter.close()
        await self._late.close()
        await self._disconnect()

    async def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await in_thread("close libvirt", self._connection.close)

    async def _choose_socket(self) -> None:
        socket = await in_thread("socket", partial(existing_socket, self._sockets))
        if socket == self._socket:
            return
        loop = asyncio.get_running_loop()

        def changed() -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(self._event.set)

        await self._disconnect()
        self._socket = socket
        self._connection = LibvirtConnection(self._options.uri, socket, self._options.binding, changed)

    async def _look(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._event.wait()
            await asyncio.sleep(_SETTLE_S)
            told = self._event.is_set()
            self._event.clear()
            # A look may take long, and who was paused late is not to wait for it.
            looks = asyncio.gather(self._late.undo(), self._domains.take())
            try:
                await looks
                # Not every event changes what the view holds: that a domain is paused is read when it is published.
                if told:
                    self._change.set()
                self._restarter.start_ended(self._held)
            except Exception as error:  # noqa: BLE001 - whatever it is, the domains are looked at again
                self._failed(f"the domains cannot be looked at: {error!r}")

    def _silent(self) -> None:
        self._failed(f"libvirt at {self._socket} does not answer within {_ASK_S:g} s")

    async def _ask(self) -> None:
        if self._error:  # another daemon may have taken its place
            await self._choose_socket()
        connection = self._connected()
        ask = partial(look_at_domains, connection, self._options, self._socket, self._seen)
        try:
            view = await in_thread("domains", ask)
        except (OSError, NoBinding) as error:
            self._seen = replace(self._seen, version="")  # it may be another one when it answers again
            self._failed(str(error))
        else:
            self._take(view)

    def _failed(self, why: str) -> None:
        if why != self._error:
            _log.warning("libvirt.away", why=why)
            self._error = why
            self._change.set()

    def _take(self, view: DomainView) -> None:
        view = keep_held(view, self._seen, self._held)
        if self._error or view != self._seen:
            self._change.set()
        log_members(_called(self.vms), _called(view.vms), "it was undefined, or migrated away")
        log_passed(self._seen.passed, view.passed)
        self._left = {vm: why for vm, why in self._left.items() if vm in view.plans or vm in self._held}
        self._seen, self.vms, self.plans, self._error = view, view.vms, view.plans, ""

    def adopt(self, plans: Iterable[ResumePlan]) -> Collection[str]:
        """Those whose label was edited in the pause keep their names; a daemon that is away, or has lost them, does not name them at all."""
        specs = {vm.uuid: vm for vm in self.vms.values()}
        listed = {plan.uuid: plan for plan in self.plans.values()}
        adopted = []
        for plan in plans:
            if not isinstance(plan, LibvirtPlan):
                continue
            now = listed.get(plan.uuid)
            if self._is_lost(plan) if now is None else _is_renamed(plan, now):
                vm = specs.get(plan.uuid) or LibvirtVm(uuid=plan.uuid, domain_name=plan.vm, name=plan.vm)
                self._list(msgspec.structs.replace(vm, name=plan.vm), now or plan)
                self._held.pausing(plan.vm, plan)
                adopted.append(plan.vm)
        return adopted

    def _is_lost(self, plan: LibvirtPlan) -> bool:
        return alive(plan.pid, plan.start_ticks) if plan.pid else bool(self._error)

    def _list(self, vm: LibvirtVm, plan: LibvirtPlan) -> None:
        """In place of what has its UUID or its name until now."""
        self.vms = {name: each for name, each in self.vms.items() if each.uuid != vm.uuid} | {vm.name: vm}
        plans = {name: each for name, each in self.plans.items() if each.uuid != vm.uuid}
        self.plans = plans | {vm.name: replace(plan, vm=vm.name)}
        memories = {**self._seen.memories, vm.name: UNLISTED}
        self._seen = replace(self._seen, vms=self.vms, plans=self.plans, memories=memories)

    def members(self) -> tuple[LibvirtVm, ...]:
        """The VMs that there are now."""
        return tuple(self.vms.values())

    def _connected(self) -> LibvirtConnection:
        if self._connection is None:
            raise RuntimeError("the driver is not open")
        return self._connection

    # -- what there is ------------------------------------------------------------------------------------

    def detail(self) -> str:
        """The daemon, and the domains that cannot be VMs."""
        text = (
            f"libvirt {self._seen.version}, {self._options.uri}"
            if self._seen.version
            else "no answer of libvirt"
        )
        passed = "; ".join(f"{domain}: {why}" for domain, why in sorted(self._seen.passed.items()))
        return f"{text}; not a VM: {passed}" if passed else text

    def ping(self) -> str:
        """Names domains that do not run, cannot be started again or cannot be VMs, and a daemon that does not answer."""
        down = [
            f"{vm} ({self.health_error(vm)})"
            for vm in self.vms
            if vm not in self.plans and vm not in self._restarter.down
        ]
        passed = [f"{domain} cannot be a VM: {why}" for domain, why in sorted(self._seen.passed.items())]
        late = [
            f"{vm} ended, and is to be started again: {why}" for vm, why in self._restarter.errors.items()
        ]
        parts = [f"not running: {', '.join(down)}" if down else "", *late, *passed, self._error]
        return "; ".join(filter(None, parts))

    def health_error(self, vm: str) -> str:
        """Why a domain does not run or cannot be paused, or who has paused it."""
        spec = self.vms.get(vm)
        if spec is None:
            return "there is no such domain any more"
        if spec.label_error:
            return spec.label_error
        if vm in self._left:
            return self._left[vm]
        if self._held.was_started_again(vm, self.plans.get(vm)):
            return _STARTED_AGAIN
        return "" if vm in self.plans else "its domain does not run"

    def capabilities(self, vm: str) -> Capabilities:
        """Freeze and reboot, while the daemon answers and the domain's label can be read."""
        spec = self.vms.get(vm)
        found = self._seen.found.get(spec.uuid) if spec is not None else None
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
        plan = self.plans.get(vm)
        return Capabilities(
            methods=tuple(methods),
            missing=missing,
            clock="system" if found is not None and found.agent_connected else "none",
            digests=self._digests(vm),
            no_digest=self._seen.memories[vm].error
            if vm in self._seen.memories
            else "its domain does not run",
            pause_risk="" if plan is None else _risk(plan),
        )

    def _digests(self, vm: str) -> tuple[ProofCode, ...]:
        memory = self._seen.memories.get(vm)
        if memory is None or memory.error:
            return ()
        if memory.size_bytes > self._max_digest_bytes:
            return ("sampled_digest_equal",)
        return ("digest_equal", "sampled_digest_equal")

    def process_of(self, vm: str) -> str:
        """``domain web.1 of libvirt (pid 4711)``."""
        plan, spec = self.plans.get(vm), self.vms.get(vm)
        if plan is None or spec is None:
            return ""
        return f"domain {spec.domain_name} of libvirt{f' (pid {plan.pid})' if plan.pid else ''}"

    async def read_states(self) -> Mapping[str, VmState]:
        """From libvirt, and from QEMU where that does not answer; in a thread."""
        plans = dict(self.plans)
        found = await in_thread("states", lambda: look_at(list(plans.values())))
        states: dict[str, VmState] = dict.fromkeys(self.vms, "stopped")
        for vm, look in found.items():
            if vm in states and not self._held.was_started_again(vm, plans[vm]):
                states[vm] = _state_of(look)
                if states[vm] == "running":
                    self._left.pop(vm, None)
        for vm in self._held:
            if states.get(vm) == "stopped" and await self._was_migrated(vm):
                states[vm] = "unknown"
        return states

    async def _was_migrated(self, vm: str) -> bool:
        """Whether a domain of an operation that is over here was migrated to another host."""
        if self._held.was_started_again(vm, self.plans.get(vm)):
            return False
        ask = partial(self._connected().was_migrated, self.vms[vm].uuid, _ENDING_S)
        return await in_thread(f"end of {vm}", ask)

    # -- freezing -----------------------------------------------------------------------------------------

    async def prepare(self, vm: str, operation: str, method: Method, binary: str) -> None:  # noqa: ARG002 - the port's
        """Nothing to get ready for a freeze; the VM stays a member from now on."""
        if method in _MISSING:
            raise NotPossible(vm, _MISSING[method])
        if vm in self.vms:
            self._held.add(vm)

    async def release(self, vm: str) -> None:
        """Nothing was prepared."""
        self._untouched.discard(vm)
        if self._held.remove(vm):
            self._event.set()

    def _plan_now(self, noted: LibvirtPlan) -> LibvirtPlan | None:
        """A label that was edited may have given it another name."""
        return next((plan for plan in self.plans.values() if plan.uuid == noted.uuid), None)

    def resume_plan(self, vm: str) -> LibvirtPlan:
        """Through libvirt, and past it where there is a way."""
        plan = self.plans.get(vm)
        if plan is None or (plan.pid and not alive(plan.pid, plan.start_ticks)):
            raise DriverError(vm, self.health_error(vm) or "its domain does not run")
        return plan

    async def freeze(self, vm: str, by: float) -> None:
        """Have libvirt suspend it, then look until it says that it is paused."""
        plan, spec = self.plans.get(vm), self.vms.get(vm)
        if plan is None or spec is None:
            untouched = vm not in self._late
            if untouched:
                self._untouched.add(vm)
            raise FreezeFailed(vm, "is not running", untouched=untouched)
        self._left.pop(vm, None)
        self._untouched.add(vm)
        self._held.pausing(vm, plan)
        await in_thread_to_its_end(
            f"freeze {vm}", lambda stop: self._freeze(plan, spec.label_error, by, stop)
        )

    def _freeze(self, plan: LibvirtPlan, label_error: str, by: float, stop: threading.Event) -> None:
        vm = plan.vm
        was_expected = self._late.forget(plan)
        try:
            self._pause(plan, label_error, by, stop)
        except FreezeFailed as error:
            if not was_expected or not error.untouched:
                raise
            # Our earlier pause, which was not answered, may be what was found, or may come yet.
            self._untouched.discard(vm)
            self._left.pop(vm, None)
            self._late.expect(plan)
            raise FreezeFailed(vm, f"{error.why}; an earlier pause of it was not answered") from error

    def _pause(self, plan: LibvirtPlan, label_error: str, by: float, stop: threading.Event) -> None:
        if label_error:
            raise FreezeFailed(plan.vm, label_error, untouched=True)
        untouched = False
        try:
            pause_domain(plan, by, stop)
        except FreezeFailed as error:
            untouched = error.untouched
            if isinstance(error, SuspendedBefore):
                self._left[plan.vm] = error.why
            if isinstance(error, SuspendUnanswered):
                self._late.expect(plan)
            raise
        finally:
            if not untouched:
                self._untouched.discard(plan.vm)

    def why_left(self, vm: str) -> str:
        """Who has paused it."""
        return self._left.get(vm, "")

    async def resume(self, vm: str, timeout_s: float) -> Literal["running", "gone", "left"]:
        """Through libvirt, or past it where there is a way; then it must be seen to run."""
        if vm in self._left:
            return "left"
        if self._held.was_started_again(vm, self.plans.get(vm)):
            return "gone"
        plan = self.plans.get(vm)
        end: End = "gone"
        why = ""
        if plan is not None:
            ours = vm not in self._untouched
            work = partial(resume_until, plan, timeout_s, ours=ours)
            result = await self._tries.resume(vm, timeout_s, work, "libvirt has not resumed it")
            end, why = result.end, result.why_left
            if result.was_paused and end == "running":
                self._late.forget_resumed(vm)
        if end == "gone" and vm in self._held and await self._was_migrated(vm):
            end, why = "left", _MIGRATED.format(self._options.uri, self._quoted(vm))
        elif end == "left" and why == MIGRATES and plan is not None and vm not in self._untouched:
            why = _MIGRATING.format(self._options.uri, self._quoted(vm))
            self._late.expect(plan)
        if end == "left":
            self._left[vm] = why
        return end

    def _quoted(self, vm: str) -> str:
        return shlex.quote(self.vms[vm].domain_name)

    # -- shutting down ------------------------------------------------------------------------------------

    async def shut_down(self, vm: str, by: float) -> str:
        """By libvirt, which asks the guest's agent or ACPI; nothing is killed."""
        return await self._restarter.shut_down(vm, by)

    async def start(self, vm: str, down_by: float) -> bool:
        """Start the domain when it has ended; it is up when libvirt says that it runs."""
        return await self._restarter.start(vm, down_by)

    # -- memory -------------------------------------------------------------------------------------------

    async def memory_digest(self, vm: str, stop_at: float) -> str | None:
        """BLAKE2b over its memory, where that is a file that this user may read."""
        plan, memory = self._readable(vm)
        if memory.size_bytes > self._max_digest_bytes:
            raise NotPossible(
                vm,
                f"its memory of {memory.size_bytes} bytes is above the limit for digests of all memory, {self._max_digest_bytes} bytes",
            )
        try:
            return await in_thread(f"digest of {vm}", partial(memory_digest_of, plan, stop_at))
        except (OSError, ValueError) as error:
            raise DriverError(vm, f"its memory cannot be read: {error}") from error

    async def sampled_digest(self, vm: str, seed: str) -> str:
        """BLAKE2b over pages of it."""
        plan, _ = self._readable(vm)
        try:
            return await in_thread(f"sample of {vm}", partial(sampled_memory_of, plan, seed))
        except (OSError, ValueError) as error:
            raise DriverError(vm, f"its memory cannot be read: {error}") from error

    def _readable(self, vm: str) -> tuple[LibvirtPlan, GuestMemory]:
        plan, memory = self.plans.get(vm), self._seen.memories.get(vm)
        if plan is None or memory is None:
            raise NotPossible(vm, "its domain does not run")
        if memory.error:
            raise NotPossible(vm, memory.error)
        return plan, memory

    # -- clock --------------------------------------------------------------------------------------------

    async def sync_clock(self, vm: str) -> ClockSet:
        """By the guest agent."""
        return await set_clock(vm, partial(libvirt_agent, vm, self._uuid(vm), self._connected()))

    async def guest_boot_id(self, vm: str) -> str:
        """By the guest agent."""
        return await read_boot_id(vm, partial(libvirt_agent, vm, self._uuid(vm), self._connected()))

    def _uuid(self, vm: str) -> str:
        spec = self.vms.get(vm)
        found = self._seen.found.get(spec.uuid) if spec is not None else None
        if spec is None or found is None or not found.agent_connected:
            raise NotPossible(vm, "no guest agent has opened its port in the guest (org.qemu.guest_agent.0)")
        return spec.uuid


def _state_of(look: DomainLook | None) -> VmState:
    if look is None or look.migrated:
        return "unknown"  # elsewhere it may run or be paused, which nobody here can know; `resume` names it
    return "paused" if look.not_ours else _STATES[look.condition]


def _called(vms: Mapping[str, LibvirtVm]) -> dict[str, str]:
    return {name: vm.domain_name for name, vm in vms.items()}


def _is_renamed(paused: LibvirtPlan, now: LibvirtPlan) -> bool:
    return paused.vm != now.vm and is_same_life(paused, now)


def _risk(plan: LibvirtPlan) -> str:
    if not plan.qmp:
        return _NOTHING_BUT_THE_DAEMON
    return _NOT_PAST_A_HANG if all(path.endswith("/monitor.sock") for path in plan.qmp) else ""
