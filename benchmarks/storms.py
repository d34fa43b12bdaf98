"""The messages of a large fleet: what the broker retains of it, and a rollout over all of it. For the other benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec.structs import replace

from caesura.bus.port import Delivery
from caesura.contract import messages as m
from caesura.contract.codec import encode
from caesura.contract.envelope import Message
from caesura.contract.topics import channel_of
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura_testing.rollouts import sent, wave_state, whole_rollout


class Storms:
    """Hosts that hold VMs of one domain each, of as many sets as fit: the messages of such a fleet."""

    def __init__(self, vms: int, sets: int, domains: int, hosts: int) -> None:
        self.sets, self.domains = sets, domains
        if hosts < domains:
            raise SystemExit(
                f"exporter: {hosts} hosts for {domains} domains: a host holds VMs of one domain only"
            )
        per_host = -(-vms // hosts)
        self.vms: list[tuple[str, str, int, str]] = []
        """(VM, set, domain, host)."""
        in_domain = [0] * domains
        for number in range(vms):
            group, domain = number % sets, number // sets % domains
            host = f"host-{domain}-{in_domain[domain] // per_host}"
            in_domain[domain] += 1
            self.vms.append((f"vm-{number}", f"set-{group}", domain, host))
        self.hosts = sorted({host for _, _, _, host in self.vms})
        self._count = 0

    def _sent(self, message: Message, **where: str | int) -> Delivery:
        self._count += 1
        payload = encode(message, source="/bench", event_id=str(self._count), time=datetime.now(UTC))
        return Delivery(channel_of(type(message)).topic(**where), payload, retained=False)

    def present(self) -> Iterator[Delivery]:
        """What is retained: presences, inventories, documents."""
        yield self._sent(m.CoordinatorPresence(coordinator="c", epoch=1, online=True))
        of_host: dict[str, list[m.VmRecord]] = {}
        for vm, group, domain, host in self.vms:
            record = m.VmRecord(vm=vm, set=group, update_domain=domain, state="running", methods=("freeze",))
            of_host.setdefault(host, []).append(record)
            yield self._sent(m.AgentPresence(vm=vm, online=True, boot_id="b"), vm=vm)
        for host, records in of_host.items():
            yield self._sent(m.HostPresence(host=host, online=True, instance="i"), host=host)
            yield self._sent(self._inventory(host, tuple(records)), host=host)
        for number in range(self.sets):
            yield self._sent(
                m.SetDocument(set=f"set-{number}", incarnation=1, events=()), set=f"set-{number}"
            )

    @staticmethod
    def _inventory(host: str, records: tuple[m.VmRecord, ...]) -> m.HostInventory:
        return m.HostInventory(
            host=host,
            driver="process",
            epoch=1,
            vms=records,
            guard="ready",
            commands=COMMANDS,
            installed=(m.InstalledUpdate(update="bench", version="1", at=datetime.now(UTC)),),
        )

    def storm(self, rollout: str) -> Iterator[Delivery]:
        """One rollout over everything, a wave a domain, without the time that it would take."""
        at = datetime.now(UTC)
        waves: list[m.WaveState] = []
        for domain in range(self.domains):
            mine = [each for each in self.vms if each[2] == domain]
            named = {group: domain for _, group, _, _ in mine}
            hosts = sorted({host for _, _, _, host in mine})
            vms = tuple(vm for vm, _, _, _ in mine)
            waves.append(wave_state(wave=domain, domains=named, hosts=tuple(hosts), vms=vms))
        for domain, planned in enumerate(waves):
            mine = [each for each in self.vms if each[2] == domain]
            for status in ("scheduled", "started"):
                yield from self._wave(rollout, waves, planned, status, at)
            for host in planned.hosts:
                yield self._sent(self._command(rollout, planned.wave, host, mine, at), host=host)
                yield self._sent(self._report(rollout, planned.wave, host, "accepted", at), host=host)
            for vm, group, ud, host in mine:
                yield self._of_vm(
                    m.VmFrozen, rollout, vm, group, ud, host, at, method="freeze", budget_s=10.0
                )
            for number, (vm, group, ud, host) in enumerate(mine):
                told = {
                    "method": "freeze",
                    "budget_s": 10.0,
                    "pause_s": 1.0 + number % 50 / 20,
                    "within_budget": True,
                    "resumed_by": "updater",
                    "memory": m.MemoryProof(proof="digest", ok=True),
                }
                yield self._of_vm(m.VmResumed, rollout, vm, group, ud, host, at, **told)
            for vm, group, ud, host in mine:
                told = {
                    "synced": True,
                    "by": "agent",
                    "error_before_s": -2.0,
                    "error_after_s": 0.0003,
                    "memory": m.MemoryProof(
                        proof="heartbeat", ok=True, held=("not_rebooted", "canary_equal")
                    ),
                }
                yield self._of_vm(m.VmClockSynced, rollout, vm, group, ud, host, at, **told)
                checked = m.AgentClockSynced(
                    vm=vm, boot_id="b", trigger="resume", operation=f"{rollout}-{host}", synced=True
                )
                yield self._sent(checked, vm=vm)
            for host in planned.hosts:
                yield self._sent(self._report(rollout, planned.wave, host, "completed", at), host=host)
            for status in ("verifying", "completed"):
                yield from self._wave(rollout, waves, planned, status, at)

    @staticmethod
    def _command(
        rollout: str, wave: int, host: str, mine: list[tuple[str, str, int, str]], at: datetime
    ) -> m.StartOperation:
        return m.StartOperation(
            operation=f"{rollout}-{host}",
            epoch=1,
            coordinator="c",
            host=host,
            rollout=rollout,
            wave=wave,
            method="freeze",
            targets=tuple(
                m.OperationTarget(vm=vm, set=group, update_domain=ud)
                for vm, group, ud, where in mine
                if where == host
            ),
            update="bench",
            budget_s=10.0,
            not_after=at,
        )

    @staticmethod
    def _report(rollout: str, wave: int, host: str, status: Any, at: datetime) -> m.OperationReported:
        over = status == "completed"
        return m.OperationReported(
            operation=f"{rollout}-{host}",
            host=host,
            epoch=1,
            rollout=rollout,
            wave=wave,
            status=status,
            update=m.UpdateOutcome(update="bench", outcome="succeeded", seconds=1.0) if over else None,
            overhead_s=0.05 if over else None,
            at=at,
        )

    def _wave(
        self, rollout: str, waves: list[m.WaveState], planned: m.WaveState, status: Any, at: datetime
    ) -> Iterator[Delivery]:
        fact = m.WaveChanged(
            rollout=rollout, wave=planned.wave, status=status, domains=planned.domains, at=at
        )
        yield self._sent(fact, rollout=rollout, wave=planned.wave)
        begun = all(wave.status == "pending" for wave in waves)
        waves[planned.wave] = replace(planned, status=status)
        whole = whole_rollout(rollout, waves, update="bench", sets=tuple(planned.domains), created_at=at)
        for message, parameters in sent(whole):
            # As a coordinator does: all waves once, then those that changed.
            if begun or not isinstance(message, m.WaveState) or message.wave == planned.wave:
                yield self._sent(message, **parameters)
        for group in planned.domains:
            if status in {"scheduled", "started", "completed"}:
                changed = m.EventChanged(
                    event_id=f"{rollout}-{planned.wave}-{group}",
                    set=group,
                    event_type="Freeze",
                    status=status,
                    resources=(group,),
                    incarnation=1,
                    not_before=at + timedelta(seconds=900),
                    at=at,
                )
                yield self._sent(changed, set=group, status=status)

    def _of_vm(
        self, kind: Any, rollout: str, vm: str, group: str, domain: int, host: str, at: datetime, **told: Any
    ) -> Delivery:
        message = kind(
            vm=vm, host=host, set=group, update_domain=domain, operation=f"{rollout}-{host}", at=at, **told
        )
        return self._sent(message, host=host, set=group, ud=domain, vm=vm)
