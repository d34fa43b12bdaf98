"""What is retained about each VM of this host: kept here, published when it changed, until the broker has it.

Nothing waits for it: a pause only notes what is to be said, and a task says it when the bus is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime

import msgspec
import structlog

from caesura.bus.port import BusError
from caesura.bus.post import Post
from caesura.contract.messages import LastPause, VmFrozen, VmRecord, VmResumed, VmStatus

_LONG_S = 3600.0  # s: how long one wait for the bus is; there is another one after it
_RETRY_S = 1.0  # s: after a publish that the bus did not take though it is connected

_log = structlog.get_logger("caesura.host.vms")


def _now() -> datetime:
    return datetime.now(UTC)


class VmStatuses:
    """The statuses of one host's VMs.

    Args:
        host: its name.
        vms: the names of its VMs: of others that this host once had the status is removed.
        post: where they are published.
        now: the wall clock.
    """

    def __init__(self, host: str, vms: Iterable[str], post: Post, now: Callable[[], datetime] = _now) -> None:
        self._host = host
        self._vms = frozenset(vms)
        self._post = post
        self._now = now
        self._known: dict[str, VmStatus] = {}
        self._earlier: dict[str, LastPause] = {}
        """VM to its last pause as a previous run of this service published it."""
        self._due: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._done = asyncio.Event()
        self._done.set()

    # -- what is so ---------------------------------------------------------------------------------------

    def observe(self, records: Iterable[VmRecord], busy: Collection[str] = ()) -> None:
        """The VMs as the inventory has them now.

        Args:
            busy: VMs of an operation that is under way: whether Caesura has one of these paused its facts say, and the
                inventory may be a moment older.
        """
        for record in records:
            known = self._known.get(record.vm)
            last = known.last_pause if known is not None else self._earlier.get(record.vm)
            paused = known is not None and known.paused_since is not None and record.vm in busy
            self._put(
                VmStatus(
                    vm=record.vm,
                    host=self._host,
                    set=record.set,
                    update_domain=record.update_domain,
                    state="paused" if paused else record.state,
                    state_detail=record.state_detail,
                    paused_since=known.paused_since if known is not None and paused else None,
                    operation=known.operation if known is not None and paused else "",
                    last_pause=last,
                    at=self._now(),
                )
            )

    def frozen(self, fact: VmFrozen) -> None:
        """A VM was paused."""
        known = self._known.get(fact.vm)
        self._put(
            VmStatus(
                vm=fact.vm,
                host=self._host,
                set=fact.set,
                update_domain=fact.update_domain,
                state="paused",
                paused_since=fact.at,
                operation=fact.operation,
                last_pause=known.last_pause if known is not None else self._earlier.get(fact.vm),
                at=fact.at,
            )
        )

    def resumed(self, fact: VmResumed) -> None:
        """A VM runs again. A fact that is older than what is known changes nothing."""
        known = self._known.get(fact.vm)
        if known is not None and (
            (known.paused_since is not None and known.paused_since > fact.at)
            or (known.last_pause is not None and known.last_pause.at >= fact.at)
        ):
            return
        self._put(
            VmStatus(
                vm=fact.vm,
                host=self._host,
                set=fact.set,
                update_domain=fact.update_domain,
                state="running",
                last_pause=LastPause(
                    operation=fact.operation,
                    method=fact.method,
                    pause_s=fact.pause_s,
                    within_budget=fact.within_budget,
                    resumed_by=fact.resumed_by,
                    at=fact.at,
                ),
                at=fact.at,
            )
        )

    def published_earlier(self, status: VmStatus) -> None:
        """What the broker retains: a last pause that this run knows nothing of, or a VM that is not here any more."""
        if status.vm not in self._vms:
            self._ask(status.vm)
            return
        known = self._known.get(status.vm)
        if status.last_pause is not None and (known is None or known.last_pause is None):
            self._earlier[status.vm] = status.last_pause
            if known is not None:
                self._put(msgspec.structs.replace(known, last_pause=status.last_pause, at=self._now()))

    def connected(self) -> None:
        """A broker may have lost what it retained: all is said again."""
        for vm in self._known:
            self._ask(vm)

    def _put(self, status: VmStatus) -> None:
        known = self._known.get(status.vm)
        if known is not None and msgspec.structs.replace(status, at=known.at) == known:
            return
        self._known[status.vm] = status
        self._ask(status.vm)

    def _ask(self, vm: str) -> None:
        self._due[vm] = None
        self._done.clear()
        self._wake.set()

    async def drained(self, timeout_s: float) -> bool:
        """Whether all was published within the time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._done.wait()
        except TimeoutError:
            return False
        return True

    # -- out ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Publish what is due, until cancelled."""
        while True:
            await self._wake.wait()
            if not await self._post.bus.wait_connected(_LONG_S):
                continue
            self._wake.clear()
            failed = False
            for vm in list(self._due):
                status = self._known.get(vm)
                self._due.pop(vm, None)
                try:
                    if status is not None:
                        await self._post.send(status, host=self._host, vm=vm)
                    else:
                        await self._post.clear(VmStatus, host=self._host, vm=vm)
                except BusError as error:
                    _log.debug("vm.status_not_published", vm=vm, why=str(error))
                    self._due.setdefault(vm)
                    failed = True
            if failed:
                await asyncio.sleep(_RETRY_S)
            if self._due:
                self._wake.set()
            else:
                self._done.set()
