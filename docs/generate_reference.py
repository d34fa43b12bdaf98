"""Fills the marked regions of the pages in ``docs/reference`` from the code: settings, probes, metrics, exit codes.

``python docs/generate_reference.py --write`` writes them, ``--check`` fails when one is stale. Nothing here
lists what the code already knows: settings come from their structs, metrics from the collectors that serve
them, pings from the services' own composition roots.
"""

# ruff: noqa: INP001 - a script for developers, not a package

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

import caesura_coordinator.__main__ as coordinator_main
import caesura_metadata_publisher.__main__ as publisher_main
import caesura_metrics_exporter.__main__ as exporter_main
import caesura_vm_agent.__main__ as agent_main
from caesura.bus.memory import MemoryBroker, MemoryBus
from caesura.bus.metrics import bus_families
from caesura.bus.port import BusStats, Delivery
from caesura.contract.examples import examples
from caesura.contract.generated import golden_payload
from caesura.contract.messages import AgentClockSynced, OperationReported
from caesura.contract.reasons import DESCRIPTIONS, TRANSIENT
from caesura.contract.topics import channel_of
from caesura.runtime.command import EXIT_CONFIG, EXIT_INTERRUPTED
from caesura.runtime.errors import CaesuraError
from caesura.runtime.settings import ServiceSettings, describe_settings
from caesura_coordinator.leadership import LeadershipLost
from caesura_coordinator.metrics import CoordinatorCollector
from caesura_coordinator.service import Coordinator
from caesura_coordinator.settings import CoordinatorSettings
from caesura_coordinator.store import CoordinatorStore
from caesura_ctl.errors import EXIT_CODES
from caesura_ctl.settings import CtlSettings
from caesura_host_updater.drivers.process.driver import ProcessDriver
from caesura_host_updater.drivers.process.freezers import SignalFreezer
from caesura_host_updater.guard_client import GuardClient
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.journal import JournalThread
from caesura_host_updater.metrics import HostMetrics
from caesura_host_updater.pause_markers import PauseMarkers
from caesura_host_updater.service import HostUpdater
from caesura_host_updater.settings import HostUpdaterSettings
from caesura_metadata_publisher.metrics import PublisherCollector
from caesura_metadata_publisher.service import MetadataPublisher
from caesura_metadata_publisher.settings import MetadataPublisherSettings
from caesura_metrics_exporter.service import MetricsExporter
from caesura_metrics_exporter.settings import MetricsExporterSettings
from caesura_vm_agent.guest_clock import SimulatedClock
from caesura_vm_agent.metrics import AgentCollector
from caesura_vm_agent.service import VmAgent
from caesura_vm_agent.settings import VmAgentSettings

SERVICES: Mapping[str, type[ServiceSettings]] = {
    "coordinator": CoordinatorSettings,
    "host-updater": HostUpdaterSettings,
    "metadata-publisher": MetadataPublisherSettings,
    "metrics-exporter": MetricsExporterSettings,
    "vm-agent": VmAgentSettings,
    "ctl": CtlSettings,
}
PINGS = {
    "broker": "connected to the broker",
    "store": "the SQLite store can be read",
    "journal": "the last write to the SQLite journal succeeded",
    "driver": "every VM of the host file runs",
    "host clock": "guests may be set by the host's clock; after a change of its kernel that may need an NTP client first",
    "guard": "the pause guard is connected",
    "pauses": "no VM is paused by somebody else",
    "inventory": "the inventory can be published: without its VMs it fits into a message",
    "updates": "the folder of updates answers",
    "outbox": "the broker refuses no message that must be published",
    "documents": "every VM of the listeners file has a document to be shown",
}


def prefix_of(name: str) -> str:
    """The prefix of a service's variables, as ``run_service`` makes it."""
    return f"CAESURA_{name.upper().replace('-', '_')}_"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """``text`` as code, nothing if it is empty."""
    return f"`{text}`" if text else ""


# -- settings -------------------------------------------------------------------------------------------------


def settings_tables() -> str:
    """What all services share once, then what each one has of its own."""
    shared = describe_settings(ServiceSettings, "CAESURA_<SERVICE>_")
    parts = ["## Every service", _settings(shared)]
    for name, settings in SERVICES.items():
        prefix = prefix_of(name)
        common = describe_settings(ServiceSettings, prefix)
        own = [row for row in describe_settings(settings, prefix) if row not in common]
        command = "caesura" if name == "ctl" else f"caesura-{name}"
        parts += [f"## `{command}` (`{prefix}`)", _settings(own)]
    return "\n\n".join(parts)


