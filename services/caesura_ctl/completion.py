"""Shell completion: names of sets, hosts, VMs, updates and rollouts, as currently retained by the broker.

A shell waits while this runs, so it is bounded in time, and any failure silently completes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Literal

import click
from click.shell_completion import CompletionItem

from caesura.contract import messages as m
from caesura.runtime.errors import CaesuraError
from caesura_ctl.fleet_view import FleetView

Kind = Literal["set", "host", "vm", "update", "rollout"]
_PATIENCE_S = 1.5  # s: from Tab to the shell's prompt, with a broker that does not answer
_SETTLED_S = 0.8  # s: the share of that for retained messages


def complete(kind: Kind) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """A completer of names for an option or argument."""

    def completer(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
        broker = context.params.get("broker")
        try:
            fleet_view = _asked(kind, str(broker) if broker else None)
        except (CaesuraError, OSError, TimeoutError, BaseExceptionGroup):
            return []
        return [
            CompletionItem(name, help=hint)
            for name, hint in names(fleet_view, kind)
            if name.startswith(incomplete)
        ]

    return completer


def names(fleet_view: FleetView, kind: Kind) -> Iterable[tuple[str, str]]:
    """The names of a kind with a short description; rollouts newest first. Pure."""
    match kind:
        case "set":
            found: dict[str, int] = {}
            for _, record in fleet_view.vm_places().values():
                found[record.set] = found.get(record.set, 0) + 1
            return [(name, f"{count} VMs") for name, count in sorted(found.items())]
        case "host":
            return [(name, f"{len(each.vms)} VMs") for name, each in sorted(fleet_view.hosts.items())]
        case "vm":
            return [(vm, host) for vm, (host, _) in sorted(fleet_view.vm_places().items())]
        case "update":
            updates = {each.update: each for host in fleet_view.hosts.values() for each in host.updates}
            return [(name, f"{each.version} {each.impact}") for name, each in sorted(updates.items())]
        case "rollout":
            newest = sorted(fleet_view.rollouts.values(), key=lambda each: each.created_at, reverse=True)
            return [(each.rollout, f"{each.update} {each.status}") for each in newest]


def _asked(kind: Kind, broker: str | None) -> FleetView:
    """The retained messages of the broker.

    Raises:
        CaesuraError: no settings or no broker.
        TimeoutError: it did not answer in time.
    """
    # Imported here: these are slow to load, and a shell that completes an option's name needs neither.
    from caesura.runtime.logs import silence  # noqa: PLC0415
    from caesura_ctl.options import settings_for  # noqa: PLC0415
    from caesura_ctl.session import connect  # noqa: PLC0415

    silence()
    settings = settings_for(broker)

    async def ask() -> FleetView:
        # The time limit covers everything, since a broker may accept the connection and then be silent.
        wanted = m.RolloutState if kind == "rollout" else m.HostInventory
        async with connect(settings, [wanted], connect_s=_PATIENCE_S - _SETTLED_S) as session:
            with suppress(TimeoutError):
                await session.settled(_SETTLED_S)
            return session.fleet_view

    async def bounded() -> FleetView:
        async with asyncio.timeout(_PATIENCE_S):
            return await ask()

    return asyncio.run(bounded())
