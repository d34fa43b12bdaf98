"""What is retained about each VM of this host: kept here, published when it changed, until the broker has it.

Nothing waits for it: a pause only records the state, and the newest is published when the bus is available.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable
from datetime import UTC, datetime

import msgspec

from caesura.bus.messaging import MessageClient
from caesura.contract.messages import LastPause, VmFrozen, VmRecord, VmResumed, VmStatus
from caesura.delivery.message import clearing, prepare
from caesura.delivery.policy import NEWEST
from caesura.delivery.publisher import ReliablePublisher
from caesura.runtime.identity import new_id


def _now() -> datetime:
    return datetime.now(UTC)


class VmStatuses:
    """The statuses of one host's VMs.

    Args:
        host: its name.
        vms: its VMs: the status of others that this host once had is removed.
        post: where they are published.
        now: the wall clock.
    """

    def __init__(
        self, host: str, vms: Container[str], post: MessageClient, now: Callable[[], datetime] = _now
    ) -> None:
        self._host = host
        self._vms = vms
        self._source = post.source
        self._now = now
        self._known: dict[str, VmStatus] = {}
        self._earlier: dict[str, LastPause] = {}
        """VM to its last pause as a previous run of this service published it."""
        # A publisher of its own: no fact waits behind the statuses of a thousand VMs.
        self._publisher = ReliablePublisher(post.bus)
        self.run = self._publisher.run
        self.drained = self._publisher.drained
        self.ping = self._publisher.ping

    @property
    def refused(self) -> int:
        """Statuses that wait because the broker refuses their topic."""
        return self._publisher.refused

    def observe(self, records: Iterable[VmRecord], busy: Collection[str] = ()) -> None:
        """The VMs as the inventory has them now.

        Args:
            busy: VMs of an operation that is under way: its facts show whether Caesura has one of these paused, and the
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
        """What the broker retains: a last pause that this run does not know, or a VM that is not here any more."""
        if status.vm not in self._vms:
            self._ask(status.vm)
            return
        known = self._known.get(status.vm)
        if status.last_pause is not None and (known is None or known.last_pause is None):
            self._earlier[status.vm] = status.last_pause
            if known is not None:
                self._put(msgspec.structs.replace(known, last_pause=status.last_pause, at=self._now()))

    def left(self, vms: Iterable[str]) -> None:
        """These are not VMs of this host any more: what is retained of them is removed."""
        for vm in vms:
            self._known.pop(vm, None)
            self._earlier.pop(vm, None)
            self._ask(vm)

    def connected(self) -> None:
        """A broker may have lost what it retained: everything is published again."""
        for vm in self._known:
            self._ask(vm)

    def _put(self, status: VmStatus) -> None:
        known = self._known.get(status.vm)
        if known is not None and msgspec.structs.replace(status, at=known.at) == known:
            return
        self._known[status.vm] = status
        self._ask(status.vm)

    def _ask(self, vm: str) -> None:
        status = self._known.get(vm)
        self._publisher.put(
            clearing(VmStatus, event_id=new_id(), host=self._host, vm=vm)
            if status is None
            else prepare(
                status, source=self._source, event_id=new_id(), at=self._now(), host=self._host, vm=vm
            ),
            policy=NEWEST,
        )
