"""*Suite health*: the bus, the services, the exporter itself, and the firing alerts."""

from __future__ import annotations

from grafana.generate.page import page, scrape_choices
from grafana.generate.panels import NONE_WANTED, Ask, Panel, Size, curve, named, number, rows, timeline
from grafana.generate.queries import OURS, SCRAPED, is_, of
from grafana_foundation_sdk.models.dashboard import Dashboard

_BY_SERVICE = "{{instance}}"
_SILENT_S = 60
"""s: hosts and the coordinator send a message every 20 s; the rules use the same bound."""
_HOSTS = (
    f"max by (host) ({of('caesura_host_online', SCRAPED)}) "
    f"* on (host) (min by (host) ({of('caesura_host_heard_seconds', SCRAPED)}) <= bool {_SILENT_S})"
)
_NO_AGENT = 'state=~"offline|silent"'
_GUARDS = (("ready", "green"), ("armed", "orange"), ("absent", "red"))


def _each(metric: str, legend: str = _BY_SERVICE, *, scope: tuple[str, ...] = SCRAPED) -> Ask:
    return Ask(f"max by (job, instance) ({of(metric, scope)})", legend)


def _rate(metric: str, legend: str, *labels: str) -> Ask:
    by = ", ".join(("job", "instance", *labels))
    return Ask(f"sum by ({by}) (rate({of(metric, SCRAPED)}[$__rate_interval]))", legend)


def _now() -> list[Panel]:
    return [
        number(
            "Alerts",
            "Firing alerts of the rules in deploy/prometheus/rules, of this fleet or of none.",
            Ask('count(ALERTS{alertstate="firing", alertname=~"Caesura.+", fleet=~"|$fleet"}) or vector(0)'),
            steps=NONE_WANTED,
        ),
        number(
            "Targets down",
            "Services that Prometheus cannot scrape.",
            Ask(f"sum(1 - {of('up', OURS)})"),
            steps=NONE_WANTED,
        ),
        number(
            "Without the broker",
            "Services that are not connected to the broker.",
            Ask(f"sum(1 - {of('caesura_bus_connected', SCRAPED)})"),
            steps=NONE_WANTED,
        ),
        number(
            "Coordinator",
            "Whether the coordinator is on the bus and was received in the last minute.",
            Ask(
                f"max({of('caesura_coordinator_online', SCRAPED)}) "
                f"* (min({of('caesura_coordinator_heard_seconds', SCRAPED)}) <= bool {_SILENT_S})"
            ),
            words=named({1: ("online", "green"), 0: ("offline", "red")}),
        ),
        number(
            "Hosts offline",
            "Host updaters that are not on the bus, or from which nothing was received for a minute.",
            Ask(f"sum(1 - {_HOSTS})"),
            steps=NONE_WANTED,
        ),
        number(
            "Agents silent",
            "VMs in which an agent is expected but offline or silent. A frozen one is silent too.",
            Ask(
                f"sum(max by (set) (sum by (set, job, instance) ({of('caesura_agents', SCRAPED, _NO_AGENT)})))"
            ),
            steps=((None, "green"), (1, "orange")),
        ),
    ]


def _services() -> list[Panel]:
    guards = "\n  or ".join(
        f"{of('caesura_host_guard_state', SCRAPED, is_('state', name))} * {number}"
        for number, (name, _) in enumerate(_GUARDS)
    )
    return [
        rows(
            "Firing alerts",
            "The alerts firing now; each alert's page in docs/operate/runbooks says what to do.",
            Ask('ALERTS{alertstate="firing", alertname=~"Caesura.+", fleet=~"|$fleet"}'),
            size=Size(12, 8),
            columns={
                "alertname": "Alert",
                "severity": "Severity",
                "set": "Set",
                "update_domain": "Domain",
                "host": "Host",
                "instance": "Instance",
            },
            nothing="No alert fires",
        ),
        timeline(
            "Connected to the broker",
            "Each service's own connection.",
            _each("caesura_bus_connected"),
            size=Size(12, 8),
            words=named({1: ("connected", "green"), 0: ("not connected", "red")}),
        ),
        timeline(
            "Host updaters on the bus",
            "As received by the exporter; also offline if nothing was received for a minute.",
            Ask(_HOSTS, "{{host}}"),
            size=Size(12, 7),
            words=named({1: ("online", "green"), 0: ("offline", "red")}),
        ),
        timeline(
            "Pause guards",
            "Ready, armed while VMs may be frozen, or absent: then its updater does not freeze VMs.",
            Ask(f"max by (host) (sum by (host, job, instance) (\n  {guards}\n))", "{{host}}"),
            size=Size(12, 7),
            words=named({code: (name, colour) for code, (name, colour) in enumerate(_GUARDS)}),
        ),
    ]


