"""The driver port: what the host updater may ask of a hypervisor.

``Driver`` is what every driver has. What only some can do is a protocol of its own beside it, asked for by ``isinstance``:
``MembershipCapable``, ``AdoptionCapable``, ``SwapCapable``, ``ReplaceCapable``, ``RebootCapable``, ``DigestCapable``, ``ClockCapable``. ``plugin`` says how a driver is found and made.

One conformance suite (``caesura.conformance.drivers``) holds every driver to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import msgspec

from caesura.contract.messages import Method, ProofCode, VmState
from caesura.runtime.errors import CaesuraError
from caesura_host_updater.inventory.vm_spec import VmSpec
from caesura_vmcontrol.resume_plans import MECHANISMS, ResumePlan, mechanism_of


class DriverError(CaesuraError):
    """A driver could not do what it was asked. ``vm`` names the VM."""

    def __init__(self, vm: str, why: str) -> None:
        self.vm = vm
        self.why = why
        super().__init__(f"VM {vm}: {why}")


class FreezeFailed(DriverError):
    """The VM is not paused, or it could not be shown that it is; it may be partly frozen.

    ``untouched``: nothing was done to it, and nothing will take effect later: if it is paused, somebody else paused it.
    """

    def __init__(self, vm: str, why: str, *, untouched: bool = False) -> None:
        self.untouched = untouched
        super().__init__(vm, why)


class SwapFailed(DriverError):
    """The new process did not take the guest over. The caller then calls ``resume``, which has the old one run.

    ``frozen_at`` and ``resumed_at`` (CLOCK_MONOTONIC): the pause that the try cost, as far as it is known. ``differs``: where the
    memory of the two processes differed, if that was why.
    """

    def __init__(
        self,
        vm: str,
        why: str,
        *,
        frozen_at: float | None = None,
        resumed_at: float | None = None,
        differs: str = "",
    ) -> None:
        self.frozen_at = frozen_at
        self.resumed_at = resumed_at
        self.differs = differs
        super().__init__(vm, why)


class ShutdownFailed(DriverError):
    """The VM runs on: it did not shut down in time, or nothing could ask it to.

    Args:
        asked: whether it was asked, and had its time.
    """

    def __init__(self, vm: str, why: str, *, asked: bool = False) -> None:
        self.asked = asked
        super().__init__(vm, why)


class NotRunningYet(DriverError):
    """The VM was asked to run and does not run yet: ask again."""


class NotPossible(DriverError):
    """This driver cannot do this at all; the text says why."""


class UnknownPlan(DriverError):
    """The pause guard could not resume the VM: the driver's plan is of a kind that it does not know."""


