"""``caesura-vm-agent``: the composition root of the VM agent."""

from __future__ import annotations

from caesura.runtime.interrupt import QuietInterrupt

with QuietInterrupt():
    import sys
    from contextlib import AsyncExitStack

    import msgspec

    from caesura.bus.mqtt import MqttBus
    from caesura.bus.options import check_broker, options_from
    from caesura.bus.port import Bus, Will
    from caesura.bus.presence import last_will
    from caesura.contract.envelope import source_of
    from caesura.contract.messages import AgentPresence
    from caesura.runtime.command import run_service
    from caesura.runtime.identity import new_id
    from caesura.runtime.listen import check_health_address
    from caesura.runtime.serve import serve
    from caesura_vm_agent.guest_clock import GuestClock, SimulatedClock, SystemClock
    from caesura_vm_agent.service import VmAgent, filters
    from caesura_vm_agent.settings import VmAgentSettings

# s: above the pause budget of 30, so that a frozen agent is not declared offline by its broker
_KEEPALIVE_S = 60


def main() -> int:
    """The console script."""
    return run_service(
        "vm-agent",
        "Runs in a VM: hooks, readiness and the guest's clock.",
        VmAgentSettings,
        _main,
        checks=(check_broker, check_health_address),
    )


async def _main(settings: VmAgentSettings) -> None:
    boot_id = new_id()
    clock: GuestClock = SimulatedClock() if settings.clock == "simulated" else SystemClock()
    # A persistent session: a `resumed` sent while the broker was away still arrives.
    options = options_from(settings, client_id=f"caesura-vm-{settings.vm}", clean=False)
    bus = MqttBus(
        msgspec.structs.replace(options, keepalive_s=_KEEPALIVE_S),
        filters=filters(settings),
        will=_will(settings, boot_id),
    )
    agent = VmAgent(settings, bus, clock, boot_id)
    async with AsyncExitStack() as stack:
        if settings.health_listen:
            await _serve_health(stack, settings, agent, bus)
        await serve(
            {
                "bus": agent.run_bus,
                "clock": clock.run,
                "hooks": agent.run_hooks,
                "sync": agent.run_clock,
                "announce": agent.run_announcements,
                "canary": agent.run_canary,
                "presence": agent.run_presence,
                "publisher": agent.run_publisher,
                "resync": agent.run_resync,
            },
            drain=agent.drain,
        )


def _will(settings: VmAgentSettings, boot_id: str) -> Will:
    offline = AgentPresence(vm=settings.vm, online=False, boot_id=boot_id, clock=settings.clock)
    return last_will(offline, source_of(settings.fleet, "vm", settings.vm), vm=settings.vm)


async def _serve_health(stack: AsyncExitStack, settings: VmAgentSettings, agent: VmAgent, bus: Bus) -> None:
    # aiohttp and prometheus_client cost more to import than the whole agent; most agents need neither.
    from prometheus_client import CollectorRegistry  # noqa: PLC0415

    from caesura.runtime.health import serve_health  # noqa: PLC0415
    from caesura_vm_agent.metrics import AgentCollector  # noqa: PLC0415

    registry = CollectorRegistry()
    registry.register(AgentCollector(agent, bus))

    def broker() -> str:
        return "" if bus.stats.connected else f"not connected: {bus.stats.last_error or 'still trying'}"

    await stack.enter_async_context(
        serve_health(settings.health_listen, {"broker": broker}, registry, fleet=settings.fleet)
    )


if __name__ == "__main__":
    sys.exit(main())
