"""Hosts and VMs of benchmarks: they obey at once, and report what a real one would."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from caesura.bus.messaging import MessageClient
from caesura.bus.port import Bus
from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.topics import channel_of
from caesura.lifecycle.command_compatibility import COMMANDS

_UPDATE = m.UpdateRecord(
    update="bench", version="1", impact="pause", scope="host", expected_s=2.0, timeout_s=9.0
)


def record_of(vm: str, group: str, domain: int) -> m.VmRecord:
    """A VM as its host names it."""
    return m.VmRecord(
        vm=vm,
        set=group,
        update_domain=domain,
        state="running",
        methods=("live", "freeze"),
        clock="simulated",
        proofs={"freeze": ("digest_equal", "not_rebooted")},
    )


class Operations(Protocol):
    """Who wants to know how far operations are."""

    async def before_last_report(self, command: m.StartOperation) -> None:
        """A host is about to say how its operation ended."""

    def last_report(self, command: m.StartOperation) -> None:
        """A host has said how its operation ended."""


def filters_of(*hosts: str) -> list[str]:
    """What the connection of these hosts subscribes to."""
    start, abort = channel_of(m.StartOperation), channel_of(m.AbortOperation)
    found = [channel_of(m.CoordinatorPresence).filter()]
    for each in hosts:
        found += [start.filter(host=each), abort.filter(host=each)]
    return found


class Workloads:
    """Agents and workloads: each scheduled event is answered by the agents of its VMs, and approved for one of them, once.

    Args:
        post: their connection.
        publisher: the metadata publisher that passes a VM's approval on.
    """

    def __init__(self, post: MessageClient, publisher: Callable[[str], str]) -> None:
        self._post = post
        self._publisher = publisher
        self._answered: set[str] = set()

    async def on_document(self, document: m.SetDocument, _: Received) -> None:
        """Answer its events."""
        for event in document.events:
            if event.status == "scheduled" and event.event_id not in self._answered:
                self._answered.add(event.event_id)
                for vm in event.resources:
                    await self._post.send(m.VmReady(vm=vm, event_id=event.event_id, ready=True), vm=vm)
                first = event.resources[0]
                approved = m.VmApproved(
                    event_id=event.event_id, set=document.set, vm=first, at=datetime.now(UTC)
                )
                await self._post.send(approved, instance=self._publisher(first), vm=first)


class Host:
    """One host that obeys at once, on a bus that it may share with others.

    Args:
        bus: its connection.
        name: its own.
        records: its VMs.
        operations: is told how far they are.
    """

    def __init__(self, bus: Bus, name: str, records: tuple[m.VmRecord, ...], operations: Operations) -> None:
        self.operations = operations
        self.name = name
        self.records = records
        self.bus = bus
        self.post = MessageClient(bus, f"/caesura/default/host/{name}")
        self.epoch, self.coordinator = 1, "none"
        self.reports: dict[str, m.OperationReported | None] = {}
        """Operation to its last report; None: it is under way."""

    def inventory(self, operation: str = "") -> m.HostInventory:
        """What it says it has."""
        records = self.records
        if operation:
            records = tuple(
                m.VmRecord(
                    **{**{name: getattr(each, name) for name in each.__struct_fields__}, "state": "paused"}
                )
                for each in records
            )
        return m.HostInventory(
            host=self.name,
            driver="process",
            epoch=self.epoch,
            coordinator=self.coordinator,
            vms=records,
            updates=(_UPDATE,),
            operation=operation,
            guard="ready",
            commands=COMMANDS,
        )

    async def report_in(self) -> None:
        """Be on the bus."""
        await self.post.send(m.HostPresence(host=self.name, online=True, instance="i"), host=self.name)
        await self.post.send(self.inventory(), host=self.name)

    async def on_epoch(self, claimed: m.CoordinatorPresence, _: Received) -> None:
        """A coordinator announced itself."""
        if claimed.online and claimed.epoch > self.epoch:
            self.epoch, self.coordinator = claimed.epoch, claimed.coordinator
            await self.post.send(self.inventory(), host=self.name)

    async def on_start(self, command: m.StartOperation, _: Received) -> None:
        """A command arrived; one that is known is answered as before."""
        if command.epoch != self.epoch:
            return  # as a host does: an older authority
        if command.operation in self.reports:
            if (known := self.reports[command.operation]) is not None:
                await self.post.send(known, host=self.name)
            return
        self.reports[command.operation] = None
        await self._report(command, "accepted")
        await self.post.send(self.inventory(command.operation), host=self.name)
        for each in command.targets:
            where = {"host": self.name, "set": each.set, "ud": each.update_domain, "vm": each.vm}
            frozen = m.VmFrozen(
                **self._named(each, command), method="freeze", budget_s=command.budget_s, at=datetime.now(UTC)
            )
            await self.post.send(frozen, **where)
        for each in command.targets:
            where = {"host": self.name, "set": each.set, "ud": each.update_domain, "vm": each.vm}
            resumed = m.VmResumed(
                **self._named(each, command),
                method="freeze",
                budget_s=command.budget_s,
                pause_s=2.0,
                within_budget=True,
                resumed_by="updater",
                at=datetime.now(UTC),
            )
            await self.post.send(resumed, **where)
        await self.post.send(self.inventory(), host=self.name)
        for each in command.targets:
            where = {"host": self.name, "set": each.set, "ud": each.update_domain, "vm": each.vm}
            clock = m.VmClockSynced(
                vm=each.vm,
                host=self.name,
                set=each.set,
                update_domain=each.update_domain,
                operation=command.operation,
                synced=True,
                by="agent",
                error_before_s=-2.0,
                error_after_s=0.0003,
                memory=m.MemoryProof(proof="heartbeat", ok=True, held=("not_rebooted", "canary_equal")),
                at=datetime.now(UTC),
            )
            await self.post.send(clock, **where)
        await self.operations.before_last_report(command)
        await self._report(command, "completed")

    def _named(self, target: m.OperationTarget, command: m.StartOperation) -> dict[str, Any]:
        return {
            "vm": target.vm,
            "host": self.name,
            "set": target.set,
            "update_domain": target.update_domain,
            "operation": command.operation,
        }

    async def _report(self, command: m.StartOperation, status: Any) -> None:
        results: tuple[m.VmResult, ...] = ()
        if status == "completed":
            memory = m.MemoryProof(proof="digest", ok=True, held=("digest_equal", "not_rebooted"))
            results = tuple(
                m.VmResult(
                    vm=each.vm,
                    set=each.set,
                    update_domain=each.update_domain,
                    state="running",
                    frozen=True,
                    pause_s=2.0,
                    resumed_by="updater",
                    memory=memory,
                )
                for each in command.targets
            )
        report = m.OperationReported(
            operation=command.operation,
            host=self.name,
            epoch=self.epoch,
            rollout=command.rollout,
            wave=command.wave,
            status=status,
            vms=results,
            update=m.UpdateOutcome(update="bench", outcome="succeeded", seconds=2.0) if results else None,
            at=datetime.now(UTC),
        )
        await self.post.send(report, host=self.name)
        if results:
            self.reports[command.operation] = report
            self.operations.last_report(command)
