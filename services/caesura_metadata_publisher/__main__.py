"""``caesura-metadata-publisher``: the composition root of the metadata publisher."""

from __future__ import annotations

from caesura.runtime.interrupt import QuietInterrupt

with QuietInterrupt():
    import os
    import sys

    from prometheus_client import CollectorRegistry

    from caesura.bus.mqtt import MqttBus
    from caesura.bus.options import check_broker, options_from
    from caesura.bus.presence import last_will
    from caesura.contract.envelope import source_of
    from caesura.runtime.activation import inherited_sockets
    from caesura.runtime.command import run_service
    from caesura.runtime.full_collections import rare_full_collections
    from caesura.runtime.health import serve_health
    from caesura.runtime.listen import check_health_address
    from caesura.runtime.serve import serve
    from caesura_metadata_publisher.http import serve_metadata
    from caesura_metadata_publisher.listeners import read_listeners
    from caesura_metadata_publisher.metrics import PublisherCollector
    from caesura_metadata_publisher.service import MetadataPublisher, filters, presence
    from caesura_metadata_publisher.settings import MetadataPublisherSettings


def main() -> int:
    """The console script."""
    return run_service(
        "metadata-publisher",
        "Serves scheduled events, approvals and instance metadata to the workloads in the VMs.",
        MetadataPublisherSettings,
        _main,
        checks=(
            lambda settings: read_listeners(settings.listeners_file),
            check_broker,
            check_health_address,
        ),
    )


async def _main(settings: MetadataPublisherSettings) -> None:
    inherited = inherited_sockets(os.environ)
    listeners = read_listeners(settings.listeners_file)
    bus = MqttBus(
        options_from(settings, client_id=f"caesura-metadata-{settings.instance}"),
        filters=filters([each.vm for each in listeners]),
        will=last_will(
            presence(settings.instance, online=False),
            source_of(settings.fleet, "metadata", settings.instance),
            instance=settings.instance,
        ),
    )
    publisher = MetadataPublisher(settings, bus)
    registry = CollectorRegistry()
    registry.register(PublisherCollector(publisher, bus))
    pings = {"broker": publisher.broker_ping, "documents": lambda: publisher.documents_ping(listeners)}
    async with (
        serve_health(settings.health_listen, pings, registry, fleet=settings.fleet),
        serve_metadata(publisher, listeners, settings.http_hosts, inherited),
        rare_full_collections(),  # which hold up every answer: thousands of listeners and connections are walked
    ):
        await serve(
            {
                "bus": publisher.run_bus,
                "approvals": publisher.run_approvals,
                "presence": publisher.run_presence,
                "resync": publisher.run_resync,
            },
            drain=publisher.drain,
        )


if __name__ == "__main__":
    sys.exit(main())
