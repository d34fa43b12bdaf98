"""Which commands coordinator and host must have in common before anything is planned. Pure.

Each announces what it sends or reads (``CoordinatorPresence.commands``, ``HostInventory.commands``): a peer whose version does not
receive the commands is refused by name instead of being waited for. Later versions may send and read more.
"""

from __future__ import annotations

from collections.abc import Collection

from caesura.contract.messages import AbortOperation, StartOperation

COMMANDS: tuple[str, ...] = (StartOperation.TYPE, AbortOperation.TYPE)
"""What this version sends to hosts, and reads on them: both are needed, since everything that is started must be stoppable (I11)."""

UPGRADE = "docs/operate/upgrade.md has the order"


def missing(commands: Collection[str]) -> tuple[str, ...]:
    """The commands of ``COMMANDS`` that the other side lacks; empty: it is compatible."""
    return tuple(each for each in COMMANDS if each not in commands)