def _settings(rows: Iterable[tuple[str, str, str]]) -> str:
    return table(
        ["Variable", "Default", "What"],
        (
            [code(name), "**required**" if default == "required" else code(default), text]
            for name, default, text in rows
        ),
    )


# -- probes ---------------------------------------------------------------------------------------------------


class Pings(Exception):
    """The named pings that a composition root was about to serve."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(names)
        super().__init__(", ".join(self.names))


def _tell(_listen: str, pings: Mapping[str, object], _registry: object, **_: object) -> NoReturn:
    raise Pings(pings)


def pings_of(main: Callable[[Any], Coroutine[Any, Any, None]], settings: ServiceSettings) -> list[str]:
    """The pings of a service: its composition root is run up to the moment when it would serve them."""
    where = sys.modules[main.__module__]
    target = f"{where.__name__}.serve_health" if hasattr(where, "serve_health") else _HEALTH
    with patch(target, _tell):
        try:
            asyncio.run(main(settings))
        except Pings as told:
            return told.names
    raise AssertionError(f"{main.__module__} serves no health")


_HEALTH = "caesura.runtime.health.serve_health"


async def _updater_pings(folder: Path) -> list[str]:
    # Its composition root starts VMs and a guard before it serves, so the service is asked instead.
    return sorted(_host_updater(folder, CollectorRegistry()).pings())


def probes_table() -> str:
    """Who answers where, and which pings make up ``/ready``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listeners = folder / "listeners.toml"
        listeners.write_text('[[listener]]\nvm = "web-1"\nlisten = "127.0.0.1:0"\n', encoding="utf-8")
        coordinator = CoordinatorSettings(state_dir=f"{folder}/coordinator")
        publisher = MetadataPublisherSettings(listeners_file=str(listeners))
        exporter = MetricsExporterSettings()
        agent = VmAgentSettings(vm="web-1", clock="simulated")
        updater = HostUpdaterSettings(host_file="")
        found = {
            "coordinator": (coordinator.health_listen, pings_of(coordinator_main.run, coordinator)),
            "host-updater": (updater.health_listen, asyncio.run(_updater_pings(folder))),
            "metadata-publisher": (publisher.health_listen, pings_of(publisher_main._main, publisher)),  # noqa: SLF001
            "metrics-exporter": (exporter.listen, pings_of(exporter_main._main, exporter)),  # noqa: SLF001
            "vm-agent": (
                agent.health_listen,
                pings_of(agent_main._main, VmAgentSettings(vm="web-1", clock="simulated", health_listen=":")),  # noqa: SLF001
            ),
        }
    return table(
        ["Service", "Listens by default on", "Ready when"],
        (
            [
                code(f"caesura-{service}"),
                code(listen) or "nowhere",
                "; ".join(f"{code(ping)}: {PINGS[ping]}" for ping in pings),
            ]
            for service, (listen, pings) in found.items()
        ),
    )


# -- metrics --------------------------------------------------------------------------------------------------


def _host_updater(folder: Path, registry: CollectorRegistry) -> HostUpdater:
    host = HostFile(host="host-1")
    metrics = HostMetrics(registry)
    updater = HostUpdater(
        HostUpdaterSettings(host_file=""),
        host,
        bus=_bus(),
        driver=ProcessDriver(host.host, (), folder, SignalFreezer(), environ={}, max_digest_bytes=0),
        guard=GuardClient(folder, spawn=False),
        journal=JournalThread(),
        metrics=metrics,
        pauses=PauseMarkers(folder),
        instance="example",
        environ={},
    )
    updater.show_gauges()
    metrics.finished(_example(OperationReported), None)
    return updater


def _bus() -> MemoryBus:
    return MemoryBus(MemoryBroker(), client_id="reference", filters=())


def _example(kind: type[Any]) -> Any:
    return next(each.message for each in examples() if isinstance(each.message, kind))


async def families(folder: Path) -> dict[str, list[Metric]]:
    """Service to its metric families, each from the collector that the service registers."""
    exporter = MetricsExporter(MetricsExporterSettings(), _bus())
    for number, example in enumerate(examples()):
        topic = channel_of(type(example.message)).topic(**example.parameters)
        await exporter.deliver(Delivery(topic, golden_payload(number)))
    coordinator = Coordinator(_bus(), CoordinatorStore(":memory:"), instance="example", settle_s=0.0)
    publisher_bus, agent_bus = _bus(), _bus()
    publisher = MetadataPublisher(MetadataPublisherSettings(listeners_file=""), publisher_bus)
    agent = VmAgent(VmAgentSettings(vm="web-1"), agent_bus, SimulatedClock(), "example")
    agent.last_sync = _example(AgentClockSynced)
    updater_registry = CollectorRegistry()
    _host_updater(folder, updater_registry)
    return {
        "metrics-exporter": list(exporter.collector().collect()),
        "coordinator": list(CoordinatorCollector(coordinator).collect()),
        "host-updater": list(updater_registry.collect()),
        "metadata-publisher": list(PublisherCollector(publisher, publisher_bus).collect()),
        "vm-agent": list(AgentCollector(agent, agent_bus).collect()),
    }


