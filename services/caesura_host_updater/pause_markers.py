"""The host updater's side of the pause markers: written in one batch before a freeze, removed when VMs run.

One thread does both, in order: a marker that a slow disk writes late is removed after that, not before.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from caesura.runtime.errors import CaesuraError
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import Worker
from caesura_vmcontrol import claims, markers
from caesura_vmcontrol.boots import of_another_boot
from caesura_vmcontrol.container_engine import EnginePlan
from caesura_vmcontrol.intent import Intent
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan
from caesura_vmcontrol.marked_pauses import marked_and_paused, resume
from caesura_vmcontrol.markers import Marker
from caesura_vmcontrol.procfs import boot_id
from caesura_vmcontrol.qemu_plans import QemuPlan, ReplacePlan, SwapPlan
from caesura_vmcontrol.resume_plans import CgroupPlan, ResumePlan, SignalPlan

_WRITE_S = 3.0  # s: one round of the disk; nothing is paused in the meantime
_REMOVE_AGAIN_S = 5.0  # s: between two tries to remove markers that the disk refused to remove

_log = get_logger("caesura.pause")


class NotMarked(CaesuraError):
    """The pause markers could not be made durable; nothing may be frozen."""


class PauseMarkers:
    """The markers in a state folder; see ``caesura_vmcontrol.markers`` for what they mean."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = str(state_dir.resolve())
        self._boot_id = boot_id()
        self._worker = Worker("pause markers")
        self._left: set[str] = set()
        self._stop = threading.Event()

    async def write(self, operation: str, plans: Sequence[ResumePlan]) -> None:
        """Mark the VMs of an operation, before the first of them is frozen.

        Raises:
            NotMarked: the disk refused, or did not answer in time. A marker that is written late is removed by ``remove``.
        """
        at = time.monotonic()
        found = [Marker(operation, self._boot_id, at, plan) for plan in plans]
        try:
            async with asyncio.timeout(_WRITE_S):
                await self._worker.do(lambda: markers.write(self._state_dir, found))
        except TimeoutError:
            self.remove(plan.vm for plan in plans)
            raise NotMarked(f"the disk did not take the pause markers within {_WRITE_S:g} s") from None
        except OSError as error:
            raise NotMarked(f"cannot write the pause markers: {error.strerror or error}") from error

    def remove(self, vms: Iterable[str]) -> None:
        """These VMs were seen to run, or are gone. Does not wait for the disk."""
        self._worker.post(lambda names=tuple(vms): self._remove(names))  # type: ignore[misc]

    def _remove(self, vms: Sequence[str]) -> None:
        left = markers.remove(self._state_dir, vms)
        if left and not self._left.issuperset(left):
            _log.error("marker.not_removed", vms=left, hint="it is retried; the VMs run")
        self._left = (self._left - set(vms)) | set(left)

    async def remove_later(self) -> None:
        """Remove the markers that the disk refused to remove at first. Never ends."""
        while True:
            await asyncio.sleep(_REMOVE_AGAIN_S)
            if self._left:
                self.remove(tuple(self._left))

    async def read(self) -> Mapping[str, Marker | None]:
        """Every marker; None where it is damaged."""
        return await self._worker.do(lambda: markers.read(self._state_dir))

    def is_ours(self, marker: Marker | None, plan: ResumePlan | None) -> bool:
        """Whether a marker is about the VM that this plan would resume. A damaged one counts as such.

        ``plan``: None where the driver does not know, as in the middle of a replace.
        """
        if marker is None:
            return True
        if marker.boot_id != self._boot_id:
            return False
        match marker.plan, plan:
            case SignalPlan() as then, SignalPlan() as now:
                return (then.leader, then.start_ticks) == (now.leader, now.start_ticks)
            case CgroupPlan() as then, CgroupPlan() as now:
                return then.control == now.control
            case EnginePlan() as then, EnginePlan() as now:
                return (then.container, then.pid, then.start_ticks) == (
                    now.container,
                    now.pid,
                    now.start_ticks,
                )
            case LibvirtPlan() as then, LibvirtPlan() as now:
                return then.uuid == now.uuid and _is_one_life(then, now)
            case QemuPlan() as then, QemuPlan() as now:
                return (then.vmm.pid, then.vmm.start_ticks) == (now.vmm.pid, now.vmm.start_ticks)
            case _:
                return True  # a swap or replace: another process may have the guest by now

    async def claimed(self, plans: Mapping[str, ResumePlan | None]) -> list[str]:
        """The VMs in the middle of a swap or replace that has begun: a claim names the process that has the guest, or the file.

        One that another boot left for a change of the kernel is in its files, even where its claims cannot be seen yet.
        """

        def begun() -> list[str]:
            return [
                vm
                for vm, plan in plans.items()
                if isinstance(plan, SwapPlan | ReplacePlan)
                and (of_another_boot(plan) or _owner(plan.claims) is not None)
            ]

        return await self._worker.do(begun)

    # -- at the start ---------------------------------------------------------------------------------------

    async def found_paused(self) -> Intent | None:
        """What is paused with our marker."""
        return await self._worker.do(lambda: marked_and_paused(self._state_dir, self._boot_id, _say))

    async def resume(self, found: Intent, patience_s: float) -> Mapping[str, float]:
        """Resume it; returns which VMs run, and since when on CLOCK_MONOTONIC."""
        until = time.monotonic() + patience_s
        return await self._worker.do(
            lambda: resume(
                found, "the host updater started and found it paused", _say, until, self._stop.is_set
            )
        )

    async def close(self, patience_s: float = 1.0) -> None:
        """Complete what was requested, for ``patience_s`` seconds at most."""
        self._stop.set()
        await self._worker.close(patience_s)


def _say(event: str, **facts: object) -> None:
    _log.warning(event, **facts)


def _is_one_life(then: LibvirtPlan, now: LibvirtPlan) -> bool:
    """Its process counts where both know it: ids are given again by a daemon that was restarted."""
    if then.pid and now.pid:
        return (then.pid, then.start_ticks) == (now.pid, now.start_ticks)
    return then.number == now.number


def _owner(folder: str) -> claims.Owner | None:
    try:
        return claims.current(folder)[1]
    except (OSError, claims.BadClaim):
        return None


def how_to_resume(plan: ResumePlan | None) -> str:
    """How somebody else who paused a VM may resume it, in words for an operator."""
    match plan:
        case CgroupPlan(kind=kind, control=control):
            return f"resume it with: echo {'0' if kind == 'cgroup2' else 'THAWED'} > {control}"
        case SignalPlan(leader=leader):
            return f"resume it with: kill -CONT -{leader}"
        case EnginePlan(container=container):
            return f"resume it with: docker unpause {container[:12]} (or podman unpause)"
        case LibvirtPlan(uri=uri, uuid=uuid):
            return f"resume it with: virsh -c {uri} resume {uuid}"
        case QemuPlan(vmm=vmm):
            return f"resume it with the command cont on its QMP socket, such as {vmm.qmp}"
        case _:
            return "resume it with what paused it"
