"""The guest agent by libvirt, which holds its socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from caesura.runtime.threads import in_thread
from caesura_host_updater.drivers.guest_agent import AgentSilent, GuestAgent, read_reply
from caesura_host_updater.drivers.libvirt.connection import LibvirtConnection


class LibvirtAgent(GuestAgent):
    """See the module.

    Args:
        uuid: of the domain.
        by: instant on the event loop's clock by which everything must be done.
    """

    def __init__(self, vm: str, uuid: str, connection: LibvirtConnection, by: float) -> None:
        super().__init__(vm)
        self._uuid = uuid
        self._connection = connection
        self._by = by

    async def _call(self, command: str, arguments: Callable[[], dict[str, Any]] | None = None) -> Any:
        def ask() -> str:
            request: dict[str, Any] = {"execute": command}
            if arguments is not None:
                request["arguments"] = arguments()
            return self._connection.ask_agent(self._uuid, request)

        try:
            async with asyncio.timeout_at(self._by):
                line = await in_thread(f"guest agent of {self._vm}", ask)
        except TimeoutError as error:
            raise AgentSilent(self._vm, f"the guest agent did not answer {command} in time") from error
        except OSError as error:
            raise AgentSilent(self._vm, f"the guest agent does not answer {command}: {error}") from error
        return read_reply(self._vm, command, line)


@asynccontextmanager
async def libvirt_agent(
    vm: str, uuid: str, connection: LibvirtConnection, by: float
) -> AsyncIterator[LibvirtAgent]:
    """As ``guest_agent``: libvirt synchronises with the agent itself."""
    yield LibvirtAgent(vm, uuid, connection, by)
