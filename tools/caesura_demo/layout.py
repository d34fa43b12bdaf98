"""The parts of the demo: hosts, VMs in sets and update domains, and the files that describe them. Pure."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

UPDATE = "hypervisor-patch"
VM_RAM_BYTES = 1 << 20


class Broker(msgspec.Struct, frozen=True):
    """The broker of all services, and its protocol."""

    url: str
    protocol: str
    passwords: str = ""
    """Folder with a password file for each user of the broker, named after the user; empty: no passwords."""


class DemoVm(msgspec.Struct, frozen=True, kw_only=True):
    """One VM of the demo. ``port`` is where its metadata service listens, on ``metadata_host``."""

    name: str
    host: str
    set: str = ""
    update_domain: int = 0
    fault_domain: int = 0
    port: int
    metadata_host: str = "127.0.0.1"

    @property
    def metadata_url(self) -> str:
        """Where its workload polls for scheduled events."""
        return f"http://{self.metadata_host}:{self.port}/metadata/scheduledevents?api-version=2020-07-01"


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The whole fleet."""

    vms: tuple[DemoVm, ...]

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host names in order."""
        return tuple(dict.fromkeys(vm.host for vm in self.vms))

    def on(self, host: str) -> tuple[DemoVm, ...]:
        """The VMs of one host."""
        return tuple(vm for vm in self.vms if vm.host == host)


def standard_layout(ports: Sequence[int]) -> Layout:
    """Six hosts, 24 VMs in two sets of three update domains, and one VM in no set.

    Two hosts make up an update domain; each holds two VMs of each set. Needs 25 ports.
    """
    return Layout(vms=tuple(_vms(iter(ports))))


def small_layout(ports: Sequence[int], count: int) -> Layout:
    """Up to six hosts in three update domains; the first VM of each is of set ``web``, further ones of set ``db``.

    Needs ``count`` ports.
    """
    hosts = min(6, count)
    domains = min(3, hosts)
    vms = []
    for index in range(count):
        host = index % hosts
        name, number = ("web", index + 1) if index < hosts else ("db", index - hosts + 1)
        # The few VMs of the second set go to every other host, so that they spread over the domains.
        if index >= hosts:
            host = (
                ((index - hosts) * 2 + 1) % hosts
                if index - hosts < hosts // 2
                else ((index - hosts) * 2) % hosts
            )
        vms.append(
            DemoVm(
                name=f"{name}-{number}",
                host=f"host-{host + 1}",
                set=name,
                update_domain=host * domains // hosts,
                fault_domain=host % 2,
                port=ports[index],
            )
        )
    return Layout(vms=tuple(vms))


def _vms(ports: Iterator[int]) -> Iterator[DemoVm]:
    for number in range(6):
        for name in ("web", "db"):
            for copy in range(2):
                yield DemoVm(
                    name=f"{name}-{number * 2 + copy + 1:02d}",
                    host=f"host-{number + 1}",
                    set=name,
                    update_domain=number // 2,
                    fault_domain=number % 2,
                    port=next(ports),
                )
    yield DemoVm(name="cache-01", host="host-6", port=next(ports))


def host_file(
    layout: Layout, host: str, *, broker: Broker, folder: str, freezer: str, run_id: str
) -> dict[str, Any]:
    """The host file of one host, as a table for TOML."""
    return {
        "host": host,
        "driver": "process",
        "process": {"freezer": freezer},
        "vm": [_vm_table(vm, broker=broker, folder=folder, run_id=run_id) for vm in layout.on(host)],
    }


def _vm_table(vm: DemoVm, *, broker: Broker, folder: str, run_id: str) -> dict[str, Any]:
    agent: dict[str, str] = {
        "CAESURA_VM_AGENT_VM": vm.name,
        "CAESURA_VM_AGENT_BROKER_URL": broker.url,
        "CAESURA_VM_AGENT_BROKER_PROTOCOL": broker.protocol,
        "CAESURA_VM_AGENT_CLOCK": "simulated",
        "CAESURA_VM_AGENT_CANARY_BYTES": "1048576",  # 25 agents share one machine
        "CAESURA_VM_AGENT_LOG_LEVEL": "warning",
        "CAESURA_VM_AGENT_UPDATE_DOMAIN": str(vm.update_domain),
        "CAESURA_DEMO_RUN": run_id,
    }
    if broker.passwords:
        agent["CAESURA_VM_AGENT_BROKER_USERNAME"] = f"vm_{vm.name}"
        agent["CAESURA_VM_AGENT_BROKER_PASSWORD_FILE"] = f"{broker.passwords}/vm_{vm.name}"
    table: dict[str, Any] = {"name": vm.name, "fault_domain": vm.fault_domain, "ram_bytes": VM_RAM_BYTES}
    if vm.set:
        agent["CAESURA_VM_AGENT_SET"] = vm.set
        table |= {"set": vm.set, "update_domain": vm.update_domain}
    workload = {
        "CAESURA_DEMO_RUN": run_id,
        "CAESURA_DEMO_VM": vm.name,
        "CAESURA_DEMO_URL": vm.metadata_url,
        "CAESURA_DEMO_STATUS": f"{folder}/workloads/{vm.name}.json",
    }
    table["process"] = [
        {"argv": [sys.executable, "-m", "caesura_vm_agent"], "environ": agent},
        {"argv": [sys.executable, "-m", "caesura_demo.workload"], "environ": workload},
    ]
    return table


def listeners_file(layout: Layout) -> dict[str, Any]:
    """Maps each VM to its metadata port."""
    return {"listener": [{"vm": vm.name, "listen": f"{vm.metadata_host}:{vm.port}"} for vm in layout.vms]}


def update_file(*, folder: str, seconds: float) -> dict[str, Any]:
    """The update that the demo rolls out: it takes some time and records which host it patched."""
    return {
        "name": UPDATE,
        "version": "1.0.1",
        "impact": "pause",
        "scope": "host",
        "expected_s": seconds,
        "timeout_s": seconds + 4.0,
        "description": "Represents a hypervisor update: takes some time and records the host.",
        "argv": [sys.executable, "-m", "caesura_demo.patch", str(seconds), f"{folder}/patched"],
    }


def service_environments(
    layout: Layout,
    *,
    broker: Broker,
    folder: str,
    ports: Mapping[str, int],
    of_hosts: Mapping[str, str] | None = None,
) -> dict[str, tuple[str, dict[str, str]]]:
    """Maps a process name to (module, environment) for every service, in start order.

    ``of_hosts``: further settings of the host updaters, without their prefix.
    """

    def common(name: str, prefix: str) -> dict[str, str]:
        return {
            f"{prefix}BROKER_URL": broker.url,
            f"{prefix}BROKER_PROTOCOL": broker.protocol,
            f"{prefix}HEALTH_LISTEN": f"unix:{folder}/{name}.health",
            f"{prefix}LOG_FORMAT": "json",
        }

    found: dict[str, tuple[str, dict[str, str]]] = {
        "coordinator": (
            "caesura_coordinator",
            common("coordinator", "CAESURA_COORDINATOR_")
            | {"CAESURA_COORDINATOR_STATE_DIR": f"{folder}/coordinator"},
        )
    }
    for host in layout.hosts:
        prefix = "CAESURA_HOST_UPDATER_"
        found[host] = (
            "caesura_host_updater",
            common(host, prefix)
            | {
                f"{prefix}HOST_FILE": f"{folder}/{host}.toml",
                f"{prefix}STATE_DIR": f"{folder}/{host}",
                f"{prefix}UPDATES_DIR": f"{folder}/updates.d",
                f"{prefix}STOP_VMS_ON_EXIT": "true",
                **{f"{prefix}{name}": value for name, value in (of_hosts or {}).items()},
            },
        )
    found["metadata"] = (
        "caesura_metadata_publisher",
        common("metadata", "CAESURA_METADATA_PUBLISHER_")
        | {"CAESURA_METADATA_PUBLISHER_LISTENERS_FILE": f"{folder}/listeners.toml"},
    )
    exporter = common("exporter", "CAESURA_METRICS_EXPORTER_")
    del exporter["CAESURA_METRICS_EXPORTER_HEALTH_LISTEN"]
    found["exporter"] = (
        "caesura_metrics_exporter",
        exporter | {"CAESURA_METRICS_EXPORTER_LISTEN": f"127.0.0.1:{ports['exporter']}"},
    )
    return found