KNOWN = f"the pause guard, which resumes VMs when the host updater is dead, knows {', '.join(map(repr, MECHANISMS))}"


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What can be done with a VM, and why the rest cannot."""

    methods: tuple[Method, ...]
    missing: Mapping[str, str]
    clock: Literal["simulated", "system", "none"]
    digests: tuple[ProofCode, ...] = ()
    """Which digests of its memory can be taken while it is paused: `sampled_digest_equal`, and `digest_equal` if it is small enough."""
    no_digest: str = ""
    """Why none can."""
    pause_risk: str = ""
    """What could end the VM in a pause though everything here goes well, and what to do about that; shown in the plan."""


class HandOver(msgspec.Struct, frozen=True, kw_only=True):
    """A swap that worked. Instants are seconds on CLOCK_MONOTONIC.

    ``called_at`` to ``resumed_at`` is the pause; ``detail`` names what runs the guest now and before. ``sampled``: whether
    sampled pages were the same in both processes inside the pause; None: not looked at, ``sampled_note`` says why.
    """

    called_at: float
    frozen_at: float
    resumed_at: float
    detail: str = ""
    sampled: bool | None = None
    sampled_note: str = ""


class ClockSet(msgspec.Struct, frozen=True, kw_only=True):
    """A guest clock that was set from outside: guest minus host, seconds, before and after.

    The true error lies within ``uncertainty_s`` around the measured one.
    """

    before_s: float
    after_s: float
    uncertainty_s: float


class Driver(Protocol):
    """A hypervisor that pauses VMs and resumes them. All instants are seconds on CLOCK_MONOTONIC.

    ``freeze`` must never leave anything running in the background: when it was cancelled, nothing of it
    freezes a VM later.
    """

    @property
    def name(self) -> str:
        """``process``, ``qemu``, ..."""

    def detail(self) -> str:
        """How it works here, for people: the freezer, or QEMU's version and accelerator."""

    def capabilities(self, vm: str) -> Capabilities:
        """What can be done with this VM as it is now."""

    def ping(self) -> str:
        """Empty text when well, else what is wrong; for the health probe."""

    def health_error(self, vm: str) -> str:
        """What is wrong with this VM, for people: why it does not run or cannot be resumed; empty: nothing."""

    async def open(self) -> None:
        """Find the VMs that run already and start the others. VMs found frozen stay so: ``resume`` them.

        A VM that cannot be started is logged, shows in ``ping`` and counts as stopped: the others may be
        frozen and need us.
        """

    async def close(self, *, stop_vms: bool) -> None:
        """Release everything. VMs run on unless ``stop_vms``."""

    async def read_states(self) -> Mapping[str, VmState]:
        """The state of every VM, from the kernel or hypervisor. May take as long as they do: see ``states_within``."""

    async def changed(self) -> None:
        """Wait until the state of a VM changed by itself (it ended)."""

    async def prepare(self, vm: str, operation: str, method: Method, binary: str) -> None:
        """Get ready what the method needs while the VM runs on: a swap's new process is started and checked here.

        ``binary``: the new VMM; empty for the one that the host file names, as it is on disk now. What was
        prepared is undone by ``release``.

        Raises:
            DriverError: it cannot be done, with the hypervisor's own reason. Nothing was paused.
        """

    def resume_plan(self, vm: str) -> ResumePlan:
        """How the pause guard resumes the VM alone, after what was prepared. Raises DriverError if it is not running at all."""

    async def freeze(self, vm: str, by: float) -> None:
        """Pause the VM and confirm it with the kernel or hypervisor.

        ``by`` is an instant, not a duration: an updater that has been stopped must not try again.

        Raises:
            FreezeFailed: not confirmed by then, or the VM is gone.
        """

    async def release(self, vm: str) -> None:
        """The operation is over: end and remove what ``prepare`` made and was not used."""

    async def resume(self, vm: str, timeout_s: float) -> Literal["running", "gone", "left"]:
        """Make the VM run and confirm it: resume, roll back or restore, whatever it takes. Right in every state.

        ``left``: it does not run and is not ours to resume: somebody else paused it or has it; see ``why_left``.

        Raises:
            NotRunningYet: not confirmed in time.
        """

    def why_left(self, vm: str) -> str:
        """Why ``resume`` left the VM as it is; empty where it did not."""

    def process_of(self, vm: str) -> str:
        """What runs the guest now, for people: ``QEMU 7.2.22 (pid 4711)``; empty when nothing does."""


@runtime_checkable
class MembershipCapable(Protocol):
    """A driver whose VMs come and go while it is open. ``changed`` returns when they did."""

    def members(self) -> Sequence[VmSpec]:
        """The VMs that there are now. One of an operation stays until ``release``, which ends each operation of such a driver."""


@runtime_checkable
class AdoptionCapable(Protocol):
    """A driver whose platform may not name a VM that was paused before the start, though its process lives."""

    def adopt(self, plans: Iterable[ResumePlan]) -> Collection[str]:
        """Have these as VMs of an operation, until ``release``, where the platform does not have them. Called once, when the driver is open.

        Returns:
            The names of those.
        """


@runtime_checkable
class SwapCapable(Protocol):
    """A driver that has another process take a running guest over."""

    async def hand_over(self, vm: str, by: float) -> HandOver:
        """Swap: the prepared process takes the guest over. Not begun after ``by``.

        Raises:
            SwapFailed: it did not; ``resume`` makes sure that the old process runs the guest.
            DriverError: no swap of it was prepared.
        """


