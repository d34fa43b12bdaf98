"""What a host says of another host's VM: counted, named, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry

from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.port import Delivery
from caesura.contract import messages as m
from caesura.contract.codec import encode
from caesura.contract.envelope import Message
from caesura.contract.topics import channel_of
from caesura.runtime.identity import new_id
from caesura_metrics_exporter.service import MetricsExporter
from caesura_metrics_exporter.settings import MetricsExporterSettings

NOW = datetime.now(UTC)


class Scene:
    """An exporter that is fed by hand."""

    def __init__(self) -> None:
        self.exporter = MetricsExporter(MetricsExporterSettings(), MemoryBus(MemoryBroker()))
        self.registry = CollectorRegistry()
        self.registry.register(self.exporter.collector())

    async def say(self, message: Message, **place: str | int) -> None:
        payload = encode(message, source="/test", event_id=new_id(), time=NOW)
        await self.exporter.deliver(Delivery(channel_of(type(message)).topic(**place), payload))

    async def clear(self, message: type[Message], **place: str) -> None:
        await self.exporter.deliver(Delivery(channel_of(message).topic(**place), b""))

    async def has(self, host: str, *vms: m.VmRecord) -> None:
        await self.say(m.HostInventory(host=host, driver="process", epoch=1, vms=vms), host=host)

    async def owns(self, host: str, vm: str, *rivals: str) -> None:
        await self.say(m.VmOwner(vm=vm, host=host, epoch=1, contested_by=rivals), vm=vm)

    async def freezes(self, host: str, vm: str, set_name: str, domain: int) -> None:
        await self.say(
            m.VmFrozen(
                vm=vm,
                host=host,
                set=set_name,
                update_domain=domain,
                operation=new_id(),
                method="freeze",
                budget_s=5.0,
                at=NOW,
            ),
            host=host,
            set=set_name,
            ud=domain,
            vm=vm,
        )

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def alarms(self) -> list[tuple[str, bool]]:
        fleet: Any = self.exporter.live.snapshot(NOW.timestamp()).fleet
        return [(each.rule, each.until is None) for each in fleet.alarms]


def vm(name: str, set_name: str = "web", domain: int = 0, state: m.VmState = "running") -> m.VmRecord:
    return m.VmRecord(vm=name, set=set_name, update_domain=domain, state=state, methods=("freeze",))


async def test_a_foreign_freeze_is_no_pause_and_no_second_domain() -> None:
    scene = Scene()
    await scene.has("h1", vm("web-1"), vm("web-2", domain=1))
    await scene.owns("h1", "web-1")
    await scene.freezes("h1", "web-1", "web", 0)
    assert scene.value("caesura_domains_paused", set="web") == 1
    await scene.has("h2", vm("web-2", domain=1, state="paused"), vm("db-1", "db"))
    await scene.owns("h1", "web-2", "h2")
    await scene.freezes("h2", "web-2", "web", 1)
    assert scene.value("caesura_domains_paused", set="web") == 1
    assert scene.value("caesura_domain_clashes_total", set="web") == 0
    assert scene.value("caesura_foreign_facts_total", host="h2") == 1
    assert scene.value("caesura_foreign_facts_total", host="h1") == 0
    assert scene.value("caesura_host_foreign_vms", host="h2") == 1
    assert scene.value("caesura_host_foreign_vms", host="h1") == 0
    assert scene.value("caesura_vms", set="web", update_domain="1", state="running") == 1
    assert scene.alarms() == [("owner", True)]


async def test_the_record_counts_whenever_it_comes() -> None:
    scene = Scene()
    await scene.has("h2", vm("web-1", "mine", 7))
    assert scene.value("caesura_vms", set="mine", update_domain="7", state="running") == 1
    await scene.has("h1", vm("web-1"))
    assert scene.value("caesura_vms", set="mine", update_domain="7", state="running") is None
    await scene.owns("h1", "web-1", "h2")
    assert scene.value("caesura_vms", set="mine", update_domain="7", state="running") is None
    assert scene.value("caesura_vms", set="web", update_domain="0", state="running") == 1
    assert scene.value("caesura_host_foreign_vms", host="h2") == 1
    await scene.has("h2")
    await scene.owns("h1", "web-1")
    assert scene.value("caesura_host_foreign_vms", host="h2") == 0
    assert scene.alarms() == [("owner", False)]
    await scene.has("h1")
    await scene.clear(m.VmOwner, vm="web-1")
    await scene.has("h2", vm("web-1", "mine", 7))
    assert scene.value("caesura_vms", set="mine", update_domain="7", state="running") == 1
