"""``caesura-metrics-exporter``: the composition root of the metrics exporter."""

from __future__ import annotations

from caesura.runtime.interrupt import QuietInterrupt

with QuietInterrupt():
    import sys
    from socket import gethostname

    from prometheus_client import CollectorRegistry, ProcessCollector

    from caesura.bus.mqtt import MqttBus
    from caesura.bus.options import check_broker, options_from
    from caesura.bus.rates import Rates
    from caesura.runtime.command import run_service
    from caesura.runtime.health import serve_health
    from caesura.runtime.listen import check_health_address, parse_listen
    from caesura.runtime.serve import serve
    from caesura_metrics_exporter.live.page import LivePage
    from caesura_metrics_exporter.metrics.scrape import Scrape
    from caesura_metrics_exporter.service import MetricsExporter, filters
    from caesura_metrics_exporter.settings import MetricsExporterSettings


def main() -> int:
    """The console script."""
    return run_service(
        "metrics-exporter",
        "Reads everything on the bus and serves it as Prometheus metrics and as a live page.",
        MetricsExporterSettings,
        _main,
        checks=(_check_address, check_broker, check_health_address),
    )


def _check_address(settings: MetricsExporterSettings) -> None:
    if settings.listen:
        parse_listen(settings.listen)


async def _main(settings: MetricsExporterSettings) -> None:
    # A persistent session: facts sent while the exporter restarts are counted afterwards.
    options = options_from(settings, client_id=f"caesura-metrics-{settings.instance}", clean=False)
    bus = MqttBus(options, filters=filters(), rates=Rates())
    exporter = MetricsExporter(settings, bus)
    registry = CollectorRegistry()
    process, collector = ProcessCollector(registry=registry), exporter.collector()
    registry.register(collector)
    scrape = Scrape(collector, [process], fleet=settings.fleet)
    pings = {"broker": exporter.broker_ping}
    page = LivePage(exporter.stream, page_hosts=(*settings.page_hosts, gethostname()))
    async with (
        serve_health(settings.listen, pings, registry, extend=page.extend, metrics=scrape.handle),
        serve_health(settings.health_listen, pings, registry, metrics=scrape.handle),
    ):
        await serve(
            {
                "bus": exporter.run_bus,
                "live": exporter.stream.run,
                "resync": exporter.resync.run,
            },
            drain=exporter.drain,
        )


if __name__ == "__main__":
    sys.exit(main())
