"""One Proxmox node for the tests of this folder; each test has VMs of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from caesura_testing.guests import qemu_installed
from caesura_testing.proxmox_node import ProxmoxNode, proxmox_node


@pytest.fixture(scope="session")
def shared_node() -> Iterator[ProxmoxNode]:
    if not qemu_installed():
        pytest.skip("QEMU is not installed")
    with proxmox_node() as node:
        yield node


@pytest.fixture
def node(shared_node: ProxmoxNode) -> Iterator[ProxmoxNode]:
    """Without VMs at the beginning and the end."""
    yield shared_node
    shared_node.remove_all()
    shared_node.events.forget()
