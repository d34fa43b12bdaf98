"""Hosts and coordinators that cannot work together because their versions differ, as text. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from caesura.contract.messages import HostInventory
from caesura.lifecycle.command_compatibility import UPGRADE, missing


def not_together(hosts: Mapping[str, HostInventory]) -> list[str]:
    """One line for each host that refuses the coordinator, or would not receive its commands, by name."""
    lines = []
    for name, inventory in sorted(hosts.items()):
        if inventory.refused_epoch:
            lines.append(f"{name} does not obey the coordinator: {inventory.refused_epoch}")
        if unread := missing(inventory.commands):
            lines.append(
                f"{name} is of an older version and does not read {', '.join(unread)}: upgrade it ({UPGRADE})"
            )
    return lines