@runtime_checkable
class ReplaceCapable(Protocol):
    """A driver that saves a guest's device state to a file and starts another process from it."""

    async def checkpoint(self, vm: str, by: float, *, gone: bool = True) -> None:
        """Replace, first half: the device state is in a file and the old process is gone; ``resume`` starts the new one.

        ``gone`` False: it was killed and may still be dying, which nothing that runs at the same time minds.

        Raises:
            FreezeFailed: the VM is not paused, or its state could not be saved; ``resume`` has the old process run it.
            DriverError: no replace of it was prepared.
        """


@runtime_checkable
class RebootCapable(Protocol):
    """A driver that has a guest shut down by itself, and starts it again."""

    async def shut_down(self, vm: str, by: float) -> str:
        """Ask the VM to shut down, and wait until nothing of it runs; nothing is killed. Returns by what it was asked, for people.

        From the request on the VM is to run again: where it ends later, or after another host updater has taken over,
        it is started as soon as it has ended.

        Raises:
            ShutdownFailed: it still runs at ``by`` (CLOCK_MONOTONIC), or could not be asked.
        """

    async def start(self, vm: str, down_by: float) -> bool:
        """Make a VM run that was asked to shut down, and wait until it is up. Right in every state.

        One that still runs is waited for until ``down_by`` (CLOCK_MONOTONIC), then left: it is started when it ends.

        Returns:
            Whether it was started; False: it had never ended, and runs.

        Raises:
            DriverError: it cannot be started, or is not up; it may be tried again.
        """


@runtime_checkable
class KillCapable(Protocol):
    """A driver that can end a VM which does not shut down by itself; only for updates that say so."""

    async def kill(self, vm: str, by: float) -> None:
        """Kill what still runs of a VM that was asked to shut down, and wait until nothing of it does.

        Raises:
            DriverError: it still runs at ``by`` (CLOCK_MONOTONIC).
        """


@runtime_checkable
class DigestCapable(Protocol):
    """A driver that reads a guest's memory from outside."""

    async def memory_digest(self, vm: str, stop_at: float) -> str | None:
        """A digest of the guest's memory, only meaningful while it is paused; None: not done by ``stop_at``.

        Raises:
            NotPossible, DriverError: there is no memory to read, or reading it failed.
        """

    async def sampled_digest(self, vm: str, seed: str) -> str:
        """A digest of pages of the guest's memory that ``seed`` chooses; takes no time worth mentioning, whatever the size.

        Raises:
            NotPossible, DriverError: there is no memory to read, or reading it failed.
        """


@runtime_checkable
class ClockCapable(Protocol):
    """A driver that reaches into a guest, past its agent: sets its clock, and reads which boot of its kernel it is."""

    async def sync_clock(self, vm: str) -> ClockSet:
        """Set the guest's clock from outside.

        Raises:
            NotPossible, DriverError: there is no way to reach this guest, or the guest does not answer or answers nonsense.
        """

    async def guest_boot_id(self, vm: str) -> str:
        """The guest kernel's boot id as seen from inside: the same one after a pause shows that memory stayed.

        Raises:
            NotPossible, DriverError: nothing in the guest can be asked, or it does not answer.
        """


def guard_plan(driver: Driver, vm: str) -> ResumePlan:
    """``resume_plan``, held to what the pause guard can carry out.

    Raises:
        DriverError: the VM is not running, or its plan is of a kind that the guard does not know.
    """
    plan = driver.resume_plan(vm)
    if mechanism_of(plan) is None:
        raise UnknownPlan(
            vm, f"the {driver.name} driver would have it resumed by {type(plan).__name__!r}; {KNOWN}"
        )
    return plan


async def states_within(driver: Driver, timeout_s: float) -> Mapping[str, VmState]:
    """The state of every VM; nothing, if the kernel or hypervisor does not say within ``timeout_s`` seconds."""
    try:
        async with asyncio.timeout(timeout_s):
            return await driver.read_states()
    except TimeoutError:
        return {}
