"""Two hosts, each a Proxmox node as far as files and QEMU processes go; QEMU's events, as qmeventd gets them, are the witness."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from caesura_testing.guests import qemu_installed
from caesura_testing.proxmox_node import ProxmoxNode, StatusDaemon, proxmox_node


@pytest.fixture(scope="session")
def nodes() -> Iterator[tuple[ProxmoxNode, ProxmoxNode]]:
    if not qemu_installed():
        pytest.skip("QEMU is not installed")
    with proxmox_node() as first, proxmox_node() as second:
        yield first, second


@pytest.fixture
async def fleet(stages: Callable[..., Any], nodes: tuple[ProxmoxNode, ProxmoxNode]) -> AsyncIterator[Any]:
    """A coordinator and two nodes with three VMs: one set of two, and one of another set; each is asked as pvestatd does."""
    first, second = nodes
    first.create(100, "web", tags=("caesura-set-web", "caesura-ud-0"))
    first.create(101, "db", tags=("caesura-set-db", "caesura-ud-0"))
    second.create(200, "web", tags=("caesura-set-web", "caesura-ud-1"))
    stage = await stages(up=False)
    sandbox = stage.sandbox
    sandbox.proxmox_host(
        "host-1", first.config_dir, first.run_dir, {"vm-100": ("web", 0), "vm-101": ("db", 0)}
    )
    sandbox.proxmox_host("host-2", second.config_dir, second.run_dir, {"vm-200": ("web", 1)})
    await stage.up("host-1", "host-2")
    stage.nodes = nodes
    stage.pids = {first.pid(100): "vm-100", first.pid(101): "vm-101", second.pid(200): "vm-200"}
    sockets = [first.run_dir / "100.qmp", first.run_dir / "101.qmp", second.run_dir / "200.qmp"]
    with StatusDaemon(sockets) as stage.status:
        yield stage
    for node in nodes:
        node.remove_all()
        node.events.forget()
