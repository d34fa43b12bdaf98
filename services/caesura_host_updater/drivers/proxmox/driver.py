"""The ``proxmox`` driver: the port's verbs over the VMs of a Proxmox VE node.

VMs are found by their configurations, which are read twice a second: no event tells of a change that another node wrote. What QEMU
has of a guest is asked, never listened for: the events would need a connection that keeps Proxmox's own tools out.
"""

from __future__ import annotations

import asyncio
import operator
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Literal, TypeVar

import msgspec

from caesura.contract.messages import Method, VmState
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread, in_thread_to_its_end
from caesura_host_updater.drivers.clock_setting import set_clock
from caesura_host_updater.drivers.found_vms import SingleLook, VmsOfOperation, log_members, log_passed
from caesura_host_updater.drivers.guest_agent import guest_agent, read_boot_id
from caesura_host_updater.drivers.port import (
    Capabilities,
    ClockSet,
    DriverError,
    FreezeFailed,
    NotPossible,
    NotRunningYet,
)
from caesura_host_updater.drivers.proxmox.definition import ProxmoxOptions, ProxmoxVm, lock_text, sockets_of
from caesura_host_updater.drivers.proxmox.monitor import (
    GuestNotStopped,
    GuestPausedBefore,
    GuestState,
    ask_state,
    stop_guest,
)
from caesura_host_updater.drivers.proxmox.node_files import NodeView, look_at_node, read_now
from caesura_vmcontrol.process_control import is_held
from caesura_vmcontrol.procfs import alive
from caesura_vmcontrol.qemu_plans import QemuPlan
from caesura_vmcontrol.qmp_commands import AWAY, NOT_OURS, OVER, PASSING, RUNNING, ProcessGone
from caesura_vmcontrol.vm_control import resume_vm

_LOOK_S = 0.5  # s: between two looks at the node's files
_NODE_S = 5.0  # s: for one look; it takes milliseconds
_STATE_S = 0.5  # s: for QEMU's answer, behind other clients; it takes milliseconds
_KNOWN_S = 1.0  # s: how long an answer of a VM counts that is in no operation
_BUSY_S = 5.0
"""s: how long one counts while QEMU is silent. Before a VM is paused it is asked again, and the freeze's time is waited for it."""
_CONFIG_S = 0.5  # s: for one configuration; below a millisecond is usual
_STEP_S = 0.01  # s: between two looks at a VM that is to run
_WORKERS = 16
_MIGRATION = "migrate"
"""The lock of a migration."""
_REMEDY = "resume it with `qm resume {}`"
_MISSING: Mapping[str, str] = {
    "swap": "its QEMU process belongs to Proxmox, whose tools would lose it if another one took its guest over",
    "replace": "its QEMU process belongs to Proxmox: it cannot be ended and started again under its guest",
    "kexec": "its QEMU process belongs to Proxmox: it cannot be started again by the next kernel",
    "reboot": "Proxmox shuts VMs down and starts them (`qm`, high availability); nothing else here starts one",
}
_ONE_SOCKET = (
    "it has one QMP socket, which serves one client at a time: one that comes in the pause and stays keeps it paused, beyond its"
    " budget if need be (docs/drivers/proxmox.md)"
)
_SILENT = "its QEMU does not answer at its QMP socket, or may not be asked by this user: see `caesura doctor`"

_log = get_logger("caesura.driver")

T = TypeVar("T")
_End = Literal["running", "gone", "left"]


class _FrozenBefore(FreezeFailed):
    """Somebody else had paused it."""