def metrics_tables() -> str:
    """The metrics that all services share once, then each one's own."""
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(families(Path(name)))
    shared = [metric_row(each) for each in bus_families(BusStats(), {})]
    parts = ["## Every service", _metrics(shared)]
    for service, metrics in found.items():
        own = [row for row in map(metric_row, metrics) if row not in shared]
        parts += [f"## `caesura-{service}`", _metrics(own)]
    return "\n\n".join(parts)


def _metrics(rows: Iterable[list[str]]) -> str:
    return table(["Metric", "Type", "Labels", "What"], sorted(rows))


def metric_row(metric: Metric) -> list[str]:
    """Name as it is scraped, type, labels, help."""
    labels = {label for sample in metric.samples for label in sample.labels if label != "le"}
    declared: Sequence[str] = getattr(metric, "_labelnames", ())
    ordered = [*declared, *sorted(labels - set(declared))]
    name = metric.name + ("_total" if metric.type == "counter" else "")
    return [code(name), metric.type, ", ".join(map(code, ordered)), metric.documentation]


# -- exit codes -----------------------------------------------------------------------------------------------


def exit_codes() -> str:
    """What the services end with, and the operator's command."""
    services = [
        ["0", "all", "Told to stop by a signal, and drained."],
        [str(CaesuraError.exit_code), "all", "Failed; the last line of the log says why."],
        [
            str(EXIT_CONFIG),
            "all",
            "The configuration or the command line is wrong, or the state folder is of a newer version; nothing was started.",
        ],
        [str(LeadershipLost.exit_code), code("caesura-coordinator"), (LeadershipLost.__doc__ or "").strip()],
        [str(EXIT_INTERRUPTED), "all", "Interrupted before it was up."],
    ]
    operator = [line.strip().partition("  ") for line in EXIT_CODES.splitlines()[1:]]
    return "\n\n".join(
        [
            table(["Code", "Service", "Meaning"], services),
            table(
                [f"Code of {code('caesura')}", "Meaning"], [[number, text] for number, _, text in operator]
            ),
        ]
    )


def reason_codes() -> str:
    """The vocabulary, and which of it a rollout may be resumed after without a person."""
    return table(
        ["Code", "Transient", "Meaning"],
        [[code(each), "yes" if each in TRANSIENT else "", text] for each, text in DESCRIPTIONS.items()],
    )


# -- the pages ------------------------------------------------------------------------------------------------

PAGES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "settings.md": ("settings", settings_tables),
    "probes.md": ("probes", probes_table),
    "metrics.md": ("metrics", metrics_tables),
    "reason-codes.md": ("reason codes", reason_codes),
    "exit-codes.md": ("exit codes", exit_codes),
}
"""Page to the name of its region and what makes it."""


def filled(text: str, name: str, made: str) -> str:
    """``text`` with the region ``name`` as it must be now.

    Raises:
        SystemExit: a mark is missing.
    """
    start, end = f"<!-- reference: {name} -->", f"<!-- /reference: {name} -->"
    before, opened, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise SystemExit(f"the marks {start} and {end} are missing")
    return f"{before}{start}\n\n{made}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. 0 fresh or written, 1 stale."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write the regions")
    mode.add_argument("--check", action="store_true", help="fail when a region is stale")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).with_name("reference"), help="where the pages are"
    )
    arguments = parser.parse_args(argv)
    stale = []
    for file, (name, make) in PAGES.items():
        page: Path = arguments.folder / file
        text = page.read_text(encoding="utf-8")
        fresh = filled(text, name, make())
        if fresh != text:
            stale.append(name)
            if arguments.write:
                page.write_text(fresh, encoding="utf-8")
    if stale and arguments.check:
        sys.stderr.write(
            f"stale in {arguments.folder}: {', '.join(stale)}; run: python docs/generate_reference.py --write\n"
        )
        return 1
    sys.stdout.write(
        f"{'wrote' if arguments.write else 'checked'} {len(PAGES)} pages, {len(stale)} changed\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
