"""What libvirt itself says of its domains' pauses, by its events."""

from __future__ import annotations

import time
from typing import Any

from caesura_host_updater.drivers.libvirt.binding import load_binding, run_events
from caesura_testing.libvirt_daemons import LibvirtDaemon


class Witness:
    """When libvirt says that each domain was paused and resumed, on CLOCK_MONOTONIC in seconds."""

    def __init__(self, *daemons: LibvirtDaemon) -> None:
        libvirt = load_binding("")
        run_events(libvirt)
        self.pauses: list[tuple[str, float, float]] = []
        """Domain, from, to; in the order of their ends."""
        self.paused: dict[str, float] = {}
        self.at_once: set[frozenset[str]] = set()
        """Which domains were paused at the same time."""
        self._connections = []

        def happened(_connection: Any, domain: Any, event: int, _detail: int, _: Any) -> None:
            name = domain.name()
            if event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
                self.paused[name] = time.monotonic()
                self.at_once.add(frozenset(self.paused))
            elif event in (libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_STOPPED):
                since = self.paused.pop(name, None)
                if since is not None:
                    self.pauses.append((name, since, time.monotonic()))

        for daemon in daemons:
            connection = libvirt.open(f"qemu+unix:///session?socket={daemon.socket}")
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, happened, None)
            self._connections.append(connection)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
