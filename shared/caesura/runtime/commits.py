"""What services ask of the commits of their store, wherever it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol


class DurableCommits(Protocol):
    """Commits return at once; an effect of one waits until it is durable: on disk, or in the database.

    ``caesura.runtime.group_commit`` has them in an SQLite file, ``caesura_coordinator.shared_store`` in a database that coordinators share.
    """

    listeners: list[Callable[[], None]]
    """Called whenever more commits are durable."""

    @property
    def on_disk(self) -> int:
        """The number of durable commits, counted from the oldest."""

    @property
    def committed(self) -> int:
        """The number of commits."""

    @property
    def settled(self) -> bool:
        """Whether everything that is committed is durable."""

    async def reached(self) -> int:
        """Wait until everything that is committed now is durable.

        Returns:
            ``on_disk``.

        Raises:
            SyncFailed: it may never be.
        """

    def start(self) -> asyncio.Task[None]:
        """Start to make commits durable, or join the run that is under way; awaiting it is optional.

        Raises:
            SyncFailed: one has failed.
        """

    async def writable(self) -> None:
        """Wait while a commit would block the event loop."""

    async def run(self) -> None:
        """Do the regular work, until cancelled.

        Raises:
            SyncFailed: a commit may not be durable.
        """

    def close(self) -> None:
        """Close the store."""

    def ping(self) -> str:
        """For the health probe: empty, or what is wrong with the store."""
