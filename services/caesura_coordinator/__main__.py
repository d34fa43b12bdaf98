"""The coordinator's composition root."""

from __future__ import annotations

from caesura.runtime.interrupt import QuietInterrupt

with QuietInterrupt():
    import asyncio
    import sys

    from prometheus_client import CollectorRegistry

    from caesura.bus.mqtt import MqttBus
    from caesura.bus.options import check_broker, options_from, parse_addresses
    from caesura.bus.rates import Rates
    from caesura.runtime.command import leaves, run_service
    from caesura.runtime.health import serve_health
    from caesura.runtime.listen import check_health_address
    from caesura.runtime.lock import exclusive_lock
    from caesura.runtime.logs import get_logger
    from caesura.runtime.serve import serve
    from caesura.runtime.shared_rows import StoreLost
    from caesura_coordinator.authority import Authority
    from caesura_coordinator.leadership import LeadershipLost, will
    from caesura_coordinator.metrics import CoordinatorCollector
    from caesura_coordinator.service import Coordinator, subscriptions
    from caesura_coordinator.settings import CoordinatorSettings
    from caesura_coordinator.shared_store import SharedStore, working_copy
    from caesura_coordinator.store import CoordinatorStore
    from caesura_coordinator.store_options import check_store, is_shared, shared_rows
    from caesura_coordinator.takeover import hold_off_s

SUMMARY = "Plans and runs rollouts; one coordinator per fleet, or several that share PostgreSQL. Announces scheduled events, commands hosts, halts on any failure."


_log = get_logger("caesura.coordinator")


async def run(settings: CoordinatorSettings) -> None:
    """Serve until a signal."""
    with exclusive_lock(settings.state_dir):
        if is_shared(settings):
            await _run_shared(settings)
        else:
            store = CoordinatorStore(f"{settings.state_dir}/coordinator.sqlite")
            await _serve(settings, store, None, stop=asyncio.Event())


async def _run_shared(settings: CoordinatorSettings) -> None:
    """Stand by, lead, and stand by again once another coordinator leads or the store is lost; until a signal."""
    stop = asyncio.Event()
    losses = 0
    while True:
        store, copy = working_copy()
        shared = SharedStore(
            store,
            copy,
            shared_rows(settings, copy.columns),
            name=settings.instance,
            lease_s=settings.lease_s,
            hold_off_s=hold_off_s(losses),
        )
        try:
            await _serve(settings, store, shared, stop=stop)
        except BaseExceptionGroup as group:
            found = leaves(group)
            if not all(isinstance(each, StoreLost | LeadershipLost) for each in found):
                raise
            for each in dict.fromkeys(map(str, found)):
                _log.error("coordinator.stops" if stop.is_set() else "coordinator.stands_by", why=each)
            if stop.is_set():
                return  # both at once, as when a machine shuts down
            losses = 0 if shared.steady else losses + 1
        else:
            return


async def _serve(
    settings: CoordinatorSettings, store: CoordinatorStore, shared: SharedStore | None, *, stop: asyncio.Event
) -> None:
    bus = MqttBus(
        options_from(settings, client_id=settings.instance, clean=False),
        filters=subscriptions(),
        rates=Rates(),
        will=will(Authority(coordinator=settings.instance, epoch=0), settings.fleet),
    )
    coordinator = Coordinator(
        bus,
        store,
        instance=settings.instance,
        settle_s=settings.settle_s,
        fleet=settings.fleet,
        shared=shared,
        ignore_retained=settings.broker_retained == "ignored",
        bus_label=",".join(map(str, parse_addresses(settings.broker_url))),
    )
    bus.peers = coordinator.known
    registry = CollectorRegistry()
    registry.register(CoordinatorCollector(coordinator))
    pings = {
        "broker": lambda: "" if bus.stats.connected else bus.stats.last_error or "not connected",
        "store": coordinator.commits.ping,
        "outbox": coordinator.publisher.ping,
    }
    try:
        async with serve_health(settings.health_listen, pings, registry, fleet=settings.fleet):
            await serve(coordinator.tasks(), drain=coordinator.drain, stop=stop)
    finally:
        coordinator.commits.close()


def main() -> None:
    """Entry point of ``caesura-coordinator``."""
    checks = (check_broker, check_health_address, check_store)
    sys.exit(run_service("coordinator", SUMMARY, CoordinatorSettings, run, checks=checks))


if __name__ == "__main__":
    main()
