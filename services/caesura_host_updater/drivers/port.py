"""The driver port: what the host updater may ask of a hypervisor.

One conformance suite (``tests/integration/host_updater/test_driver_conformance.py``) holds every driver to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import msgspec

from caesura.contract.messages import Method, VmState
from caesura.runtime.errors import CaesuraError
from caesura_host_updater.guard.plans import Plan


class DriverError(CaesuraError):
    """A driver could not do what it was asked. ``vm`` names the VM."""

    def __init__(self, vm: str, why: str) -> None:
        self.vm = vm
        self.why = why
        super().__init__(f"VM {vm}: {why}")


class FreezeFailed(DriverError):
    """The VM does not stand still, or it could not be shown that it does; it may be partly frozen."""


class NotRunningYet(DriverError):
    """The VM was asked to run and does not run yet: ask again."""


class NotPossible(DriverError):
    """This driver cannot do this at all; the text says why."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What can be done with the VMs of a driver, and why the rest cannot."""

    methods: tuple[Method, ...]
    missing: Mapping[str, str]
    clock: Literal["simulated", "system", "none"]


class Driver(Protocol):
    """A hypervisor. All instants are seconds on CLOCK_MONOTONIC.

    ``freeze`` must never leave anything running in the background: when it was cancelled, nothing of it
    freezes a VM later.
    """

    @property
    def name(self) -> str:
        """``process``, ``qemu``, ..."""

    @property
    def capabilities(self) -> Capabilities:
        """The same for every VM of the driver."""

    def ping(self) -> str:
        """Empty text when well, else what is wrong; for the health probe."""

    async def open(self) -> None:
        """Find the VMs that run already and start the others. VMs found frozen stay so: ``resume`` them.

        A VM that cannot be started is logged, shows in ``ping`` and counts as stopped: the others may be
        frozen and need us.
        """

    async def close(self, *, stop_vms: bool) -> None:
        """Let go. VMs run on unless ``stop_vms``."""

    def states(self) -> Mapping[str, VmState]:
        """The state of every VM, read now."""

    async def changed(self) -> None:
        """Wait until the state of a VM changed by itself (it ended)."""

    def resume_plan(self, vm: str) -> Plan:
        """How the pause guard resumes the VM alone. Raises DriverError if it is not running at all."""

    async def freeze(self, vm: str, by: float) -> None:
        """Make the VM stand still and confirm it with the kernel or hypervisor.

        ``by`` is an instant, not a duration: an updater that was stopped meanwhile must not try again.

        Raises:
            FreezeFailed: not confirmed by then, or the VM is gone.
        """

    async def resume(self, vm: str, timeout_s: float) -> Literal["running", "gone"]:
        """Make the VM run and confirm it. Right in every state: a running VM is left alone.

        Raises:
            NotRunningYet: not confirmed in time.
        """

    def memory_size(self, vm: str) -> int:
        """Bytes that ``memory_digest`` would read; 0 where it cannot."""

    async def memory_digest(self, vm: str, stop_at: float) -> str | None:
        """A digest of the guest's memory, only meaningful while it stands still; None: not done by ``stop_at``.

        Raises:
            NotPossible, DriverError: there is no memory to read, or reading it failed.
        """

    async def sync_clock(self, vm: str) -> float:
        """Set the guest's clock; the remaining error in seconds. Raises NotPossible."""
