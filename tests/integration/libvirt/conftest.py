"""One libvirtd for the tests of this folder; each test has domains of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from caesura_testing.libvirt_daemons import LibvirtDaemon, libvirt_daemon, libvirt_installed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without libvirt there is nothing to test."""
    if not libvirt_installed():
        skip = pytest.mark.skip(
            reason="libvirtd, virsh or QEMU is missing, or a python3-libvirt for this Python"
        )
        for item in items:
            if "/integration/libvirt/" in str(item.path):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[LibvirtDaemon]:
    with libvirt_daemon() as daemon:
        yield daemon


@pytest.fixture
def daemon(shared_daemon: LibvirtDaemon) -> Iterator[LibvirtDaemon]:
    """Running, and without domains at the beginning and the end."""
    if shared_daemon.process.poll() is not None:
        shared_daemon.start()
    yield shared_daemon
    if shared_daemon.process.poll() is not None:
        shared_daemon.start()
    shared_daemon.remove_all()