class ProxmoxDriver:
    """See the module.

    Args:
        options: the host file's table ``[proxmox]``.
    """

    name = "proxmox"

    def __init__(self, options: ProxmoxOptions) -> None:
        self._options = options
        self._vms: dict[str, ProxmoxVm] = {}
        self._plans: dict[str, QemuPlan] = {}
        """VMs that run, paused or not."""
        self._passed: dict[str, str] = {}
        self._here: frozenset[str] = frozenset()
        """VMs that have a configuration on this node."""
        self._held: VmsOfOperation[QemuPlan] = VmsOfOperation(operator.eq)
        self._left: dict[str, str] = {}
        self._untouched: set[str] = set()
        """VMs that were to be paused, and to which nothing was done: if one is paused now, somebody else paused it."""
        self._ran: set[str] = set()
        """VMs that were seen to run since the driver was opened."""
        self._guests: dict[str, tuple[QemuPlan, float, GuestState | None]] = {}
        """QEMU's last answer for each VM, and when it came; None: there was none."""
        self._error = "the node's files were not read yet"
        silence = f"{options.config_dir} does not answer within {_NODE_S:g} s"
        self._node = SingleLook(self._read_files, _NODE_S, lambda: self._failed(silence))
        self._change = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(max_workers=_WORKERS, thread_name_prefix="proxmox")

    # -- life ---------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find the VMs. Files that cannot be read are tried again."""
        await self._node.take()
        await self._ask(self._plans)
        self._change.clear()  # what is found at the start has not changed
        self._looking = asyncio.create_task(self._look(), name="look at the Proxmox node")

    async def changed(self) -> None:
        """Wait until a VM came, went, ended, was started, or has another configuration."""
        await self._change.wait()
        self._change.clear()

    async def close(self, *, stop_vms: bool) -> None:  # noqa: ARG002 - the VMs are Proxmox's: they are never stopped with us
        """Stop watching."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._node.take()

    async def _read_files(self) -> None:
        known = dict(self._plans)
        try:
            view = await in_thread("Proxmox's files", lambda: look_at_node(self._options, known.get))
        except OSError as error:
            self._failed(f"{self._options.config_dir} cannot be read: {error.strerror or error}")
        else:
            self._take(view)

    def _failed(self, why: str) -> None:
        if why != self._error:
            _log.warning("proxmox.files_silent", why=why)
            self._error = why
            self._change.set()
        self._drop_ended()

    def _drop_ended(self) -> None:
        """Processes are seen to end without any file of Proxmox's."""
        ended = [vm for vm, plan in self._plans.items() if not alive(plan.vmm.pid, plan.vmm.start_ticks)]
        for vm in ended:
            del self._plans[vm]
            self._change.set()

    def _take(self, view: NodeView) -> None:
        members, plans = dict(view.vms), dict(view.plans)
        for name in self._vms.keys() & ({*self._held} | view.unread.keys()) - members.keys():
            members[name] = msgspec.structs.replace(self._vms[name], read_error=view.unread.get(name, ""))
            plan = self._plans.get(name)
            if plan is not None and alive(plan.vmm.pid, plan.vmm.start_ticks):
                plans[name] = plan
        if self._error or (members, plans, view.passed) != (self._vms, self._plans, self._passed):
            self._change.set()
        self._log_changes(members, view)
        self._left = {vm: why for vm, why in self._left.items() if vm in plans or vm in self._held}
        self._ran = (self._ran | plans.keys()) & members.keys()
        self._vms, self._plans, self._passed, self._error = members, plans, view.passed, ""
        self._here = frozenset(view.vms) | view.unread.keys()

    def _log_changes(self, members: Mapping[str, ProxmoxVm], view: NodeView) -> None:
        log_members(_called(self._vms), _called(members), "it was destroyed, or migrated to another node")
        log_passed(self._passed, view.passed)
        for name in members.keys() & set(self._held):
            if members[name].lock and members[name].lock != self._vms[name].lock:
                _log.warning("vm.locked_in_pause", vm=name, lock=members[name].lock)

    def members(self) -> tuple[ProxmoxVm, ...]:
        """The VMs that there are now."""
        return tuple(self._vms.values())

    # -- what there is ------------------------------------------------------------------------------------

    def detail(self) -> str:
        """The VMs with their names in Proxmox, and the files that cannot be read."""
        named = [f"{vm.name} is {vm.title}" for vm in self._vms.values() if vm.title]
        passed = [f"cannot be read: {place}: {why}" for place, why in sorted(self._passed.items())]
        return "; ".join((f"Proxmox VE, {len(self._vms)} VMs", *passed, *named))

    def ping(self) -> str:
        """Names VMs that ran and do not run any more, QEMUs that do not answer, and files that cannot be read."""
        down = [
            f"{vm} ({self.health_error(vm)})" for vm in self._vms if vm in self._ran and not self._is_up(vm)
        ]
        passed = [f"{place} cannot be read: {why}" for place, why in sorted(self._passed.items())]
        return "; ".join(
            filter(None, (f"not running: {', '.join(down)}" if down else "", *passed, self._error))
        )

    def _is_up(self, vm: str) -> bool:
        return vm in self._plans and self._state_of(vm) not in ("stopped", "unknown")

    def health_error(self, vm: str) -> str:
        """Why a VM does not run or cannot be paused, or who has paused it."""
        spec = self._vms.get(vm)
        if spec is None:
            return "this node has no such VM any more"
        if vm in self._left:
            return self._left[vm]
        guest = self._guest(vm)
        why = ""
        if vm not in self._plans:
            why = "it does not run" if vm in self._here else _gone_text(spec)
        elif self._is_another(vm):
            why = "it ended in its pause and was started again"
        elif guest is None:
            why = self._silence(vm)
        else:
            why = NOT_OURS.get(guest.status, f"QEMU says {guest.status}" if guest.status in OVER else "")
        return "; ".join(filter(None, (spec.not_now, why)))

    def capabilities(self, vm: str) -> Capabilities:
        """Freeze, unless Proxmox has it locked, its tags are wrong, or its files cannot be read."""
        spec, guest = self._vms.get(vm), self._guest(vm)
        missing = dict(_MISSING)
        methods: list[Method] = ["live"]
        if wrong := self._error or (
            spec.not_now or self._silence(vm) if spec is not None else self.health_error(vm)
        ):
            missing["freeze"] = wrong
        else:
            methods.append("freeze")
        reachable = spec is not None and spec.guest_agent and guest is not None and guest.agent_open
        return Capabilities(
            methods=tuple(methods),
            missing=missing,
            clock="system" if reachable else "none",
            no_digest="its memory is its QEMU's own, and is not read from outside",
            pause_risk=_ONE_SOCKET,
        )

    def process_of(self, vm: str) -> str:
        """``VM 100 (web-1), pid 4711``, and a lock that Proxmox has put on it."""
        plan, spec = self._plans.get(vm), self._vms.get(vm)
        if plan is None or spec is None:
            return ""
        lock = f", locked by Proxmox ({spec.lock})" if spec.lock else ""
        if spec.lock == _MIGRATION:
            lock += f"; Proxmox leaves it paused on its new node if it was paused when that began: there, {_REMEDY.format(spec.vmid)}"
        return f"{spec.called}, pid {plan.vmm.pid}{lock}"

    # -- states -------------------------------------------------------------------------------------------

    async def read_states(self) -> Mapping[str, VmState]:
        """From the kernel and QEMU. One that is in no operation is asked once a second."""
        self._drop_ended()
        await self._ask(vm for vm in self._plans if vm in self._held or self._is_old(vm))
        await self._look_for_ended()
        return {vm: self._state_of(vm) for vm in self._vms}

    async def _look_for_ended(self) -> None:
        """Whether a VM of an operation that has ended was migrated away: its configuration went first, maybe since the last look."""
        for vm in self._here & {*self._held} & (self._vms.keys() - self._plans.keys()):
            with suppress(OSError):
                read = partial(read_now, self._options, self._vms[vm].vmid, _CONFIG_S)
                if await self._in_pool(read) is None:
                    self._here -= {vm}

    def _is_old(self, vm: str) -> bool:
        plan, at, _ = self._guests.get(vm, (None, 0.0, None))
        return plan != self._plans[vm] or time.monotonic() - at > _KNOWN_S

    async def _ask(self, vms: Iterable[str]) -> None:
        plans = {vm: self._plans[vm] for vm in vms}
        began = time.monotonic()
        found = await asyncio.gather(
            *(
                self._in_pool(partial(self._asked, plan, agent=self._vms[vm].guest_agent))
                for vm, plan in plans.items()
            )
        )
        for (vm, plan), guest in zip(plans.items(), found, strict=True):
            before = self._guests.get(vm)
            if before is not None and before[1] > began:
                continue  # it was resumed since: this answer may be from before
            if guest is None and before is not None and vm not in self._held and _counts(before, plan):
                continue
            self._guests[vm] = (plan, began, guest)
            if before is None or before[2] != guest:
                self._change.set()
            if guest is not None and guest.status in RUNNING:
                self._left.pop(vm, None)
        self._guests = {vm: seen for vm, seen in self._guests.items() if vm in self._plans}

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @staticmethod
    def _asked(plan: QemuPlan, *, agent: bool) -> GuestState | None:
        if is_held(plan.vmm.pid):
            return GuestState(
                "paused"
            )  # its process is stopped: it would not answer, and its guest does not run
        try:
            return ask_state(plan, time.monotonic() + _STATE_S, agent=agent)
        except OSError:
            return None

    def _guest(self, vm: str) -> GuestState | None:
        plan, _, guest = self._guests.get(vm, (None, 0.0, None))
        return guest if plan is not None and plan == self._plans.get(vm) else None

    def _silence(self, vm: str) -> str:
        """That QEMU was asked and did not answer; empty: it did, or was not asked yet."""
        plan, _, guest = self._guests.get(vm, (None, 0.0, None))
        return _SILENT if plan is not None and plan == self._plans.get(vm) and guest is None else ""

    def _state_of(self, vm: str) -> VmState:
        if vm not in self._plans:
            # Elsewhere it may run or be paused, which nobody here can know; `resume` names it.
            return "unknown" if vm in self._held and vm not in self._here else "stopped"
        if self._is_another(vm):
            return "stopped"
        guest = self._guest(vm)
        if guest is None:
            return "unknown"
        if guest.status in RUNNING:
            return "running"
        if guest.status in OVER or (guest.status in AWAY and vm not in self._held):
            return "stopped"
        return "paused"

    def _is_another(self, vm: str) -> bool:
        return self._held.was_started_again(vm, self._plans.get(vm))

    # -- freezing -----------------------------------------------------------------------------------------

    async def prepare(self, vm: str, operation: str, method: Method, binary: str) -> None:  # noqa: ARG002 - the port's
        """Nothing to get ready for a freeze."""
        if method in _MISSING:
            raise NotPossible(vm, _MISSING[method])

    async def release(self, vm: str) -> None:
        """The VM is a member as long as this node has its configuration."""
        if self._held.remove(vm):
            self._untouched.discard(vm)
            self._left.pop(vm, None)
            self._change.set()

    def resume_plan(self, vm: str) -> QemuPlan:
        """By its QMP socket."""
        plan = self._plans.get(vm)
        if plan is None:
            raise DriverError(vm, self.health_error(vm) or "it does not run")
        return plan

    async def freeze(self, vm: str, by: float) -> None:
        """Have QEMU stop it, unless Proxmox has locked it: looked at before and after."""
        plan, spec = self._plans.get(vm), self._vms.get(vm)
        if plan is None or spec is None:
            self._untouched.add(vm)
            raise FreezeFailed(vm, "is not running", untouched=True)
        self._left.pop(vm, None)
        self._untouched.add(vm)
        self._held.pausing(vm, plan)
        try:
            await in_thread_to_its_end(f"freeze {vm}", lambda stop: self._freeze(plan, spec.vmid, by, stop))
        except _FrozenBefore as error:
            self._left[vm] = error.why
            raise

    def _freeze(self, plan: QemuPlan, vmid: int, by: float, stop: threading.Event) -> None:
        vm = plan.vm
        if why := self._not_now(vmid, by):
            raise FreezeFailed(vm, why, untouched=True)
        try:
            stop_guest(plan, by, stop.is_set)
        except GuestPausedBefore as error:
            raise _FrozenBefore(vm, f"{error}: {_REMEDY.format(vmid)}", untouched=True) from error
        except GuestNotStopped as error:
            raise FreezeFailed(vm, str(error), untouched=True) from error
        except ProcessGone as error:
            raise FreezeFailed(vm, "ended while it was being frozen") from error
        except OSError as error:
            self._untouched.discard(vm)
            raise FreezeFailed(vm, str(error)) from error
        self._untouched.discard(vm)
        # A task that locked it between the two looks may have found it running: it shall not find it paused.
        if why := self._not_now(vmid, by):
            with suppress(OSError):  # the operation resumes it until it runs
                resume_vm(plan)
            raise FreezeFailed(vm, f"{why}; that was in the moment of its pause, which was undone")

    def _not_now(self, vmid: int, by: float) -> str:
        """Why it may not be paused as its configuration is now; empty: it may."""
        patience_s = min(max(by - time.monotonic(), 0.01), _CONFIG_S)
        try:
            spec = read_now(self._options, vmid, patience_s)
        except OSError as error:
            return f"its configuration cannot be read, so it may be locked: {error.strerror or error}"
        return "this node has no configuration of it any more" if spec is None else spec.not_now

    def _as_it_is(self, spec: ProxmoxVm) -> ProxmoxVm:
        """With a lock that came since the last look."""
        with suppress(OSError):
            return read_now(self._options, spec.vmid, _CONFIG_S) or spec
        return spec

    def why_left(self, vm: str) -> str:
        """Who has it, or has paused it."""
        return self._left.get(vm, "")

    async def resume(self, vm: str, timeout_s: float) -> _End:
        """By QMP, if nobody else has brought it where it is; then QEMU must say that it runs."""
        if vm in self._left:
            return "left"
        self._drop_ended()
        spec, plan = self._vms.get(vm), self._plans.get(vm)
        if spec is None or plan is None:
            if spec is None or vm in self._here or vm not in self._held:
                return "gone"
            self._left[vm] = _gone_text(spec)
            return "left"
        if self._is_another(vm):
            return "gone"
        until = time.monotonic() + timeout_s
        end, why_left = await in_thread(f"resume {vm}", partial(self._resume, plan, spec, until))
        if end == "left":
            self._left[vm] = why_left
        if end == "running":
            self._guests[vm] = (plan, time.monotonic(), GuestState("running", self._agent_was_open(vm)))
        return end

    def _agent_was_open(self, vm: str) -> bool:
        guest = self._guest(vm)
        return guest is not None and guest.agent_open

    def _resume(self, plan: QemuPlan, spec: ProxmoxVm, until: float) -> tuple[_End, str]:
        """In a thread. How it ended, and why the VM was left."""
        why = ""
        while True:
            try:
                status = ask_state(plan, max(until, time.monotonic() + _STEP_S)).status
                if status in RUNNING:
                    return "running", ""
                if status in OVER:
                    return "gone", ""
                why = f"QEMU says {status}"
                if status in PASSING and plan.vm not in self._untouched:
                    # It ends by itself: then the guest is paused as before, or has gone.
                    why = PASSING[status]
                elif status in NOT_OURS or plan.vm in self._untouched:
                    by = "it is paused, and not by Caesura"
                    return "left", _left_text(NOT_OURS.get(status, by), self._as_it_is(spec))
                else:
                    resume_vm(plan)
                    continue
            except ProcessGone:
                return "gone", ""
            except OSError as error:
                why = str(error)
                if plan.vm in self._untouched:
                    return "left", f"{why}; nothing was done to it"
            if time.monotonic() >= until:
                raise NotRunningYet(plan.vm, why)
            time.sleep(_STEP_S)

    # -- clock --------------------------------------------------------------------------------------------

    async def sync_clock(self, vm: str) -> ClockSet:
        """By the guest agent."""
        return await set_clock(vm, partial(guest_agent, vm, self._agent_socket(vm)))

    async def guest_boot_id(self, vm: str) -> str:
        """By the guest agent."""
        return await read_boot_id(vm, partial(guest_agent, vm, self._agent_socket(vm)))

    def _agent_socket(self, vm: str) -> str:
        spec = self._vms.get(vm)
        if spec is None or vm not in self._plans:
            raise NotPossible(vm, "it does not run")
        if not spec.guest_agent:
            raise NotPossible(vm, f"no guest agent is enabled for it: `qm set {spec.vmid} --agent 1`")
        return sockets_of(self._options.run_dir, spec.vmid)[1]


def _counts(seen: tuple[QemuPlan, float, GuestState | None], plan: QemuPlan) -> bool:
    """Whether an answer of this process is new enough to count while QEMU is silent: it may be busy, or serve another client."""
    return seen[0] == plan and seen[2] is not None and time.monotonic() - seen[1] < _BUSY_S


def _called(vms: Mapping[str, ProxmoxVm]) -> dict[str, str]:
    return {name: vm.called for name, vm in vms.items()}


def _gone_text(spec: ProxmoxVm) -> str:
    return (
        "its configuration is not on this node any more: it was migrated away, or destroyed. Where it is now it may be paused:"
        f" there, {_REMEDY.format(spec.vmid)}"
    )


def _left_text(why: str, spec: ProxmoxVm) -> str:
    lock = f" ({lock_text(spec.lock, spec.vmid)})" if spec.lock else ""
    return f"{why}{lock}; when nothing is under way any more, {_REMEDY.format(spec.vmid)}, on the node that has it"
