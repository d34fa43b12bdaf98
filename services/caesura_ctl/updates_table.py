"""Which updates the hosts offer, and where each is installed, as a table. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from caesura_ctl.columns import Columns, first_of
from caesura_ctl.durations import show_duration
from caesura_ctl.fleet_view import FleetView

_NAMED = 12
"""How many hosts a table names; the others are counted. ``--json`` names all."""


def _installed_on(fleet_view: FleetView, update: str, version: str, hosts: Sequence[str]) -> str:
    found = {
        host: each
        for host in hosts
        for each in fleet_view.hosts[host].installed
        if (each.update, each.version) == (update, version)
    }
    whole = [host for host, each in found.items() if not each.vms]
    if len(whole) == len(hosts):
        return "all"
    partly = [f"{host} ({len(each.vms)} VMs)" for host, each in found.items() if each.vms]
    return first_of([*whole, *partly], _NAMED)


def updates_view(fleet_view: FleetView) -> RenderableType:
    """Updates by name with the hosts that define them, then refused files."""
    found: dict[tuple[str, str, str, str, str, float], list[str]] = {}
    for host, inventory in sorted(fleet_view.hosts.items()):
        for each in inventory.updates:
            found.setdefault(
                (each.update, each.version, each.impact, each.scope, each.vmm, each.expected_s), []
            ).append(host)
    table = Columns(
        "update",
        "version",
        "impact",
        "scope",
        "~new VMM",
        ">expected",
        "~hosts",
        "~installed on",
        drop=("new VMM", "scope", "expected", "impact"),
    )
    for (name, version, impact, scope, vmm, expected_s), hosts in sorted(found.items()):
        shown = {"beside": "beside the old", "instead": "instead of the old"}.get(vmm, "")
        table.add_row(
            name,
            version,
            impact,
            scope,
            shown,
            show_duration(expected_s),
            f"all {len(hosts)}" if len(hosts) == len(fleet_view.hosts) > 1 else first_of(hosts, _NAMED),
            _installed_on(fleet_view, name, version, hosts),
        )
    refused = [
        (host, bad)
        for host, inventory in sorted(fleet_view.hosts.items())
        for bad in inventory.refused_updates
    ]
    if not refused:
        return table
    broken = Columns("host", "file", ">line", "~why", title="Refused files (the others stay usable)")
    for host, bad in refused:
        broken.add_row(host, bad.file, str(bad.line or ""), Text(bad.reason, style="red"))
    return Group(table, broken)
