"""Two hosts, each with a libvirtd of its own; libvirt's own events are the witness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from caesura_testing.libvirt_daemons import URI, LibvirtDaemon, libvirt_daemon, libvirt_installed
from caesura_testing.libvirt_witness import Witness


@pytest.fixture(scope="session")
def daemons() -> Iterator[tuple[LibvirtDaemon, LibvirtDaemon]]:
    if not libvirt_installed():
        pytest.skip("libvirtd, virsh or QEMU is missing, or a python3-libvirt for this Python")
    with libvirt_daemon() as first, libvirt_daemon() as second:
        yield first, second


@pytest.fixture
async def fleet(stages: Callable[..., Any], daemons: tuple[LibvirtDaemon, LibvirtDaemon]) -> Any:
    """A coordinator and two hosts with three domains: one set of two domains, and one domain of another set."""
    first, second = daemons
    for daemon in daemons:
        if daemon.process.poll() is not None:
            daemon.start()
    first.define("web-1", label="set='web' update-domain='0'", own_qmp=True)
    first.define("db-1", label="set='db' update-domain='0'", own_qmp=True)
    memory = "<source type='memfd'/><access mode='shared'/>"
    second.define("web-2", label="set='web' update-domain='1'", own_qmp=True, memory=memory)
    stage = await stages(up=False)
    sandbox = stage.sandbox
    sandbox.libvirt_host("host-1", str(first.socket), URI, {"web-1": ("web", 0), "db-1": ("db", 0)})
    sandbox.libvirt_host("host-2", str(second.socket), URI, {"web-2": ("web", 1)})
    await stage.up("host-1", "host-2")
    stage.witness = Witness(*daemons)
    stage.daemons = daemons
    yield stage
    stage.witness.close()
    for daemon in daemons:
        if daemon.process.poll() is not None:
            daemon.start()
        daemon.remove_all()