def _bus() -> list[Panel]:
    return [
        curve(
            "Messages by type",
            "Messages per second that the exporter read.",
            Ask(
                f"max by (type) (rate({of('caesura_messages_total', SCRAPED)}[$__rate_interval]))",
                "{{type}}",
            ),
            unit="cps",
            many=True,
            stacked=True,
        ),
        curve(
            "Received and published",
            "Messages per second of each service.",
            _rate("caesura_bus_received_total", f"{_BY_SERVICE} received"),
            _rate("caesura_bus_published_total", f"{_BY_SERVICE} published"),
            unit="cps",
            many=True,
        ),
        curve(
            "Went wrong",
            "Messages per second that a service refused, dropped, or could not publish.",
            _rate("caesura_bus_decode_errors_total", f"{_BY_SERVICE} refused: {{{{kind}}}}", "kind"),
            _rate("caesura_bus_dropped_total", f"{_BY_SERVICE} dropped"),
            _rate("caesura_bus_publish_failures_total", f"{_BY_SERVICE} not published"),
            unit="cps",
            many=True,
        ),
        curve(
            "Waiting",
            "Messages received but not handled, and facts that the broker has not accepted.",
            _each("caesura_bus_backlog_messages", f"{_BY_SERVICE} to be handled"),
            _each("caesura_coordinator_outbox_messages", f"{_BY_SERVICE} to be sent"),
            _each("caesura_host_updater_outbox_messages", f"{_BY_SERVICE} to be sent"),
            many=True,
        ),
    ]


def _own() -> list[Panel]:
    handled = of("caesura_exporter_handler_seconds_bucket", SCRAPED)
    return [
        number(
            "Last message",
            "Seconds since the exporter received any message; hosts send one every 20 s.",
            Ask(f"time() - max({of('caesura_exporter_last_message_timestamp_seconds', SCRAPED)} > 0)"),
            size=Size(6, 7),
            unit="s",
            decimals=0,
            steps=((None, "green"), (60, "orange"), (300, "red")),
        ),
        curve(
            "Scrapes",
            "Seconds that Prometheus waited for each service's page.",
            _each("scrape_duration_seconds", scope=OURS),
            size=Size(9, 7),
            many=True,
            unit="s",
        ),
        curve(
            "Series",
            "Samples on each service's page: their number depends on sets, domains and hosts, not on VMs.",
            _each("scrape_samples_post_metric_relabeling", scope=OURS),
            size=Size(9, 7),
            many=True,
        ),
        curve(
            "Handling a message",
            "The exporter handled 99 of 100 messages faster than this.",
            Ask(
                "histogram_quantile(0.99, "
                f"sum by (job, instance, le) (rate({handled}[$__rate_interval]))) >= 0",
                "{{instance}}",
            ),
            size=Size(8, 7),
            unit="s",
        ),
        curve(
            "Memory of the exporter",
            "Resident memory.",
            Ask(
                f"max by (job, instance) ({of('process_resident_memory_bytes', SCRAPED)} "
                f"and on (job, instance) {of('caesura_exporter_build_info', SCRAPED)})",
                "{{instance}}",
            ),
            size=Size(8, 7),
            unit="bytes",
        ),
        curve(
            "Requests of workloads",
            "HTTP requests per second that metadata publishers answered, by status.",
            _rate(
                "caesura_metadata_requests_total",
                "{{instance}} {{endpoint}} {{status}}",
                "endpoint",
                "status",
            ),
            size=Size(8, 7),
            unit="reqps",
        ),
    ]


def health() -> Dashboard:
    """The dashboard for the operators of the suite itself."""
    return page(
        "Suite health",
        "caesura-suite-health",
        "The bus, the services, the exporter, and the firing alerts.",
        scrape_choices("up", 'job=~"caesura-.+"'),
        [("", _now()), ("Services", _services()), ("Bus", _bus()), ("Exporter and publishers", _own())],
    )
